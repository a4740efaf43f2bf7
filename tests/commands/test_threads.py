"""Threads of a command as its process has them."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ENV, run_cli

from streamer.forecast.cores import available_cores
from streamer.linalg import skinny_products

SAY = "import os, torch; print(os.environ.get('OMP_WAIT_POLICY'), torch.get_num_threads())"


def told(*argv: str, **env: str) -> list[str]:
    """What a command leaves in its process: the policy, and torch's threads."""
    code = f"import sys; from streamer.cli.main import run; assert run({[*argv, '--quiet']!r}) == 0; {SAY}"
    clean = {key: value for key, value in ENV.items() if key not in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **env}, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1].split()


@pytest.mark.skipif(shutil.which("lscpu") is None, reason="lscpu is not installed")
def test_only_intels_processors_have_long_rows() -> None:
    cpu = subprocess.run(["lscpu"], capture_output=True, text=True, check=True, env={"LC_ALL": "C"}).stdout
    assert skinny_products._long_rows() == (10_000 if "GenuineIntel" in cpu else math.inf)


@pytest.mark.long
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(job: tuple[Path, Path], tmp_path: Path) -> None:
    argv = ["detect", *map(str, job), "-o", str(tmp_path / "f.safetensors")]
    assert told("inspect", *map(str, job)) == ["PASSIVE", str(available_cores())]
    assert told(*argv, OMP_WAIT_POLICY="ACTIVE", OMP_NUM_THREADS="1") == ["ACTIVE", "1"]
    assert told(*argv, "--threads", "1", GOMP_SPINCOUNT="1000", OMP_NUM_THREADS="2") == ["None", "1"]


def test_there_are_no_more_threads_than_cores(job: tuple[Path, Path], tmp_path: Path) -> None:
    """A script may name the cores of a node, of which a job has got fewer."""
    one = min(os.sched_getaffinity(0))
    line = ("detect", *job, "-o", tmp_path / "f.safetensors", "--threads", 1000)
    done = run_cli(*line, preexec_fn=lambda: os.sched_setaffinity(0, {one}))
    assert done.returncode == 0
    assert "streamer: note: --threads 1000: this process may use 1 core, so it starts 1\n" in done.stderr


def test_the_mask_counts(job: tuple[Path, Path], tmp_path: Path) -> None:
    """As under taskset, Slurm or a container's cpuset."""
    one = min(os.sched_getaffinity(0))
    done = run_cli("detect", "--help", preexec_fn=lambda: os.sched_setaffinity(0, {one}))
    assert "1 here" in " ".join(done.stdout.split())


@pytest.mark.parametrize("command", ["detect", "mitigate", "merge"])
def test_the_help_says_how_many_threads_there_are(command: str) -> None:
    """And that they may be fewer: the note on it, beside other work, comes as no surprise."""
    text = " ".join(run_cli(command, "--help").stdout.split())
    assert (
        f"one per core available to this process, {available_cores()} here; on a busy machine, detection uses fewer threads"
        in text
    )
