"""The benchmark of evaluations: every figure is there and adds up, the peer finds the same losses, and mistakes are explained."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bench_evaluate
import profile_evaluate
import pytest
from shapes import KNOWN
from tool_calls import call_tool


@pytest.mark.long
def test_a_tiny_model_gives_every_figure(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("base",), "come together"),
        (("base", "adapter", "--double"), "leave BASE out"),
        (("--sequences", "1"), "at least 2"),
    ],
)
def test_a_wrong_option_is_explained(
    args: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_evaluate.py", *args])
    with pytest.raises(SystemExit) as refused:
        bench_evaluate.main()
    assert refused.value.code == 2
    assert words in capsys.readouterr().err
