"""The benchmark of a fit's passes: every figure is there and adds up, and a gradient pass takes the memory of one layer."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import bench_fit
import profile_fit as p
import pytest
from command_line import ENV
from paths import TOOLS
from shapes import KNOWN


@pytest.mark.long
def test_a_tiny_model_gives_every_figure(tmp_path: Path) -> None:
    command = [sys.executable, TOOLS / "bench_fit.py", "--hidden", "256", "--layers", "3", "--vocab", "512", "--double", "--work", tmp_path,
               "--length", "256", "--threads", "1", "--json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, check=False)
    assert done.returncode == 0, done.stderr
    tree = json.loads(done.stdout)
    gradient, measured = tree["model"]["gradient"], tree["model"]["measure"]
    assert (len(gradient["passes"]), len(measured["passes"])) == (2, 1)
    for one in gradient["passes"]:
        assert set(one["stages"]) == {p.PRODUCTS, p.READING, p.LOW_RANK, p.FACTORS, p.ATTENTION, p.SPOOL, p.SOFTMAX, p.REST,
                                      p.HEAD + p.PRODUCTS, p.HEAD + p.READING}  # fmt: skip
        # Nothing counted twice or missed.
        assert sum(t["wall"] for t in one["stages"].values()) == pytest.approx(one["wall"], rel=0.05)
    assert 50e6 < gradient["anonymous"] < gradient["estimate"] < 2e9  # torch alone is over 50 MB
    double = tree["double"]["gradient"]
    assert double["estimate"] - gradient["estimate"] < 1e6
    # The activations of three layers more would be some 35 MB, and their weights in float32 as much as they are.
    assert double["anonymous"] - gradient["anonymous"] < 12e6
    small, large = (tree["projected"][name] for name in ("llama-3-8b", "llama-3-70b"))
    assert large["wall"] > small["wall"] > gradient["passes"][1]["wall"]
    assert large["gpu"]["seconds"] > small["gpu"]["seconds"]
    assert "on paper" in bench_fit.table(tree)
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


@pytest.mark.long
def test_a_fit_by_inputs_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, TOOLS / "bench_fit.py", "--hidden", "256", "--layers", "2", "--vocab", "512", "--kinds", "inputs", "--work",
               tmp_path, "--length", "32", "--tokens", "512", "--max-memory", "1000", "--threads", "1", "--json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, check=False)
    assert done.returncode == 0, done.stderr
    tree = json.loads(done.stdout)
    found, one = tree["model"]["inputs"], tree["model"]["inputs"]["passes"][0]
    assert 50e6 < found["anonymous"] < found["estimate"] < 1000 << 20
    spent = sum(one["stages"][stage]["cpu"] for stage in (p.COLLECTING, p.SOLVING, p.CORRECTING, p.CORRECTED))
    assert 0 < spent < one["cpu"]
    assert tree["projected_inputs"]["cpu"] == pytest.approx(spent)
    assert "solving" in bench_fit.table(tree)


def test_the_projection_of_a_model_to_itself_is_what_was_measured() -> None:
    args = argparse.Namespace(tokens=1024, sequences=8, length=128, tflops=1.0, read=1.0)
    names = p.PRODUCTS, p.READING, p.HEAD + p.PRODUCTS, p.SOFTMAX, p.REST
    stages = {name: {"wall": 1.0, "cpu": 1.0} for name in names}
    projected = bench_fit.project(args, {"gradient": {"passes": [{}, {"stages": stages}]}}, KNOWN["llama-3-8b"])
    small = projected["llama-3-8b"]
    assert (small["wall"], small["cpu"], small["chunks"]) == (5, 5, 1)
    layers, head = bench_fit.weights_of(KNOWN["llama-3-8b"])
    assert small["gpu"]["products"] == pytest.approx(2 * 1024 * (3 * layers + 4 * head) / 1e12)
    assert small["gpu"]["read"] == pytest.approx(2 * (3 * layers + 4 * head) / 1e9)


def test_a_wrong_option_is_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_fit.py", "--sequences", "1"])
    with pytest.raises(SystemExit) as refused:
        bench_fit.main()
    assert refused.value.code == 2
    assert "at least 2" in capsys.readouterr().err
