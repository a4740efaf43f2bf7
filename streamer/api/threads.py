"""Choose how a command's threads wait, and how many there are: one for each core of this process."""

from __future__ import annotations

import os

from streamer.events import Event, Monitor
from streamer.storage.files import available_cores
from streamer.units import counted

SPINNING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables that set how OpenMP's threads wait."""

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


def is_count_chosen() -> bool:
    """Test whether the environment sets the number of threads."""
    return any(name in os.environ for name in COUNTS)
