"""Choose the threads of a command: how they wait, and how many there are: one for each core of this process, where they help."""

from __future__ import annotations

import os

from streamer.errors import UsageError
from streamer.events import Event, Monitor
from streamer.forecast.cores import available_cores

SPINNING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""By any of these the user says how OpenMP's threads wait."""

WORTHLESS = 1.5
"""Threads that take this many times as long as one alone are not used. Where they only help nothing they are: the last bits of findings
depend on their number, which had better not change from one run to the next."""

COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""By any of these the user says how many there are."""


def wait_passively() -> None:
    """Let OpenMP's idle threads sleep instead of spin, unless the user has said how they wait; before torch is imported.

    Spinning threads hold the cores that other work wants, and then wait for one another: `tools/bench_shared.py` measures it.
    """
    if not any(name in os.environ for name in SPINNING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def set_threads(count: int | None) -> None:
    """Give torch this many threads; without a count one for each core of this process, unless the user's environment says how many."""
    if count is None and is_count_chosen():
        return
    if count is not None and count < 1:
        raise UsageError(f"--threads: expected a number from 1, found {count}")
    import torch

    torch.set_num_threads(available_cores() if count is None else count)


def choose_threads(count: int | None, monitor: Monitor) -> None:
    """Give torch the threads for a detection that nobody has said the number of: one where more take longer, beside other work.

    Parameters
    ----------
    count
        As the user gives it.
    monitor
        Is told where there are fewer than cores.
    """
    import torch

    if count is not None or is_count_chosen() or (cores := torch.get_num_threads()) == 1:
        return
    from streamer.forecast.calibration import threads_pace

    if (times := threads_pace(cores)) > WORTHLESS:
        torch.set_num_threads(1)
        text = f"the machine is busy, and {cores} threads take {times:.1f} times as long as one: using one (`--threads {cores}` overrides)"
        monitor.emit(Event("note", text))


def is_count_chosen() -> bool:
    """Say whether the user's environment tells how many threads there are."""
    return any(name in os.environ for name in COUNTS)
