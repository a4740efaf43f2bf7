"""Choose how many threads compute, and open workers: processes on this machine, or workers of Dask or Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any

import torch

from streamer.errors import UsageError, WorkerError
from streamer.events import Monitor
from streamer.packages import require_package
from streamer.storage.files import available_cores
from streamer.units import counted, listed
from streamer.workers import Cluster, Workers

WAITED = 30
"""Seconds to wait for an engine's answer."""


def is_count_chosen() -> bool:
    """Test whether the environment sets the number of threads."""
    return any(name in os.environ for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))


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
    cores = available_cores()
    if count is not None and count > cores and not elsewhere:
        monitor.note(
            f"--threads {count}: this process may use {counted(cores, 'core')}, so it starts {cores}"
        )
        count = cores
    torch.set_num_threads(count or cores)


def open_workers(
    count: int | None, executor: str | None, threads: int | None, monitor: Monitor
) -> Workers | None:
    """Make the workers that the options name, and set torch's threads to the number that each worker has; None if they name no workers.

    Parameters
    ----------
    count
        Number of processes on this machine.
    executor
        ``dask:ADDRESS`` or ``ray:ADDRESS``.
    threads
        Threads of each worker; by default a share of the cores, or one for each task of an engine.
    """
    if executor is not None and count is not None:
        raise UsageError(
            "--workers: starts processes here, --executor uses an engine's workers; give one of them"
        )
    if executor is not None:
        engine, _, address = executor.partition(":")
        if engine not in ENGINES or not address:
            raise UsageError(
                f"--executor: expected dask:ADDRESS or ray:ADDRESS, found {executor!r}"
            )
        _give_threads(threads, 1, f"{engine} tasks have", monitor)
        return Workers(partial(ENGINES[engine], address))
    if count is None:
        return None
    each = max(1, available_cores() // count)
    _give_threads(threads, each, f"{counted(count, 'worker')} with", monitor)
    return Workers(partial(processes, count), 2 * count, count)


def _give_threads(count: int | None, default: int, what: str, monitor: Monitor) -> None:
    """Set torch's threads to the number of a task, on which the last bits of findings depend, and emit a note with the number."""
    if count is None and not is_count_chosen():
        torch.set_num_threads(default)
    monitor.note(
        f"{what} {counted(torch.get_num_threads(), 'thread')} each; --threads sets another number"
    )


@contextlib.contextmanager
def processes(count: int) -> Iterator[Executor]:
    """Start processes; they end at once when the block is left or this process ends for any reason."""
    context = get_context("spawn")
    worker_end, our_end = context.Pipe(duplex=False)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    pool = ProcessPoolExecutor(count, context, _begin_worker, (worker_end,))
    # multiprocessing unblocks SIGINT and SIGTERM.
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    try:
        yield pool
    finally:
        our_end.close()
        pool.shutdown(cancel_futures=True)
        worker_end.close()


def _begin_worker(parent: Connection) -> None:
    """Ignore signals, which the parent process handles, and end when it ends."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)

    def end() -> None:
        with contextlib.suppress(EOFError, OSError):
            parent.recv()
        os._exit(0)

    Thread(target=end, daemon=True, name="streamer parent").start()


@contextlib.contextmanager
def dask(address: str) -> Iterator[Executor]:
    """Connect to Dask's scheduler, given its address or a scheduler file."""
    library = require_package("distributed", (0,), "--executor dask: needs distributed", "dask")
    # Streamer's own line about a lost scheduler is enough.
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    where = {"scheduler_file": address} if address.endswith(".json") else {"address": address}
    try:
        client = library.Client(**where, timeout=WAITED, set_as_default=False)
    except (OSError, ValueError) as e:
        raise WorkerError(
            f"dask:{address}: no scheduler answers there ({e}); check that it runs"
        ) from e
    with client:
        yield DaskExecutor(client, address)


class DaskExecutor(Cluster):
    """Submit calls to the workers of a Dask scheduler."""

    def __init__(self, client: Any, address: str) -> None:
        self._client = client
        self._address = address
        self._executor: Executor = client.get_executor(pure=False, retries=0)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Submit a call."""
        return self._executor.submit(fn, *args, **kwargs)

    def lacks(self) -> str:
        """Return a message if the scheduler has no workers, else an empty string; raise if the scheduler, with its tasks, is lost."""
        gone = f"dask:{self._address}: its scheduler does not answer any more; start one, then run the same command again"
        if self._client.status != "running":
            raise WorkerError(gone)
        try:
            cores = self._client.sync(self._client.scheduler.ncores, callback_timeout=WAITED)
        # A disconnected client has no scheduler.
        except (AttributeError, OSError, RuntimeError) as e:
            raise WorkerError(gone) from e
        return "" if cores else f"dask:{self._address}: has no workers; the run waits for them"


@contextlib.contextmanager
def ray(address: str) -> Iterator[Executor]:
    """Connect to a Ray cluster; `auto` is the cluster that runs on this machine.

    Raises
    ------
    UsageError
        If no node has as many CPUs as a task needs, because tasks would wait forever.
    """
    library = require_package("ray", (0,), "--executor ray: needs ray", "ray")
    try:
        library.init(address=address, log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError) as e:
        raise WorkerError(
            f"ray:{address}: no cluster answers there ({e}); check that it runs"
        ) from e
    try:
        executor = RayExecutor(library, torch.get_num_threads(), address)
        if lacks := executor.lacks():
            raise UsageError(lacks)
        yield executor
    finally:
        library.shutdown()


class RayExecutor(Cluster):
    """Submit calls to Ray as tasks that reserve a number of CPUs."""

    def __init__(self, library: Any, cpus: int, address: str = "auto") -> None:
        self._library = library
        self._cpus = cpus
        self._address = address
        self._remote = library.remote(num_cpus=cpus, max_retries=0)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Submit a call."""
        future: Future[Any] = self._remote(fn).remote(*args, **kwargs).future()
        return future

    def lacks(self) -> str:
        """Return a message if no node has as many CPUs as a task needs, else an empty string."""
        try:
            nodes = self._library.nodes()
        except Exception as e:  # Ray's transport may raise anything
            raise WorkerError(
                f"ray:{self._address}: does not answer any more; start a cluster, then run the same command again"
            ) from e
        cpus = [int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]]
        most = max(cpus, default=0)
        if most >= self._cpus:
            return ""
        advice = f"give --threads {most}, or add such a node" if most else "add such a node"
        have = listed(sorted(cpus, reverse=True)) or "gone"
        return (
            f"ray:{self._address}: a task takes {counted(self._cpus, 'CPU')}, one for each thread, and no node has so many: they have "
            f"{have}; {advice}"
        )


ENGINES: dict[str, Callable[[str], contextlib.AbstractContextManager[Executor]]] = {
    "dask": dask,
    "ray": ray,
}
