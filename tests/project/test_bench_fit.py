"""The benchmark of a fit: every figure is there and adds up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import bench_fit
import profile_fit as p
import pytest
from command_line import ENV
from paths import TOOLS


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


def test_a_wrong_option_is_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_fit.py", "--sequences", "1"])
    with pytest.raises(SystemExit) as refused:
        bench_fit.main()
    assert refused.value.code == 2
    assert "at least 2" in capsys.readouterr().err
