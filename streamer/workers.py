"""Run tasks on an executor's workers: each opens the inputs by address, perhaps on another machine; only the caller writes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import queue
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from torch import Tensor

from streamer import __version__
from streamer.adapters.adapter_config import Stated
from streamer.errors import InputError, MismatchError, StorageError, StreamerError, WorkerError
from streamer.events import Event, Monitor
from streamer.linalg.torch_state import task_threads
from streamer.plan.plan import AdapterBatch, MemoryEstimate, check_budget, make_batch
from streamer.storage.checkpoint import IOMode
from streamer.storage.files import difference

Value = TypeVar("Value")

MOST_CACHED = 2
"""Number of inputs, and of values shared by tasks, that a process keeps: the last ones used."""


@dataclass(frozen=True)
class TaskInputs:
    """Addresses of a base and its adapters, how to open them, and their expected identities.

    Attributes
    ----------
    base, adapters
        Absolute paths.
    io, stated, architecture
        As in `run.Run`.
    identities
        Identities of the base and of each adapter, as JSON.
    version
        Version of streamer: another version may round differently.
    """

    base: str
    adapters: tuple[str, ...]
    io: IOMode
    stated: Stated
    architecture: str | None
    identities: tuple[str, ...]
    version: str = __version__

    @classmethod
    def of(
        cls, batch: AdapterBatch, io: IOMode, stated: Stated, architecture: str | None
    ) -> TaskInputs:
        """Describe the inputs of a batch, and how a worker opens them."""
        paths = tuple(os.path.abspath(plan.adapter.path) for plan in batch.plans)
        return cls(
            os.path.abspath(batch.base.path),
            paths,
            io,
            stated,
            architecture,
            _identities(batch),
        )

    def open(self) -> AdapterBatch:
        """Open the inputs.

        Raises
        ------
        MismatchError
            If they cannot be opened here, or differ from the expected inputs, or the version of streamer differs.
        """
        if self.version != __version__:
            wanted = f"expected {self.version}, the caller's version; install that"
            raise MismatchError(f"{worker_name()}: has version {__version__}, {wanted}")
        try:
            batch = make_batch(self.base, self.adapters, self.io, self.stated, self.architecture)
        except (InputError, StorageError) as e:
            raise MismatchError(f"{worker_name()}: {e} (the caller can open it)") from e
        paths = (self.base, *self.adapters)
        for path, expected, identity in zip(
            paths, self.identities, _identities(batch), strict=True
        ):
            if expected != identity:
                differs = difference(json.loads(identity), json.loads(expected))
                what = f"{path} differs from the caller's input ({differs})"
                raise MismatchError(f"{worker_name()}: {what}; give all workers the same files")
        return batch


@dataclass(frozen=True)
class Task(Generic[Value]):
    """The work for a worker, with everything that determines its result; it is pickled.

    Attributes
    ----------
    threads
        Number of torch's threads.
    name
        The task's subject, for messages.
    step
        Does the task with open inputs: a function of a module, or a partial one.
    """

    inputs: TaskInputs
    threads: int
    name: str
    step: Callable[[AdapterBatch, Monitor], Value]


_caches: dict[str, tuple[threading.RLock, dict[Any, Any]]] = {}


def cached_in_process(
    kind: str,
    key: Any,
    make: Callable[[], Value],
    is_valid: Callable[[Value], bool] = lambda _: True,
) -> Value:
    """Return the value that this process has for a key if it is still valid, or make it; the last ones used of a kind are kept."""
    lock, values = _caches.setdefault(kind, (threading.RLock(), {}))
    with lock:
        value: Value | None = values.pop(key, None)
        if value is None or not is_valid(value):
            value = make()
        values[key] = value
        for old in list(values)[:-MOST_CACHED]:
            del values[old]
        return value


class SharedValue(Generic[Value]):
    """A value that many tasks share: pickled once, and unpickled once in each process.

    Attributes
    ----------
    digest
        SHA-256 of its bytes.
    """

    def __init__(self, value: Value) -> None:
        self._data = pickled(value)
        self.digest = hashlib.sha256(self._data).hexdigest()

    @property
    def value(self) -> Value:
        """Return the value, unpickled once in this process."""
        value: Value = cached_in_process("value", self.digest, lambda: pickle.loads(self._data))  # noqa: S301  # our own bytes
        return value


class _Pickler(pickle.Pickler):
    """Pickles only a tensor's own values, not the whole storage of which it is a view."""

    def reducer_override(self, obj: Any) -> Any:
        """Copy a view before pickling it."""
        if isinstance(obj, Tensor) and obj.untyped_storage().nbytes() > obj.nbytes:
            return pickle.loads, (pickle.dumps(obj.detach().clone()),)
        return NotImplemented


def pickled(value: object) -> bytes:
    """Pickle a value; torch would pass its tensors to other processes in shared memory, which ends with the process."""
    file = io.BytesIO()
    _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


@dataclass(frozen=True)
class TaskResult:
    """A task's value and warnings, or the error that ended it.

    A task returns its own error as a value, so an exception raised by a worker always comes from the executor.
    """

    value: Any = None
    warnings: tuple[str, ...] = ()
    error: Exception | None = None


def perform(task: Task[Any]) -> TaskResult:
    """Run a task on its number of threads; the inputs are opened once in a process."""
    warnings: list[str] = []

    def note(event: Event) -> None:
        if event.stage == "warning":
            warnings.append(event.name)

    try:
        with task_threads(task.threads):
            value = task.step(
                cached_in_process("inputs", task.inputs, task.inputs.open, _unchanged),
                Monitor(note),
            )
    except Exception as e:  # the caller raises it; an exception that left this function would look like a dead worker
        try:
            pickle.loads(pickle.dumps(e))  # noqa: S301  # our own bytes
        except Exception:  # pickling may raise anything
            e = RuntimeError(f"{type(e).__name__}: {e}")
        return TaskResult(error=e)
    return TaskResult(value, tuple(warnings))


def _unchanged(batch: AdapterBatch) -> bool:
    """Test whether the files of open inputs are the same as when they were opened."""
    with contextlib.suppress(StreamerError):
        for plan in batch.plans:
            plan.check_unchanged()
        return True
    return False


def _identities(batch: AdapterBatch) -> tuple[str, ...]:
    first = batch.plans[0]
    base = {**first.base_identity, "config": first.config.values}
    identities: Sequence[Any] = [base, *(plan.adapter_identity for plan in batch.plans)]
    return tuple(json.dumps(identity, sort_keys=True) for identity in identities)


def worker_name() -> str:
    """Name this worker, for messages."""
    return f"worker {socket.gethostname()}, process {os.getpid()}"


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

    def __init__(
        self,
        opens: Callable[[], contextlib.AbstractContextManager[Executor]],
        at_once: int = AT_ONCE,
        processes: int | None = None,
    ) -> None:
        self._open = opens
        self.at_once = at_once
        self.processes = processes
        self._opened = contextlib.ExitStack()
        self._users = 0
        self._executor: Executor | None = None

    @classmethod
    def of(cls, executor: Executor) -> Workers:
        """Use the caller's executor, which stays open."""
        return cls(lambda: contextlib.nullcontext(executor))

    @contextlib.contextmanager
    def kept_open(self) -> Iterator[None]:
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
        self, max_memory: int | None, caller_bytes: int, needs: Iterable[MemoryEstimate]
    ) -> int | None:
        """Divide the allowed memory among this process and the workers on this machine; return the share of each worker.

        Results equal those of a single process that is allowed a worker's share, and they state that amount.

        Parameters
        ----------
        caller_bytes
            Bytes that this process needs.
        needs
            A worker's steps.

        Raises
        ------
        UsageError
            If the memory is too small; the message says how much is needed.
        """
        if self.processes is None or max_memory is None:
            return max_memory
        n = self.processes
        check_budget(
            (replace(e, nbytes=caller_bytes + n * (-(-e.nbytes >> 20) << 20)) for e in needs),
            max_memory,
        )
        return (max_memory - caller_bytes) // n >> 20 << 20

    def run(
        self, tasks: Mapping[Key, Task[Value]], monitor: Monitor, begin: Callable[[Key], None]
    ) -> Generator[tuple[Key, Value], None, None]:
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
        waiting = deque(tasks)
        lost = set[Key]()
        broken = False
        running: dict[Future[TaskResult], Key] = {}
        arrived: queue.SimpleQueue[Future[TaskResult]] = queue.SimpleQueue()
        with self.kept_open():
            try:
                while waiting or running:
                    if broken and not running:  # all of its tasks have come back
                        self._close()
                        broken = False
                    if self._executor is None:
                        self._executor = self._opened.enter_context(self._open())
                    executor = self._executor
                    while waiting and not broken and len(running) < self.at_once:
                        key = waiting.popleft()
                        future = _submitted(executor, tasks[key])
                        running[future] = key
                        future.add_done_callback(arrived.put)
                    begin(next(iter(running.values())))
                    future = _next(arrived, executor, monitor)
                    key = running.pop(future)
                    fault = (
                        CancelledError("cancelled") if future.cancelled() else future.exception()
                    )
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
                    said = (
                        f"{tasks[key].name}: its worker was lost ({type(fault).__name__}: {fault})"
                    )
                    if key in lost:
                        raise WorkerError(
                            f"{said} for the second time; the same command resumes here"
                        ) from fault
                    if not broken:  # warn once for all tasks that the executor had
                        monitor.emit(Event("warning", f"{said}; it is run again"))
                    lost.add(key)
                    waiting.appendleft(key)
                    broken = broken or isinstance(fault, BrokenExecutor)
            finally:
                for future in running:
                    future.cancel()


def _submitted(executor: Executor, task: Task[Any]) -> Future[TaskResult]:
    """Give a task to an executor; if the executor refuses it, return a failed future."""
    try:
        return executor.submit(perform, task)
    except Exception as e:  # each engine has its own exceptions
        failed: Future[TaskResult] = Future()
        failed.set_exception(e)
        return failed


def _next(
    arrived: queue.SimpleQueue[Future[TaskResult]], executor: Executor, monitor: Monitor
) -> Future[TaskResult]:
    """Wait for a task to end or for a request to stop; warn once of each thing that a cluster lacks meanwhile."""
    last_lack = ""
    asked_at = time.monotonic()
    while True:
        monitor.checkpoint()
        with contextlib.suppress(queue.Empty):
            return arrived.get(timeout=POLLED)
        if time.monotonic() - asked_at > PATIENCE:
            lack = _lacks(executor)
            if lack and lack != last_lack:
                monitor.emit(Event("warning", lack))
            last_lack = lack
            asked_at = time.monotonic()


def _lacks(executor: Executor) -> str:
    return executor.lacks() if isinstance(executor, Cluster) else ""


def kept_open(workers: Workers | None) -> contextlib.AbstractContextManager[None]:
    """Keep workers, if there are any, for all runs inside the context; see `Workers.kept_open`."""
    return contextlib.nullcontext() if workers is None else workers.kept_open()
