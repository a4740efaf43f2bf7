"""Run a task as a worker does: from the inputs' addresses, in a process that may be on another machine."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from streamer import __version__
from streamer.adapters.adapter import NoAdapter
from streamer.adapters.adapter_config import Stated
from streamer.errors import InputError, MismatchError, StorageError, StreamerError
from streamer.events import Event, Monitor
from streamer.linalg.torch_state import task_threads
from streamer.plan.base_plan import make_base_plan
from streamer.plan.batch import AdapterBatch, make_batch
from streamer.plan.plan import Plan
from streamer.storage.identities import difference
from streamer.storage.tensor_file import IOMode

Found = TypeVar("Found")

KEPT = 2
"""Number of inputs, and of values shared by tasks, that a process keeps: the last ones used."""


@dataclass(frozen=True)
class Inputs:
    """Addresses of a base and its adapters, how to open them, and their expected identities.

    Attributes
    ----------
    base, adapters
        Absolute paths; no adapters for a run on the base alone.
    io, stated, architecture
        As in `detection.options.Run`.
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
    def of(cls, batch: AdapterBatch, io: IOMode, stated: Stated, architecture: str | None) -> Inputs:
        """Describe the inputs of a batch, and how it was opened."""
        paths = [os.path.abspath(plan.adapter.path) for plan in _adapted(batch)]
        return cls(os.path.abspath(batch.base.path), tuple(paths), io, stated, architecture, _identities(batch))

    def open(self) -> AdapterBatch:
        """Open the inputs.

        Raises
        ------
        MismatchError
            If they cannot be opened here, or differ from the expected inputs, or the version of streamer differs.
        """
        if self.version != __version__:
            raise MismatchError(
                f"{worker_name()}: has version {__version__}, expected {self.version}, the caller's version; install that"
            )
        try:
            if self.adapters:
                batch = make_batch(self.base, self.adapters, self.io, self.stated, self.architecture)
            else:
                alone = make_base_plan(self.base, self.io, self.architecture)
                batch = AdapterBatch(alone.base, (alone,))
        except (InputError, StorageError) as e:
            raise MismatchError(f"{worker_name()}: {e} (the caller can open it)") from e
        paths = (self.base, *self.adapters)
        for path, theirs, mine in zip(paths, self.identities, _identities(batch), strict=True):
            if theirs != mine:
                differs = difference(json.loads(mine), json.loads(theirs))
                raise MismatchError(
                    f"{worker_name()}: {path} differs from the caller's input ({differs}); give all workers the same files"
                )
        return batch


@dataclass(frozen=True)
class Task(ABC, Generic[Found]):
    """The work for a worker, with everything that determines its result; it is pickled.

    Attributes
    ----------
    threads
        Number of torch's threads.
    """

    inputs: Inputs
    threads: int

    @property
    @abstractmethod
    def name(self) -> str:
        """Name the task's subject, for messages."""

    @abstractmethod
    def do(self, batch: AdapterBatch, monitor: Monitor) -> Found:
        """Do the task with open inputs."""


class Packed(Generic[Found]):
    """A value pickled to bytes here, not by the executor; reading it makes a copy, even in the same process."""

    def __init__(self, value: Found) -> None:
        file = io.BytesIO()
        _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
        self._data = file.getvalue()

    def __len__(self) -> int:
        return len(self._data)

    @property
    def value(self) -> Found:
        """Unpickle a copy."""
        value: Found = pickle.loads(self._data)  # noqa: S301  # our own bytes
        return value


class Carried(Packed[Found]):
    """A value that many tasks share: pickled once, and unpickled once in each process.

    Attributes
    ----------
    digest
        SHA-256 of its bytes.
    """

    def __init__(self, value: Found) -> None:
        super().__init__(value)
        self.digest = hashlib.sha256(self._data).hexdigest()

    @property
    def value(self) -> Found:
        """Return the value, unpickled once in this process."""
        found = _values.get(self.digest)
        if found is None:
            found = _values[self.digest] = super().value
            keep_last(_values)
        value: Found = found
        return value


class _Pickler(pickle.Pickler):
    """Pickles only a tensor's own values, not the whole storage of which it is a view."""

    def reducer_override(self, obj: Any) -> Any:
        """Copy a view before pickling it."""
        if isinstance(obj, Tensor) and obj.untyped_storage().nbytes() > obj.nbytes:
            return pickle.loads, (pickle.dumps(obj.detach().clone()),)
        return NotImplemented


_values: dict[str, Any] = {}


def keep_last(held: dict[Any, Any]) -> None:
    """Drop all entries that a process keeps except the last ones added."""
    for old in list(held)[:-KEPT]:
        held.pop(old, None)


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
        with task_threads(task.threads), _opened(task.inputs) as batch:
            value = task.do(batch, Monitor(note))
    except Exception as e:  # the caller raises it; an exception that left this function would look like a dead worker
        return TaskResult(error=_portable(e))
    return TaskResult(value, tuple(warnings))


_batches: dict[Inputs, AdapterBatch] = {}
_opening = threading.Lock()


@contextlib.contextmanager
def _opened(inputs: Inputs) -> Iterator[AdapterBatch]:
    """Open inputs, or reuse those that this process has open unless their files have changed."""
    with _opening:
        batch = _batches.pop(inputs, None)
        try:
            for plan in () if batch is None else batch.plans:
                plan.check_unchanged()
        except StreamerError:
            batch = None
        if batch is None:
            batch = inputs.open()
        _batches[inputs] = batch
        keep_last(_batches)
    yield batch


def _identities(batch: AdapterBatch) -> tuple[str, ...]:
    first = batch.plans[0]
    base = {**first.base_identity, "config": first.config.values}
    identities: Sequence[Any] = [base, *(plan.adapter_identity for plan in _adapted(batch))]
    return tuple(json.dumps(identity, sort_keys=True) for identity in identities)


def _adapted(batch: AdapterBatch) -> list[Plan]:
    """List the plans that have an adapter: one of a base alone has none."""
    return [plan for plan in batch.plans if not isinstance(plan.adapter, NoAdapter)]


def worker_name() -> str:
    """Name this worker, for messages."""
    return f"worker {socket.gethostname()}, process {os.getpid()}"


def _portable(e: Exception) -> Exception:
    """Return the error, or its text if it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(e))  # noqa: S301  # our own bytes
    except Exception:  # pickling may raise anything
        return RuntimeError(f"{type(e).__name__}: {e}")
    return e
