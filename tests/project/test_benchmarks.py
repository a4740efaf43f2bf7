"""Benchmarks: every figure is there and adds up, peers find the same, and mistakes are explained."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import bench_evaluate
import bench_fit
import compare_fits
import profile_evaluate
import profile_fit as p
import pytest
import torch
from bench_model import forecasts
from command_line import ENV
from helpers import tree_digest
from measure import cold, resident, warm
from paths import TOOLS
from shapes import KNOWN
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
    ("bench_evaluate", "base", "come together"),
    ("bench_evaluate", "base adapter --double", "leave BASE out"),
    ("bench_evaluate", "--sequences 1", "at least 2"),
    ("bench_fit", "--sequences 1", "at least 2"),
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
def test_a_tiny_evaluation_gives_every_figure(tmp_path: Path) -> None:
    done = call_tool("bench_evaluate", "--hidden", 64, "--layers", 1, "--dtype", "fp32", "--work", tmp_path, "--method", "shrink",
                     "--lambda", 0.5, "--length", 16, "--threads", 1, "--peer", 1, "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    tree = json.loads(done.stdout)
    assert tree["variants"] == 3
    profile, stages = tree["profile"], tree["profile"]["stages"]
    p = profile_evaluate
    assert set(stages) == {p.PRODUCTS, p.READING, p.DELTAS, p.FACTORS, p.ATTENTION, p.REST, p.SOFTMAX, p.START,
                           p.HEAD + p.PRODUCTS, p.HEAD + p.READING}  # fmt: skip
    assert all(t["wall"] > 0 and t["cpu"] >= 0 for t in stages.values())
    # Nothing counted twice or missed.
    assert sum(t["wall"] for t in stages.values()) == pytest.approx(profile["seconds"], rel=0.02)
    assert (profile["passes"], profile["rows"], profile["most_rows"]) == (2, 3 * 2 * 2 * 16, 3 * 2 * 16)
    passes = sum(t["wall"] for name, t in stages.items() if name != p.START)
    assert tree["seconds_per_row"]["wall"] == pytest.approx(passes / profile["rows"])
    assert 50e6 < profile["anonymous"] < profile["hwm"] < 2e9  # torch alone is over 50 MB
    assert profile["forecast"]["peak_memory_bytes"] > profile["anonymous"]
    assert tree["projected"]["llama-3-70b"]["wall"] > tree["projected"]["llama-3-8b"]["wall"] > profile["seconds"]
    (row,) = tree["peer"]["rounds"]
    assert row["evaluate/load"] == pytest.approx(row["evaluate"] / row["load"])
    assert row["evaluate/(merge + load)"] == pytest.approx(row["evaluate"] / (row["merge"] + row["load"]))
    assert tree["peer"]["apart"]["loss"] < 1e-5  # or the two would not do the same work
    assert tree["peer"]["apart"]["kl"] < 1e-5
    assert "projected" in bench_evaluate.table(tree)
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_the_projection_of_a_model_to_itself_is_what_was_measured() -> None:
    p, seconds = profile_evaluate, {"wall": 1.0, "cpu": 1.0}
    stages = (p.PRODUCTS, p.READING, p.HEAD + p.PRODUCTS, p.SOFTMAX, p.START)
    profile = {"rows": 2 * 64 * 512 * 8, "passes": 128, "stages": dict.fromkeys(stages, seconds)}
    small, large = KNOWN["llama-3-8b"], KNOWN["llama-3-70b"]
    projected = bench_evaluate.project(profile, small, 8)
    assert projected["llama-3-8b"] == {**profile, "wall": 5.0, "cpu": 5.0}
    layers = sum(m * n for m, n in large.modules.values()) / sum(m * n for m, n in small.modules.values())
    # Products and reading grow with the layers, the head with its width, the softmax and the start not.
    assert projected["llama-3-70b"]["wall"] == pytest.approx(2 * layers + 2 + 1 + 1)


@pytest.mark.long
def test_a_fit_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, TOOLS / "bench_fit.py", "--hidden", "256", "--layers", "2", "--vocab", "512", "--work", tmp_path,
               "--length", "32", "--tokens", "512", "--max-memory", "1000", "--threads", "1", "--json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, check=False)
    assert done.returncode == 0, done.stderr
    tree = json.loads(done.stdout)
    found, measured = tree["model"]["inputs"], tree["model"]["measure"]
    assert 50e6 < found["anonymous"] < found["estimate"] < 1000 << 20  # torch alone is over 50 MB
    stages = p.COLLECTING, p.SOLVING, p.CORRECTING, p.CORRECTED
    spent = sum(found["stages"][stage]["cpu"] for stage in stages)
    assert 0 < spent < found["cpu"]
    # Nothing counted twice or missed.
    assert set(found["stages"]) == {*stages, p.REST}
    assert sum(t["wall"] for t in found["stages"].values()) == pytest.approx(found["wall"])
    assert tree["projected_inputs"]["cpu"] == pytest.approx(spent)
    assert measured["cpu"] > 0
    assert "solving" in bench_fit.table(tree)
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
