"""The checks of devices.py, in a process of their own: torch keeps the device that they register."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import seeds

CHECKS = Path(__file__).with_name("devices.py")


@pytest.mark.long
def test_models_mix_no_devices() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--seed",
        str(seeds.RUN),
        str(CHECKS),
    ]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
