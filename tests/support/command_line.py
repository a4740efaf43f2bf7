"""Runs of `streamer` in processes of their own."""

import os
import subprocess
import sys
from collections.abc import Iterable

ENV = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}


METHODS = {"--method", "--map", "--coefficients"}


def with_method(argv: Iterable[object]) -> list[str]:
    """Add `--method paper` to a `mitigate` or `merge` that names no method, for tests of other things."""
    words = [*map(str, argv)]
    if (
        words[:1] in (["mitigate"], ["merge"])
        and METHODS.isdisjoint(words)
        and " --lambda 1 " not in f" {' '.join(words)} "
    ):
        words += ["--method", "paper"]
    return words


def run_cli(*args: object, timeout: float = 600, **kwargs) -> subprocess.CompletedProcess[str]:
    """Run `streamer` in a process of its own; see `with_method`."""
    return subprocess.run(
        [sys.executable, "-m", "streamer", *with_method(args)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=ENV,
        check=False,
        **kwargs,
    )


def process_mib() -> int:
    """Memory that every command takes, in MiB; none accepts a smaller budget."""
    from streamer.plan.plan import PROCESS_BYTES

    return PROCESS_BYTES >> 20
