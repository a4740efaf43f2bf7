"""Runs of `streamer` in processes of their own."""

import os
import subprocess
import sys

ENV = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}


def run_cli(*args: object, timeout: float = 600, **kwargs) -> subprocess.CompletedProcess[str]:
    """Run `streamer` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "streamer", *map(str, args)], capture_output=True, text=True, timeout=timeout, env=ENV,
        check=False, **kwargs,
    )  # fmt: skip


def process_mib() -> int:
    """Memory that every command takes, in MiB; none accepts a smaller budget."""
    from streamer.plan.plan import PROCESS_BYTES

    return PROCESS_BYTES >> 20
