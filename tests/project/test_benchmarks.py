"""Benchmarks: every figure is there and adds up, peers find the same, and mistakes are explained."""

import argparse
import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import compare_fits
import compare_maps
import measure_forgetting
import numpy as np
import pytest
import torch
import train_small
from command_line import ENV
from paths import TOOLS
from seeds import vary
from tool_calls import call_tool
from transformers import AutoTokenizer

import streamer

SMALL = ("--hidden", 192, "--layers", 2, "--json")

# Tool → arguments of a tiny run, and where its JSON has numbers above zero.
TINY: dict[str, tuple[tuple[object, ...], str]] = {
    "bench_model": (
        (*SMALL, "--kv-heads", 4, "--like", "llama-3-70b", "--threads", 1, "--work", "{}"),
        "layers",
    ),
    "bench_merge": ((*SMALL, "--rounds", 2, "--max-memory", "1G", "--work", "{}"), "rounds"),
    "bench_detect": (
        (
            "--shapes",
            "160x200,200x160",
            "--solvers",
            "certified,dense,peft",
            "--rank",
            6,
            "--top-k",
            5,
            "--repeats",
            1,
            "--threads",
            1,
            "--json",
        ),
        "rows",
    ),
    "bench_adapters": (
        ("--shape", "640x700", "--matrices", 1, "--adapters", 3, "--rounds", 2, "--json"),
        "rounds",
    ),
    "bench_sweep": (
        (
            "--hidden",
            64,
            "--layers",
            2,
            "--dtype",
            "fp32",
            "--work",
            "{}",
            "--sequences",
            8,
            "--length",
            16,
            "--threads",
            1,
            "--options=--max-memory 1500M",
            "--commands",
            "repair,evaluate",
            "--json",
        ),
        "runs",
    ),
    "bench_workers": (
        ("--hidden", 192, "--engines", "processes", "--workers", 1, "--json"),
        "rows",
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("tool", TINY)
def test_a_tiny_run_gives_every_figure(tool: str, tmp_path: Path) -> None:
    """What was planted is found, by every solver; nothing is left behind."""
    args, key = TINY[tool]
    line = [sys.executable, TOOLS / f"{tool}.py", *(str(arg).format(tmp_path) for arg in args)]
    done = subprocess.run(line, capture_output=True, text=True, env=ENV, check=False)
    assert done.returncode == 0, done.stderr
    tree = json.loads(done.stdout)
    rows = [row if isinstance(row, dict) else {"seconds": row} for row in tree[key]]
    assert len(rows) >= 2
    assert all(
        value > 0 for row in rows for name, value in row.items() if name.startswith("seconds")
    )
    assert all(row["agrees"] and row["intruders"] >= 2 for row in rows if tool == "bench_detect")
    assert all(
        row["anonymous"] < row["forecast"] <= 1500 << 20 for row in rows if tool == "bench_sweep"
    )
    assert tree.get("planted", {}).get("missed", []) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tool", "args", "words"),
    [
        ("bench_model", "base", "come together"),
        ("bench_model", "--project 0", "at least 1"),
        ("bench_model", "--threads 0", "at least 1"),
        ("bench_detect", "--shapes 12", "ROWSxCOLUMNS"),
        ("bench_detect", "--solvers magic", "expected certified, blocks, dense, peft"),
        ("bench_detect", "--repeats 0", "at least 1"),
        ("bench_sweep", "--commands fit", "repair, generate, evaluate, map"),
        ("bench_sweep", "--layers 2,1", "rising"),
        ("bench_sweep", "--sequences 1", "at least 4"),
    ],
)
def test_a_wrong_option_is_explained(tool: str, args: str, words: str) -> None:
    done = call_tool(tool, *args.split())
    assert done.returncode in (1, 2)
    assert words in done.stderr


def test_peers_are_what_their_papers_say(tmp_path: Path) -> None:
    """A fraction of the directions' norm, of the layers by depth, of the entries: against numpy, and PEFT's own layers."""
    import peer_repairs
    import peft
    from causal_models import CAUSAL, make_adapter, make_base
    from transformers import AutoModelForCausalLM

    cls = make_base("llama", tmp_path / "base")
    base = tmp_path / "base"
    adapter = make_adapter(cls, base, tmp_path / "adapter", CAUSAL["llama"][2], r=4, lora_alpha=6)
    found = [
        one for one in peer_repairs.directions(base, adapter) if ".layers." in one.target.tensor
    ]
    for one, c in zip(found, peer_repairs.lines(found, 0.5), strict=True):
        depth = int(one.target.tensor.split(".layers.")[1].split(".")[0])
        delta = one.delta.L.double() @ one.delta.R.double().T
        torch.testing.assert_close(
            one.delta.L.double() @ one.weighed(c).T, (0.5 + 0.5 * depth) * delta
        )
    whole = sum(float((one.S**2).sum()) for one in found)
    left = sum(
        float((c * one.S**2).sum())
        for one, c in zip(found, peer_repairs.dropped(found, 0.8, 0), strict=True)
    )
    assert 0.64 * whole <= left < 0.66 * whole + max(float(one.S[0] ** 2) for one in found)
    c = peer_repairs.operated(torch.tensor([3.0, -0.1, 1.0, 0.5, 0.7]), torch.ones(5))
    assert c[0] == c.max()
    assert c[1] == c.min()
    assert float(c.sum()) == pytest.approx(5.0)
    peer_repairs.by_entries(adapter, "ties", 0.3, tmp_path / "ties", 0)

    def deltas(path: Path) -> dict[str, torch.Tensor]:
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)
        return {
            n: m.get_delta_weight("default")
            for n, m in model.named_modules()
            if hasattr(m, "get_delta_weight")
        }

    before = deltas(adapter)
    after = deltas(tmp_path / "ties")
    for name, delta in before.items():
        k = int(0.3 * delta.numel())
        least = delta.abs().flatten().sort(descending=True).values[k - 1]
        torch.testing.assert_close(
            after[name], torch.where(delta.abs() >= least, delta, torch.zeros(()))
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_all_is_trained_fitted_measured_and_drawn(tmp_path: Path) -> None:
    arguments = (
        "--tiny",
        "--kinds",
        "llama",
        "--adapters",
        "high",
        "--seeds",
        1,
        "--sequences",
        16,
        "--length",
        64,
    )
    done = call_tool(
        "compare_fits", tmp_path / "made", *arguments, "--figure", tmp_path / "tokens.svg"
    )
    assert done.returncode == 0, done.stderr
    assert "| llama | high | 90% |" in done.stdout
    assert "| LiNeS |" in done.stdout
    assert ET.parse(tmp_path / "tokens.svg").getroot().get("width")
    again = call_tool("compare_fits", tmp_path / "made", *arguments)
    assert again.stdout == done.stdout


def test_the_error_of_a_ratio_is_that_of_the_jackknife() -> None:
    draws = np.random.default_rng(vary(0))
    whole = draws.normal(10, 1, 200)
    part = 0.4 * whole + draws.normal(0, 1, 200)
    share, error = measure_forgetting.ratio(part, whole)
    assert share == part.sum() / whole.sum()
    left_out = np.array([np.delete(part, i).sum() / np.delete(whole, i).sum() for i in range(200)])
    assert error == pytest.approx(
        (199 / 200 * ((left_out - left_out.mean()) ** 2).sum()) ** 0.5, rel=0.01
    )


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_what_methods_make_of_an_adapter_of_a_given_base_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    train_small.make_base(tmp_path, argparse.Namespace(**compare_fits.TINY, kind="llama"))
    (made / "texts").mkdir(parents=True)
    shutil.move(tmp_path / "base", made)
    for name in ("general", "task"):
        for part in ("", "-test"):
            shutil.copy(
                tmp_path / f"{name}{part}.txt",
                made / "texts" / f"{name}{part}.txt".replace("task", "language"),
            )
    shutil.copy(
        tmp_path / "task.txt", made / "texts" / "language-train.txt"
    )  # enough to learn from
    (made / "texts" / "chat-test.json").write_text(
        json.dumps([{"ids": [*range(i, i + 30)], "begin": 9} for i in range(4)])
    )
    for name, value in {"PART_TOKENS": 4000, "STEPS": 120, "SEQUENCES": 12, "LENGTH": 64}.items():
        monkeypatch.setattr(measure_forgetting, name, value)
    monkeypatch.setitem(measure_forgetting.ADAPTERS["language"], "rate", 5e-3)  # it forgets
    small = "--sequences 64 --length 64"
    options = (
        made,
        "--adapters",
        "language",
        "--seeds",
        "0",
        "--no-harness",
        "--repair-options",
        small,
        "--json",
        tmp_path / "json",
    )
    done = call_tool("measure_forgetting", *options)
    assert done.returncode == 0, done.stderr
    tree = json.loads((tmp_path / "json").read_text())
    found = tree["adapters"]["language-0"]
    assert found["means"]["base"]["loss"] > found["means"]["adapter"]["loss"] > 0
    assert all(
        found["means"]["base"][text] == 0 < found["means"]["adapter"][text]
        for text in measure_forgetting.OTHERS
    )
    rows = found["rows"]
    assert rows["adapter"]["loss"] == rows["adapter"]["third"] == [1, 0]
    assert 0 < rows["shrink 0.35"]["general"][0] < rows["shrink 0.7"]["general"][0] < 1
    assert 0 < rows["repair"]["general"][0] < rows["map"]["general"][0] < 1
    assert (
        rows["intruders 0"]["general"][0]
        > 0
        < rows["intruders 0.5"]["general"][0]
        != rows["intruders 0"]["general"][0]
    )
    assert found["costs"]["repair"]["cpu_seconds"] > 1  # torch is imported
    assert found["costs"]["repair"]["peak_memory_bytes"] > 50e6
    assert "mean of 1" in done.stdout
    assert call_tool("measure_forgetting", *options).stdout == done.stdout  # with what is there


@pytest.mark.parametrize(
    ("kind", "ridge"), [("none", 1.0), ("delta", 1.0), ("root", 0.3), ("rows", 0.1)]
)
def test_guesses_of_the_tasks_inputs_give_the_dense_formula(kind: str, ridge: float) -> None:
    draw, (m, n, r, k) = np.random.default_rng(vary(0)), (15, 20, 4, 5)
    L = draw.normal(size=(m, r))
    A = draw.normal(size=(r, n))
    V = np.linalg.qr(draw.normal(size=(n, k)))[0]
    values = np.array([9.0, 4, 2, 1, 0.5])
    rest = (n - 16.5) / (n - k)
    C = (V * (values - rest)) @ V.T + rest * np.eye(n)
    _, S, Vh = np.linalg.svd(L @ A)
    own = (Vh[:r].T * {"none": 0 * S, "delta": S**2, "root": S, "rows": 0 * S + 1}[kind][:r]) @ Vh[
        :r
    ]
    own = own * (n / (np.trace(own) or 1)) + ridge * np.eye(n)
    tensors = (torch.from_numpy(t) for t in (L, A, V, values))
    X, gamma, Y, energies = compare_maps.Module(None, *tensors, rest, {}).directions(kind, ridge)
    for weight in (0.1, 3.0):
        expected = A @ own @ np.linalg.inv(own + weight * C)
        np.testing.assert_allclose((X / (1 + weight * gamma)) @ Y, expected, atol=1e-9)
        delta = L @ expected
        left = (energies / (1 + weight * gamma) ** 2).sum()
        np.testing.assert_allclose(left, np.sum((delta @ C) * delta), rtol=1e-9)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_formulas_for_a_map_are_measured_at_equal_learning(tmp_path: Path) -> None:
    train_small.make_base(tmp_path, argparse.Namespace(**compare_fits.TINY, kind="llama"))
    ids = train_small.streams(AutoTokenizer.from_pretrained(tmp_path / "base"))["task"][0]
    train_small.make_adapter(tmp_path / "base", tmp_path / "high", "high", ids, 40, 0)
    streamer.map_inputs(
        tmp_path / "base",
        tmp_path / "map",
        general=tmp_path / "general.txt",
        sequences=16,
        length=64,
    )
    texts = {"task": "task-test", "general": "general-test", "third": "task"}
    files = [
        word for text, name in texts.items() for word in (f"--{text}", tmp_path / f"{name}.txt")
    ]
    options = (
        tmp_path / "base",
        tmp_path / "high",
        "--map",
        tmp_path / "map",
        *files,
        "--length",
        64,
        "--alone",
        2,
        32,
    )
    done = call_tool(
        "compare_maps", tmp_path / "out", *options, "--methods", "map;ΔᵀΔ + I, one μ;shrink"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "high.json").read_text())
    for points in found["points"].values():
        kept = [sum(point["task"]) / sum(found["adapter"]["task"]) for point in points]
        np.testing.assert_allclose(kept, compare_maps.KEEP, atol=2 * compare_maps.CLOSE)
        one, two = (sum(point["general"]) / sum(found["adapter"]["general"]) for point in points)
        assert 0 < two < one < 1
    assert len(found["alone"]) == 14
    assert min(found["alone"].values()) > 0
    assert "| map | 1.00 ± 0.00 | 1.00" in done.stdout
    assert "| (ΔᵀΔ)^½ + 0.3 I | – |" in done.stdout
    assert call_tool("compare_maps", tmp_path / "out").stdout == done.stdout
