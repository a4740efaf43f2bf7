"""The benchmark of workers: every figure is there, and the bytes are those of one process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from command_line import ENV
from paths import TOOLS


@pytest.mark.long
def test_a_tiny_model_gives_every_figure() -> None:
    options = ["--hidden", "192", "--engines", "processes", "--workers", "1", "--json"]
    done = subprocess.run(
        [sys.executable, TOOLS / "bench_workers.py", *options], capture_output=True, text=True, env=ENV, check=False
    )
    assert done.returncode == 0, done.stderr
    alone, worker = json.loads(done.stdout)["rows"]
    assert set(alone) == {"engine", "workers", "seconds"}
    assert worker["equal"] is True
    assert 0 < worker["task_seconds"] < worker["start_seconds"]
