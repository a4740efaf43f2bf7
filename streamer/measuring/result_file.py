"""Write a result in one file, with its run's journal beside it, and check whether it exists or was begun."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from streamer import __version__
from streamer.detection.detect import naming_inputs
from streamer.detection.findings_file import journal_of, lock_of, remove_leftovers
from streamer.detection.options import Run
from streamer.errors import FormatError, InputError, NumericError, OutputError, OutputExistsError
from streamer.events import Event, Monitor
from streamer.linalg.torch_state import full_float32, thread_count, threads
from streamer.measuring.divergences import Floats
from streamer.measuring.identity import differences
from streamer.measuring.statistics import ARRAYS
from streamer.plan.plan import Plan
from streamer.storage.atomic_file import remove_partials
from streamer.storage.files import make_directory
from streamer.storage.journal import Journal, may_resume
from streamer.storage.lock import locked
from streamer.storage.output_checks import (
    check_name,
    check_output_path,
    is_placeholder,
    not_own,
    refuse_address,
    refuse_symlink,
    touch,
)
from streamer.storage.output_plan import refuse_within_output
from streamer.units import counted, listed
from streamer.weights.sealed_file import SealedKind

State = Literal["new", "resume", "done"]

Arrays = Mapping[str, Floats]
"""Sums of a pass, by name."""


@dataclass(frozen=True)
class ResultFile:
    """A file that a run on texts writes at its end.

    Attributes
    ----------
    path
        Path of the file.
    one, same, example
        Words for messages: its kind, such as ``an evaluation``; this result, such as ``this very evaluation``; and a possible file name.
    plan, run
        Plan of the inputs, and options of the run.
    facts
        Inputs and options, with a digest of everything that determines the run; see `with_digest`.
    is_whole
        Tests whether the file at a path is the complete result. Raises `StreamerError` if the file is of another kind, and
        `OutputExistsError` if it belongs to other inputs or options (see `of_others`).
    bits
        Text that distinguishes inputs which differ only in rounding.
    """

    path: Path
    one: str
    same: str
    example: str
    plan: Plan
    run: Run
    facts: Mapping[str, Any]
    is_whole: Callable[[Path], bool]
    bits: str = ""

    @property
    def head(self) -> dict[str, Any]:
        """Make the journal's first record: the run, the names of its sums, and the threads and torch that determine their bits."""
        bits = f"{self.bits} torch {torch.__version__} {' '.join(ARRAYS)}".strip()
        return {"plan": self.facts["plan"], "facts": self.facts, "version": __version__, "stamps": self.plan.detection_stamps(),
                "bits": bits, "threads": torch.get_num_threads()}  # fmt: skip

    def check_path(self) -> None:
        """Refuse a path at which no file can be written."""
        refuse_address(self.path)
        refuse_symlink(self.path)
        if self.path.is_dir():
            raise OutputError(f"{self.path}: is a directory; name a file in it, such as {self.path / self.example}")
        check_output_path(self.path.parent, (), self.path)
        refuse_within_output(self.path)
        check_name(self.path, journal_of(self.path).name + ".0123456789abcdef.partial")

    def state(self) -> State:
        """Check, without writing, whether the result exists, was begun, or is still to be made.

        Raises
        ------
        OutputExistsError
            If the path holds something else, or a result or an interrupted run of other inputs or options, which `overwrite` replaces.
        OutputError, InputChangedError
            If the path is an input, or if another version or other inputs began the run.
        """
        if self.path.exists() and not is_placeholder(self.path):
            with naming_inputs(self.plan, [self.path], self.run.overwrite):
                if self._stands():
                    return "done"
        self.plan.refuse_overwriting([self.path])
        return "resume" if self._may_resume(next(Journal.peek(journal_of(self.path)), {})) else "new"

    def _stands(self) -> bool:
        try:
            return self.is_whole(self.path) and not self.run.overwrite
        except OutputExistsError:
            if self.run.overwrite:
                return False
            raise
        except InputError:
            raise not_own(self.path, self.one) from None

    def _may_resume(self, found: Mapping[str, Any]) -> bool:
        ours = {"plan", "stamps"} <= found.keys() and self.run.resume
        same = found.get("version") == __version__ and "facts" in found
        differing = in_words(differences(self.facts, found["facts"])) if same else ""
        return ours and may_resume(self.path, found, self.head, overwrite=self.run.overwrite,
                                   journal=journal_of(self.path), differing=differing)  # fmt: skip

    @contextlib.contextmanager
    def written(self) -> Iterator[JournalRecords]:
        """Lock the file, open the journal and yield its records; the caller writes the file, and then the journal is removed.

        If the caller raises, the journal stays, unless the inputs are at fault.
        """
        make_directory(self.path.parent)
        with locked(lock_of(self.path), self.path), contextlib.closing(Journal(journal_of(self.path))) as journal:
            found = json.loads(journal[0]) if len(journal) else {}
            resumed = self._may_resume(found)
            if not resumed:
                found = self.head
                journal.begin(found)
            remove_partials(self.path.parent, {self.path.name})
            try:
                yield JournalRecords(journal, thread_count(found.get("threads")))
            except (InputError, NumericError):  # the same run would fail again, so there is nothing to resume
                journal.remove()
                raise
            journal.remove()
        self.run.monitor.told(self.path, "resumed" if resumed else "written")

    def left(self) -> None:
        """Keep a file that is complete, but set its time to now; say so, and remove what a killed run left beside it."""
        monitor = self.run.monitor
        remove_leftovers(self.path)  # from a run that was killed just after it renamed the file
        monitor.emit(Event("note", f"{self.path} holds {self.same} already; nothing to do"))
        if fault := touch([self.path]):
            monitor.emit(Event("warning", f"{fault}: its time stays; `make` may ask for it again"))
        monitor.told(self.path, "present")


def of_others(path: Path, one: str, differing: Sequence[str] = ()) -> OutputExistsError:
    """Make the error for a file that holds a result of other inputs or options, with the differences."""
    return OutputExistsError(
        f"{path}: holds {one} of other inputs or options{in_words(differing)}; choose another output, or pass --overwrite",
        path,
    )


def in_words(differing: Sequence[str]) -> str:
    """Put differences into parentheses."""
    return f" ({listed(differing)})" if differing else ""


def stands(path: Path, kind: SealedKind, facts: Mapping[str, Any], load: Callable[[Path], Any]) -> bool:
    """Test whether the file of a fit or a map is the result of these facts; see `ResultFile.is_whole`."""
    try:
        theirs = load(path).facts
    except FormatError as e:
        if kind.is_at(path):
            raise OutputExistsError(f"{e}, or pass --overwrite", path) from e
        raise
    if theirs.get("plan") != facts["plan"]:  # a sum of maps has none
        raise of_others(path, kind.what, differences(facts, theirs) if {"plan", "configs"} <= theirs.keys() else ())
    return True


def pack(name: str, arrays: Arrays) -> bytes:
    """Pack arrays as a line of JSON with their shapes, followed by their compressed bytes, so that unpacking restores the same bits."""
    head = {"key": name, "shapes": {array: list(values.shape) for array, values in arrays.items()}}
    return b"\n".join(
        [
            json.dumps(head).encode(),
            zlib.compress(b"".join(values.astype("<f8").tobytes() for values in arrays.values()), 1),
        ]
    )


def unpack(payload: bytes) -> tuple[str, dict[str, Floats]]:
    """Unpack the name and arrays from what `pack` returned."""
    line, _, raw = payload.partition(b"\n")
    head, values, at = json.loads(line), np.frombuffer(zlib.decompress(raw), "<f8").astype(np.float64), 0
    arrays = {}
    for name, shape in head["shapes"].items():
        size = int(np.prod(shape, dtype=int))
        arrays[name] = values[at : at + size].reshape(shape)
        at += size
    return head["key"], arrays


class Records:
    """Records of a run without a journal: nothing is kept, because nothing is asked for twice.

    Attributes
    ----------
    taken_up
        Number of passes that an interrupted run recorded; their keys begin with a digit.
    threads
        Number of torch threads with which the run began.
    """

    taken_up = 0

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()

    def find(self, name: str) -> Arrays | None:
        """Find the arrays that an interrupted run recorded under a key."""
        return None

    def add(self, name: str, arrays: Arrays) -> None:
        """Record the results of a pass."""


class JournalRecords(Records):
    """Records in a journal, including an interrupted run's records; each is read only when asked for."""

    def __init__(self, journal: Journal, threads: int) -> None:
        self._journal, self.threads = journal, threads
        self._at = {unpack(journal[i])[0]: i for i in range(1, len(journal))}
        self.taken_up = sum(name[0].isdigit() for name in self._at)

    def find(self, name: str) -> Arrays | None:
        """Find the arrays recorded under a key."""
        at = self._at.get(name)
        return None if at is None else unpack(self._journal[at])[1]

    def add(self, name: str, arrays: Arrays) -> None:
        """Record the results of a pass durably."""
        self._at[name] = len(self._journal)
        self._journal.append(pack(name, arrays))


@contextlib.contextmanager
def computing(count: int, monitor: Monitor) -> Iterator[None]:
    """Compute in full float32, with the number of threads with which the run began; emit a note if torch now has another number."""
    if count != torch.get_num_threads():
        monitor.emit(Event("note", f"goes on with {counted(count, 'thread')}, as it began; --no-resume starts over"))
    with threads(count), full_float32():
        yield
