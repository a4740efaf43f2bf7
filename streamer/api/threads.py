"""Choose how a command's threads wait, and how many there are: one for each core of this process, unless they would not help."""

from __future__ import annotations

import os
import time

from streamer.events import Event, Monitor
from streamer.storage.files import available_cores
from streamer.units import counted

SPINNING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables that set how OpenMP's threads wait."""

WORTHLESS = 1.5
"""Several threads are not used if they take this many times as long as one. If they are only not faster, they are still used: the last bits
of findings depend on the number of threads, which should not change between runs."""

ROUNDS, STEPS = 5, 10
"""Turns for each number of threads, and steps in a turn: 0.1 s in total on two idle cores."""

COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables that set the number of threads."""


def wait_passively() -> None:
    """Let OpenMP's idle threads sleep instead of spin, unless the environment says how they wait; call this before importing torch.

    Spinning threads occupy cores that other work needs, and then wait for each other; `tools/bench_shared.py` measures this.
    """
    if not any(name in os.environ for name in SPINNING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def set_threads(count: int | None, monitor: Monitor, elsewhere: bool) -> None:
    """Set torch's number of threads; by default one for each core of this process, unless the environment sets it.

    Parameters
    ----------
    count
        The user's number of threads, or None. More than one for each core would wait for each other (1,000 on two cores take minutes for
        small matrices), so it is reduced, with a note.
    elsewhere
        Whether a cluster computes, whose cores are not known here.
    """
    if count is None and is_count_chosen():
        return
    import torch

    cores = available_cores()
    if count is not None and count > cores and not elsewhere:
        monitor.emit(
            Event("note", f"--threads {count}: this process may use {counted(cores, 'core')}, so it starts {cores}")
        )
        count = cores
    torch.set_num_threads(count or cores)


def choose_threads(count: int | None, monitor: Monitor) -> None:
    """Reduce torch's threads to one for a detection if several would be slower because of other work, unless the user chose a number.

    Parameters
    ----------
    count
        The user's number of threads, or None.
    monitor
        Receives a note if the number is reduced.
    """
    import torch

    if count is not None or is_count_chosen() or (cores := torch.get_num_threads()) == 1:
        return
    if (times := threads_pace(cores)) > WORTHLESS:
        torch.set_num_threads(1)
        text = f"the machine is busy, and {cores} threads take {times:.1f} times as long as one: using one (`--threads {cores}` overrides)"
        monitor.emit(Event("note", text))


def threads_pace(count: int) -> float:
    """Time detection's typical step, products with a block and its orthogonalisation, on `count` threads, relative to one thread.

    The two take turns, and their sums count, because the time waiting for a core matters.
    """
    import torch

    from streamer.linalg.torch_state import threads

    W, block = (torch.randn(1024, n, generator=torch.Generator().manual_seed(0)) for n in (1024, 16))
    seconds = {1: 0.0, count: 0.0}
    for number in (1, count) * ROUNDS:
        with threads(number):
            began = time.perf_counter()
            for _ in range(STEPS):
                torch.linalg.qr(W.T @ (W @ block))
            seconds[number] += time.perf_counter() - began
    return seconds[count] / seconds[1]


def is_count_chosen() -> bool:
    """Test whether the environment sets the number of threads."""
    return any(name in os.environ for name in COUNTS)
