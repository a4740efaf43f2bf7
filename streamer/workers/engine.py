"""Give tasks to an executor and collect their results; only the caller writes."""

from __future__ import annotations

import contextlib
import queue
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from dataclasses import replace
from typing import Any, TypeVar

from streamer.errors import WorkerError
from streamer.events import Event, Monitor
from streamer.plan.memory_estimate import MemoryEstimate, check_budget
from streamer.workers.task import Found, Task, TaskResult, perform

Key = TypeVar("Key")

AT_ONCE = 1024
"""Most tasks given at a time to an executor of unknown size."""

POLLED = 0.1
"""Seconds between checks for a request to stop."""

PATIENCE = 3.0
"""Seconds without a result before a cluster is asked, and asked again, whether it has workers."""


class Cluster(Executor, ABC):
    """An executor whose workers may join and leave."""

    @abstractmethod
    def lacks(self) -> str:
        """Describe what is missing before a task can run, empty for nothing; called while no result arrives, and after a task was lost.

        Raises
        ------
        WorkerError
            If the cluster will accept no more tasks.
        """


class Workers:
    """Workers, and how much work they get.

    Parameters
    ----------
    opens
        Open an executor; called again after workers die. On exit, stop it if we started it.
    at_once
        Most tasks given out at a time.
    processes
        Number of processes on this machine that share the allowed memory; None if each has its own.
    """

    def __init__(self, opens: Callable[[], contextlib.AbstractContextManager[Executor]],
                 at_once: int = AT_ONCE, processes: int | None = None) -> None:  # fmt: skip
        self._open, self.at_once, self.processes = opens, at_once, processes
        self._opened, self._users = contextlib.ExitStack(), 0
        self._executor: Executor | None = None

    @classmethod
    def of(cls, executor: Executor) -> Workers:
        """Use the caller's executor, which stays open."""
        return cls(lambda: contextlib.nullcontext(executor))

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Keep an executor opened inside the context for all runs there; close it at the end."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._close()

    def _close(self) -> None:
        self._executor = None
        self._opened.close()

    def budget(
        self, max_memory: int | None, own: int, needs: Iterable[MemoryEstimate], computes: bool = False
    ) -> int | None:
        """Divide the allowed memory among this process and the workers on this machine; return the share of each worker.

        Results equal those of a single process that is allowed a worker's share, and they state that amount.

        Parameters
        ----------
        own
            Bytes that this process needs.
        needs
            A worker's steps.
        computes
            Whether this process also needs a share because it runs some of these steps.

        Raises
        ------
        UsageError
            If the memory is too small; the message says how much is needed.
        """
        if self.processes is None or max_memory is None:
            return max_memory
        n = self.processes + computes
        check_budget((replace(e, nbytes=own + n * (-(-e.nbytes >> 20) << 20)) for e in needs), max_memory)
        return (max_memory - own) // n >> 20 << 20

    def run(
        self, tasks: Mapping[Key, Task[Found]], monitor: Monitor, begin: Callable[[Key], None]
    ) -> Generator[tuple[Key, Found], None, None]:
        """Give out tasks in order; yield each task's key and result as results arrive.

        A task whose worker died is run again, once.

        Parameters
        ----------
        begin
            Called before each wait with the key of the task that was given out first.

        Raises
        ------
        WorkerError
            If workers die or cannot be reached repeatedly.
        MismatchError
            If a worker has different inputs.
        """
        waiting, lost, broken = deque(tasks), set[Key](), False
        given: dict[Future[TaskResult], Key] = {}
        arrived: queue.SimpleQueue[Future[TaskResult]] = queue.SimpleQueue()
        with self.kept():
            try:
                while waiting or given:
                    if broken and not given:  # all of its tasks have come back
                        self._close()
                        broken = False
                    if self._executor is None:
                        self._executor = self._opened.enter_context(self._open())
                    executor = self._executor
                    while waiting and not broken and len(given) < self.at_once:
                        key = waiting.popleft()
                        future = _submitted(executor, tasks[key])
                        given[future] = key
                        future.add_done_callback(arrived.put)
                    begin(next(iter(given.values())))
                    future = _next(arrived, executor, monitor)
                    key = given.pop(future)
                    fault = CancelledError("cancelled") if future.cancelled() else future.exception()
                    if fault is None:
                        result = future.result()
                        if result.error is not None:
                            raise result.error
                        monitor.warn(result.warnings)
                        yield key, result.value
                        del future, result  # the caller is done with the result: free its memory
                        continue
                    monitor.checkpoint()  # whatever ended the worker may have asked this process to stop as well
                    _lacks(executor)
                    said = f"{tasks[key].name}: its worker was lost ({type(fault).__name__}: {fault})"
                    if key in lost:
                        raise WorkerError(f"{said} for the second time; the same command resumes here") from fault
                    if not broken:  # warn once for all tasks that the executor had
                        monitor.emit(Event("warning", f"{said}; it is run again"))
                    lost.add(key)
                    waiting.appendleft(key)
                    broken = broken or isinstance(fault, BrokenExecutor)
            finally:
                for future in given:
                    future.cancel()


def _submitted(executor: Executor, task: Task[Any]) -> Future[TaskResult]:
    """Give a task to an executor; if the executor refuses it, return a failed future."""
    try:
        return executor.submit(perform, task)
    except Exception as e:  # each engine has its own exceptions
        failed: Future[TaskResult] = Future()
        failed.set_exception(e)
        return failed


def _next(arrived: queue.SimpleQueue[Future[TaskResult]], executor: Executor, monitor: Monitor) -> Future[TaskResult]:
    """Wait for a task to end or for a request to stop; warn once of each thing that a cluster lacks meanwhile."""
    said, asked = "", time.monotonic()
    while True:
        monitor.checkpoint()
        with contextlib.suppress(queue.Empty):
            return arrived.get(timeout=POLLED)
        if time.monotonic() - asked > PATIENCE:
            lacks = _lacks(executor)
            if lacks and lacks != said:
                monitor.emit(Event("warning", lacks))
            said, asked = lacks, time.monotonic()


def _lacks(executor: Executor) -> str:
    return executor.lacks() if isinstance(executor, Cluster) else ""


def kept(workers: Workers | None) -> contextlib.AbstractContextManager[None]:
    """Keep workers, if there are any, for all runs inside the context; see `Workers.kept`."""
    return contextlib.nullcontext() if workers is None else workers.kept()
