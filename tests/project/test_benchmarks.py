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
import numpy as np
import pytest
import repair_pretrained
import torch
import train_small
from bench_model import forecasts
from command_line import ENV
from evaluations import evaluation
from helpers import tree_digest
from measure import cold, resident, warm
from paths import TOOLS
from seeds import vary
from shapes import KNOWN
from tool_calls import call_tool

from streamer.evaluation.evaluation import Evaluation
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


@pytest.mark.long
def test_a_given_model_is_measured_and_left_alone(tmp_path: Path) -> None:
    assert call_tool("make_checkpoint", tmp_path, *SMALL).returncode == 0
    before = tree_digest(tmp_path)
    done = run(tmp_path / "base", tmp_path / "adapter", "--project", 80, "--warm")
    assert done.returncode == 0, done.stderr
    for word in ("projected to 80 layers", "promised", "was hidden", "peak anonymous memory", "672x192"):
        assert word in done.stdout
    assert "planted" not in done.stdout  # of this model it knows nothing
    assert tree_digest(tmp_path) == before


def test_the_forecast_is_compared_with_what_it_came_to() -> None:
    """Ten units, the first half of which takes 1 s each and the second 3 s: halfway through, 10 s are promised of 20."""
    events = [[float(i if i <= 5 else 5 + 3 * (i - 5)), "", i, 10] for i in range(11)]
    rows = forecasts(events)
    assert [row["error"] for row in rows[:5]] == [-0.5] * 5
    assert rows[-1]["promised"] == pytest.approx(17 / 0.9)


def test_the_page_cache_is_filled_and_seen(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(3 << 20))
    warm(tmp_path)
    assert resident([path]) == 1
    assert 0 <= cold(tmp_path) <= 1  # the system may keep them


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


def test_the_top_k_stage_is_compared_with_its_residuals() -> None:
    rows = {row["solver"]: row for row in measured("--shapes", "200x160", "--topk-peers")["topk"]}
    assert {"krylov", "torch.svd_lowrank"} <= set(rows)
    assert rows["krylov"]["residual"] < 1e-4


def test_the_table_for_people() -> None:
    done = call_tool("bench_detect", *TINY, "--shapes", "120x100", "--spectrum", "flat", "--solvers", "certified")
    assert done.returncode == 0, done.stderr
    assert "120x100" in done.stdout
    assert "certified" in done.stdout


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
                     "--length", 16, "--threads", 1, "--max-memory", "1500M", "--commands", "repair,evaluate", "--json")  # fmt: skip
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


def test_the_projection_of_a_model_to_itself_is_what_it_would_take() -> None:
    small, large = KNOWN["llama-3-8b"], KNOWN["llama-3-70b"]
    runs = [{"layers": n, "rows": n * 10, "start": 3.0, "cpu": 3.0 + n * (5.0 + n * 2.0)} for n in (1, 2)]
    found = bench_sweep.projected(runs, small, None)
    assert (found["start"], found["layer"], found["head"]) == (3, 2, 5)
    assert found["models"]["llama-3-8b"] == 3 + 5 + 32 * 2
    layers = sum(m * n for m, n in large.modules.values()) / sum(m * n for m, n in small.modules.values())
    assert found["models"]["llama-3-70b"] == pytest.approx(3 + 5 * 2 + 32 * 2 * layers)


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


def points(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    """Points that keep and leave so much, and leave half as much of the third text's forgetting."""
    return [{"kept": kept, "left": left, "other": left / 2, "kl": left, "same": 0.5} for kept, left in pairs]


AS_IS = {"kept": 1.0, "left": 1.0, "other": 1.0, "kl": 1.0, "same": 0.25}


def test_what_is_left_is_read_off_measured_points() -> None:
    measured = points((0.9, 0.6), (0.8, 0.4), (0.5, 0.1))
    assert compare_fits.interpolated(measured, 0.8) == pytest.approx(0.4)
    assert 0.4 < compare_fits.interpolated(measured, 0.85) < 0.6
    assert 0.6 < compare_fits.interpolated(measured, 0.95) < 1.0
    assert compare_fits.interpolated(measured, 0.8, "other", AS_IS) == pytest.approx(0.2)
    assert 0.25 < compare_fits.interpolated(measured, 0.95, "same", AS_IS) < 0.5
    assert compare_fits.interpolated(measured, 0.4) is None
    assert compare_fits.interpolated([], 0.9) is None
    # What keeps more though it is stronger is left out, and all after it.
    assert compare_fits.interpolated(points((0.9, 0.6), (0.95, 0.2), (0.7, 0.1)), 0.8) is None


def test_evaluations_of_different_lengths_are_joined_on_what_both_have() -> None:
    long = evaluation(others={"third": 0.1})
    short = Evaluation.of(
        long.variants,
        {text: compare_fits.first(own, 40) for text, own in evaluation(seed=1, others={"third": 0.2}).sums.items()},
        long.facts,
        1,
    )
    for whole, other in ((long, short), (short, long)):
        found = compare_fits.joined(whole, other)
        assert [variant.name for variant in found.variants] == ["base", "adapter", "adapter"]
        for text, own in found.sums.items():
            assert (own.loss[:2] == whole.sums[text].loss[:2, :40]).all()
            assert (own.kl[2] == other.sums[text].kl[1, :40]).all()


def test_the_tables_have_means_and_errors() -> None:
    def one(adapter: str, seed: int, left: float) -> dict:
        found = {method: points((0.9, left), (0.5, 0.1)) for method in compare_fits.COLUMNS}
        found["shrink"] = points((0.9, 2 * left), (0.5, 0.2))
        found["paper"] = points((0.95, 0.9))
        if adapter == "usual":
            found["ties"] = []
        return {"kind": "llama", "adapter": adapter, "seed": seed, "points": found, "as_is": AS_IS}

    results = [one("high", 0, 0.2), one("high", 1, 0.3), one("usual", 0, 0.25)]
    lines = compare_fits.table(results, (0.9,)).splitlines()
    assert lines[2].startswith("| llama | high | 90% | 25 ± 5 | 25 ± 5 | 50 ± 10 |")
    assert lines[3].endswith("| – |")
    rows = {line.split(" | ")[0]: line.split(" | ") for line in compare_fits.means(results, (0.9,)).splitlines()}
    assert rows["| repair"][1:] == ["25", "12", "25", "50", "0.50 |"]
    assert rows["| TIES"][1:] == ["25 (1)", "12 (1)", "25 (1)", "50 (1)", "0.50 (1) |"]
    assert rows["| paper"][1:] == ["–"] * 4 + ["– |"]
    words = compare_fits.kept_on_test(results, (0.9,))
    assert words.startswith(
        "asked to keep 90%, on the test text repair keeps, in percent: 90.0 (90 to 90; 3 of 3 within 2"
    )


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


def test_the_shrink_that_keeps_as_much_is_the_strongest() -> None:
    """Of a gain that overshoots, as it does where training went too far, and a divergence that is quadratic."""
    points = {f: {"loss": (f * (2.2 - 1.2 * f), 0.0), "hits": (f, 0.0), "general": (f**2, 0.0), "third": (f**2 / 2, 0.0)}
              for f in (1.0, 0.85, 0.7, 0.5, 0.35)}  # fmt: skip
    found = repair_pretrained.as_much(points, 0.9)
    assert found["factor"] * (2.2 - 1.2 * found["factor"]) == pytest.approx(0.9, abs=0.01)
    assert found["general"] == pytest.approx(found["factor"] ** 2, abs=0.01)
    assert found["third"] == pytest.approx(found["general"] / 2)
    assert repair_pretrained.as_much(points, 1.2) is None


def test_the_error_of_a_ratio_is_that_of_the_jackknife() -> None:
    draws = np.random.default_rng(vary(0))
    whole = draws.normal(10, 1, 200)
    part = 0.4 * whole + draws.normal(0, 1, 200)
    share, error = repair_pretrained.ratio(part, whole)
    assert share == part.sum() / whole.sum()
    left_out = np.array([np.delete(part, i).sum() / np.delete(whole, i).sum() for i in range(200)])
    assert error == pytest.approx((199 / 200 * ((left_out - left_out.mean()) ** 2).sum()) ** 0.5, rel=0.01)


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(SystemExit, match="no-such-package is not installed"):
        repair_pretrained.package("no_such_package")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_a_repair_of_a_given_base_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    for name, value in {"PART_TOKENS": 4000, "STEPS": 120, "SEQUENCES": 12, "LENGTH": 64}.items():
        monkeypatch.setattr(repair_pretrained, name, value)
    monkeypatch.setitem(repair_pretrained.ADAPTERS["language"], "rate", 5e-3)  # it forgets
    small = "--sequences 64 --length 64"
    options = (made, "--adapters", "language", "--repair-options", small, "--json", tmp_path / "json")
    done = call_tool("repair_pretrained", *options)
    assert done.returncode == 0, done.stderr
    tree = json.loads((tmp_path / "json").read_text())
    found = tree["adapters"]["language"]
    assert found["means"]["base"]["loss"] > found["means"]["adapter"]["loss"] > 0
    assert found["means"]["base"]["general"] == 0 < found["means"]["adapter"]["general"]
    assert found["rows"]["adapter"]["loss"] == found["rows"]["adapter"]["third"] == [1, 0]
    assert 0 < found["rows"]["shrink 0.35"]["general"][0] < found["rows"]["shrink 0.7"]["general"][0] < 1
    assert 0 < found["rows"]["repair"]["general"][0] < 1
    assert found["repair"]["cpu_seconds"] > 1  # torch is imported
    assert found["repair"]["peak_memory_bytes"] > 50e6
    assert call_tool("repair_pretrained", *options).stdout == done.stdout  # with what is there
