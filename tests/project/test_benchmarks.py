"""Benchmarks: every figure is there and adds up, peers find the same, and mistakes are explained."""

import argparse
import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import bench_sweep
import compare_fits
import measure_forgetting
import numpy as np
import pytest
import torch
import train_small
from command_line import ENV
from paths import TOOLS
from seeds import vary
from tool_calls import call_tool

from streamer.linalg.torch_state import threads

SMALL = ("--hidden", "192", "--layers", "2")


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TOOLS / "bench_model.py", "--threads", "1", *map(str, args)], capture_output=True, text=True,
        env=ENV, check=False,
    )  # fmt: skip


@pytest.mark.long
def test_a_tiny_model_gives_every_figure(tmp_path: Path) -> None:
    done = run(*SMALL, "--kv-heads", 4, "--like", "llama-3-70b", "--work", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    tree = json.loads(done.stdout)
    assert tree["matrices"] == tree["certified"] == sum(row["matrices"] for row in tree["shapes"]) == 14
    assert len(tree["layers"]) == 2
    assert 0 < tree["before"] < tree["seconds"]
    assert tree["seconds"] == pytest.approx(tree["before"] + sum(tree["layers"]), rel=0.2)
    rest = tree["seconds"] - sum(tree["layers"])
    assert tree["projected"]["layers"] == 80
    assert tree["projected"]["seconds"] == pytest.approx(rest + 80 * tree["seconds_per_layer"])
    assert tree["planted"] == {"matrices": 6, "intruders": 8, "missed": [], "others": []}
    assert tree["reading"]["waited"] >= tree["reading"]["first"] > 0
    assert 50e6 < tree["anonymous"] < 2e9
    assert [row["done"] >= (i + 1) / 10 for i, row in enumerate(tree["forecasts"])] == [True] * 9
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


@pytest.mark.parametrize(("tool", "args", "words"), [
    ("bench_model", "base", "come together"),
    ("bench_model", "--project 0", "at least 1"),
    ("bench_model", "--threads 0", "at least 1"),
    ("bench_detect", "--shapes 12", "ROWSxCOLUMNS"),
    ("bench_detect", "--solvers magic", "expected certified, blocks, dense, peft"),
    ("bench_detect", "--repeats 0", "at least 1"),
    ("bench_sweep", "--commands fit", "repair, evaluate, map"),
    ("bench_sweep", "--layers 2,1", "rising"),
    ("bench_sweep", "--sequences 1", "at least 4"),
])  # fmt: skip
def test_a_wrong_option_is_explained(tool: str, args: str, words: str) -> None:
    done = call_tool(tool, *args.split())
    assert done.returncode in (1, 2)
    assert words in done.stderr


TINY = ("--rank", "6", "--top-k", "5", "--repeats", "1", "--threads", "1")


def measured(*args: str) -> dict:
    done = call_tool("bench_detect", *TINY, "--json", *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.long
def test_every_solver_finds_what_was_planted_in_one_table() -> None:
    tree = measured("--shapes", "160x200,200x160", "--solvers", "certified,dense,peft", "--dtype", "bf16")
    assert [tuple(row["shape"]) for row in tree["rows"]] == [(160, 200)] * 3 + [(200, 160)] * 3
    for row in tree["rows"]:
        assert row["agrees"], row
        assert row["intruders"] >= 2, row
        assert row["runs"] == 1, row
        assert min(row["seconds"], row["ratio"]) > 0, row
        assert row["memory"] >= 0, row
        if row["solver"] == "certified":
            assert row["ratio"] == 1, row
            assert row["certified"], row
            assert min(row["steps"], row["products"]) > 0, row


@pytest.mark.long
def test_small_matrices_give_every_figure() -> None:
    with threads(torch.get_num_threads()):
        done = call_tool(
            "bench_adapters", "--shape", "640x700", "--matrices", 1, "--adapters", 3, "--rounds", 2, "--json"
        )
    assert done.returncode == 0, done.stderr
    tree = json.loads(done.stdout)
    assert len(tree["rounds"]) == 2
    for row in tree["rounds"]:
        assert row["equal"] == row["decided"] == 3
        assert row["in_one_pass_share"] == pytest.approx(row["in_one_pass"] / row["in_turn"])
        assert min(row.values()) > 0
    assert set(tree["spread"]) == set(tree["rounds"][0])


@pytest.mark.long
def test_a_tiny_sweep_gives_every_figure(tmp_path: Path) -> None:
    done = call_tool("bench_sweep", "--hidden", 64, "--layers", 2, "--dtype", "fp32", "--work", tmp_path, "--sequences", 8,
                     "--length", 16, "--threads", 1, "--options=--max-memory 1500M", "--commands", "repair,evaluate", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    tree = json.loads(done.stdout)
    runs = {run["command"]: run for run in tree["runs"]}
    # Of 8 sequences of each text, 5 are fitted, under two models and two pairs; the others ride under six, and then under one.
    assert (runs["repair"]["rows"], runs["repair"]["sweeps"]) == (16 * 2 * (5 * 3 + 3 * 6 + 3), 2)
    # The base, the adapter and two shrinks, and the base beside the shrink that keeps the share.
    assert (runs["evaluate"]["rows"], runs["evaluate"]["sweeps"]) == (16 * 2 * 8 * (4 + 2), 2)
    for run in runs.values():
        assert 0 < run["start"] < 1.5 * run["cpu"]
        assert 50e6 < run["anonymous"] < run["forecast"] <= 1500 << 20  # torch alone is over 50 MB
        assert run["rchar"] > run["base"] > 0 <= run["read"]
    assert tree["projected"] == {}  # of one number of layers
    assert "sweeps" in bench_sweep.table(tree)
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


@pytest.mark.long
def test_a_tiny_model_on_workers_gives_every_figure() -> None:
    options = ["--hidden", "192", "--engines", "processes", "--workers", "1", "--json"]
    done = subprocess.run(
        [sys.executable, TOOLS / "bench_workers.py", *options], capture_output=True, text=True, env=ENV, check=False
    )
    assert done.returncode == 0, done.stderr
    alone, worker = json.loads(done.stdout)["rows"]
    assert set(alone) == {"engine", "workers", "seconds"}
    assert worker["equal"] is True
    assert 0 < worker["task_seconds"] < worker["start_seconds"]


def test_peers_are_what_their_papers_say(tmp_path: Path) -> None:
    """A fraction of the directions' norm, of the layers by depth, of the entries: against numpy, and PEFT's own layers."""
    import peer_repairs
    import peft
    from causal_models import CAUSAL, make_adapter, make_base
    from transformers import AutoModelForCausalLM

    cls, base = make_base("llama", tmp_path / "base"), tmp_path / "base"
    adapter = make_adapter(cls, base, tmp_path / "adapter", CAUSAL["llama"][2], r=4, lora_alpha=6)
    found = [one for one in peer_repairs.directions(base, adapter) if ".layers." in one.target.tensor]
    for one, c in zip(found, peer_repairs.lines(found, 0.5), strict=True):
        depth = int(one.target.tensor.split(".layers.")[1].split(".")[0])
        delta = one.delta.L.double() @ one.delta.R.double().T
        torch.testing.assert_close(one.delta.L.double() @ one.weighed(c).T, (0.5 + 0.5 * depth) * delta)
    whole = sum(float((one.S**2).sum()) for one in found)
    left = sum(float((c * one.S**2).sum()) for one, c in zip(found, peer_repairs.dropped(found, 0.8, 0), strict=True))
    assert 0.64 * whole <= left < 0.66 * whole + max(float(one.S[0] ** 2) for one in found)
    c = peer_repairs.operated(torch.tensor([3.0, -0.1, 1.0, 0.5, 0.7]), torch.ones(5))
    assert c[0] == c.max()
    assert c[1] == c.min()
    assert float(c.sum()) == pytest.approx(5.0)
    peer_repairs.by_entries(adapter, "ties", 0.3, tmp_path / "ties", 0)

    def deltas(path: Path) -> dict[str, torch.Tensor]:
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)
        return {n: m.get_delta_weight("default") for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}

    before, after = deltas(adapter), deltas(tmp_path / "ties")
    for name, delta in before.items():
        k = int(0.3 * delta.numel())
        least = delta.abs().flatten().sort(descending=True).values[k - 1]
        torch.testing.assert_close(after[name], torch.where(delta.abs() >= least, delta, torch.zeros(())))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_all_is_trained_fitted_measured_and_drawn(tmp_path: Path) -> None:
    arguments = ("--tiny", "--kinds", "llama", "--adapters", "high", "--seeds", 1, "--sequences", 16, "--length", 64)
    done = call_tool("compare_fits", tmp_path / "made", *arguments, "--figure", tmp_path / "tokens.svg")
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
    assert error == pytest.approx((199 / 200 * ((left_out - left_out.mean()) ** 2).sum()) ** 0.5, rel=0.01)


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
                tmp_path / f"{name}{part}.txt", made / "texts" / f"{name}{part}.txt".replace("task", "language")
            )
    shutil.copy(tmp_path / "task.txt", made / "texts" / "language-train.txt")  # enough to learn from
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
        found["means"]["base"][text] == 0 < found["means"]["adapter"][text] for text in measure_forgetting.OTHERS
    )
    rows = found["rows"]
    assert rows["adapter"]["loss"] == rows["adapter"]["third"] == [1, 0]
    assert 0 < rows["shrink 0.35"]["general"][0] < rows["shrink 0.7"]["general"][0] < 1
    assert 0 < rows["repair"]["general"][0] < rows["map"]["general"][0] < 1
    assert (
        rows["intruders 0"]["general"][0] > 0 < rows["intruders 0.5"]["general"][0] != rows["intruders 0"]["general"][0]
    )
    assert found["costs"]["repair"]["cpu_seconds"] > 1  # torch is imported
    assert found["costs"]["repair"]["peak_memory_bytes"] > 50e6
    assert "mean of 1" in done.stdout
    assert call_tool("measure_forgetting", *options).stdout == done.stdout  # with what is there
