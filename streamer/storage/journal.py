"""Keep append-only journals of finished work, from which the next run resumes, and decide whether it may.

Write a file at the end of a run that resumes, beside its lock and journal.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamer.errors import InputChangedError, OutputError, OutputExistsError
from streamer.events import Event, Monitor
from streamer.storage import files
from streamer.storage.atomic_file import remove_partials, write_atomic

FRAME_BYTES = 40
"""Number of bytes before a record's payload: its length (8, little-endian) and SHA-256 (32)."""


class Journal:
    """An append-only file of records that survives a kill: a torn last record is dropped on opening.

    A record is its length (8 bytes, little-endian), the SHA-256 of its payload (32 bytes), and the payload. Each append
    is durable before it returns. The first record is the head: it identifies the journal's run. Open a journal under a lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with files.storage_errors(path, "open the journal"):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            self._spans = [(start, len(payload)) for start, payload in _records(self._fd)]
            self._end = sum(self._spans[-1]) if self._spans else 0
            os.ftruncate(self._fd, self._end)
        self._stale = False
        remove_partials(path.parent, {path.name})

    def foreign(self, record: int) -> OutputError:
        """Make the error for a record that another version wrote."""
        return OutputError(f"{self.path}: its record {record} is of another version; --no-resume starts over")

    @staticmethod
    def peek(path: Path) -> Iterator[dict[str, Any]]:
        """Read a journal's records without changing it: JSON objects, up to the first torn or different record.

        If there is no journal, or not one of ours, yield nothing.
        """
        try:
            with path.open("rb") as f:
                for _, payload in _records(f.fileno()):
                    tree = files.strict_json(payload, surrogates=True)
                    if not isinstance(tree, dict):
                        return
                    yield tree
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return
        except OSError as e:
            raise files.storage_error(path, "read", e) from e

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, i: int) -> bytes:
        start, length = self._spans[i]
        return files.read_bytes(self._fd, length, start)

    def begin(self, head: Mapping[str, Any]) -> None:
        """Start a new run's journal. The old records stay on disk until the head replaces them in one step.

        A kill at any point leaves the old records or the new head, never a journal that belongs to no run.
        """
        self._stale = self._stale or bool(self._spans)
        self._spans.clear()
        self._end = 0
        self.append(json.dumps(head).encode())

    def append(self, payload: bytes) -> None:
        """Add a record durably."""
        frame = len(payload).to_bytes(8, "little") + hashlib.sha256(payload).digest() + payload
        with files.storage_errors(self.path, "append to the journal"):
            if self._stale:
                write_atomic(self.path, frame)
                self.close()
                self._fd = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                self._stale = False
            else:
                done = 0
                while done < len(frame):
                    done += os.pwrite(self._fd, frame[done : done + files.MAX_CALL_BYTES], self._end + done)
                files.sync(self._fd)
                if not self._spans:
                    files.fsync_directory(self.path.parent)  # the name of a new journal must be durable as well
        self._spans.append((self._end + FRAME_BYTES, len(payload)))
        self._end += len(frame)

    def close(self) -> None:
        """Close the file; the journal stays on disk, unless it has no record, as after a full disk."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if not (self._spans or self._stale):
                files.remove_file(self.path)

    def remove(self) -> None:
        """Close and delete the journal of a finished run."""
        self.close()
        files.remove_file(self.path)


def _records(fd: int) -> Iterator[tuple[int, bytes]]:
    """Read the complete records of a journal, up to the first torn one, as offsets and payloads."""
    size, at = os.fstat(fd).st_size, 0
    while at + FRAME_BYTES <= size:
        frame = files.read_bytes(fd, FRAME_BYTES, at)
        length, at = int.from_bytes(frame[:8], "little"), at + FRAME_BYTES
        payload = files.read_bytes(fd, length, at) if length <= size - at else b""
        if len(payload) < length or hashlib.sha256(payload).digest() != frame[8:]:
            return
        yield at, payload
        at += length


def may_resume(path: Path, found: Mapping[str, Any], head: Mapping[str, Any], *, resume: bool = True,
               overwrite: bool = False, journal: Path | None = None, differing: str = "") -> bool:  # fmt: skip
    """Decide whether to resume an interrupted run (True) or to start over (False).

    Parameters
    ----------
    path
        The output, for messages.
    found, head
        Heads of the existing journal and of the new run. ``plan`` is the digest of everything that determines the output, ``version``
        is the tool's, ``stamps`` are the inputs'; ``bits``, if present, distinguishes inputs that differ only in rounding, so that no
        output mixes the two.
    resume, overwrite
        Whether the user allows a run to be resumed, and another run to be replaced.
    journal
        Path of the journal if the output is a single file, for messages.
    differing
        The differences, for messages.

    Raises
    ------
    OutputExistsError
        If the run has another plan and must not be overwritten.
    OutputError
        If another version began it: two versions must not make one output.
    InputChangedError
        If its inputs have changed since.
    """
    if found.get("plan") != head["plan"]:
        if overwrite:
            return False
        run = f"an interrupted run with other inputs or options{differing}"
        said = f"{run} has its journal there" if journal else f"holds {run}"
        raise OutputExistsError(
            f"{path}: {said}; finish that one, choose another output, or pass --overwrite", journal or path
        )
    began, version = found.get("version", ""), head["version"]
    if not resume or found.get("bits", "") != head.get("bits", "") or (overwrite and began != version):
        return False
    if began != version:
        raise OutputError(
            f"{f'{journal}: is of' if journal else f'{path}: holds'} a run that version {began or 'before 0.2'} began, and this is "
            f"{version}; finish it with that version, or pass --no-resume to start it over"
        )
    if found.get("stamps") != json.loads(json.dumps(head["stamps"])):
        raise InputChangedError(
            f"{path}: an input was modified since this run was interrupted; --no-resume starts it over"
        )
    return True


def journal_of(path: Path) -> Path:
    """Return the path of the journal of an unfinished file: ``dir/f.safetensors`` → ``dir/.f.safetensors.journal``."""
    return path.with_name(f".{path.name}.journal")


def lock_of(path: Path) -> Path:
    """Return the path of the lock of an unfinished file: ``dir/f.safetensors`` → ``dir/.f.safetensors.lock``."""
    return path.with_name(f".{path.name}.lock")


def states_of(journal: Path) -> Path:
    """Return the path of the states of a sweep, beside the journal of its run."""
    return journal.with_suffix(".states")


def remove_leftovers(path: Path) -> None:
    """Remove the journal, lock, states and partial files that a killed run left beside a file.

    Raises
    ------
    LockedError
        If a run is active there.
    """
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    if any(p.name.startswith((f".{path.name}.", f"..{path.name}.")) for p in beside):
        with files.locked(lock_of(path), path):
            states = states_of(journal_of(path))
            remove_partials(path.parent, {path.name, journal_of(path).name, states.name})
            journal_of(path).unlink(missing_ok=True)
            states.unlink(missing_ok=True)


def left(path: Path, monitor: Monitor, note: str = "") -> None:
    """Keep a file that is complete, but set its time to now, and remove what a run that was killed just after renaming it left."""
    remove_leftovers(path)
    if note:
        monitor.emit(Event("note", note))
    if fault := files.touch([path]):
        monitor.emit(Event("warning", f"{fault}: its time stays; `make` may ask for it again"))
    monitor.told(path, "present")


@dataclass(frozen=True)
class ResumableFile:
    """A file that a run writes at its end, and the journal beside it from which a killed run resumes.

    Attributes
    ----------
    path
        The file.
    head
        The run's identity, as `may_resume` compares it: the journal's first record.
    resume, overwrite
        Whether the user allows an interrupted run to be resumed, and another run's journal to be replaced.
    records
        Least number of records after the head that make a journal worth resuming.
    differing
        Describes the differences from another run, given its head, for messages.
    """

    path: Path
    head: Mapping[str, Any]
    resume: bool
    overwrite: bool
    records: int = 0
    differing: Callable[[Mapping[str, Any]], str] = lambda _: ""

    def is_begun(self) -> bool:
        """Test, without writing, whether an interrupted run can be resumed; raise what `may_resume` raises."""
        found = next(Journal.peek(journal_of(self.path)), {})
        return self.resume and {"plan", "stamps"} <= found.keys() and may_resume(
            self.path, found, self.head, overwrite=self.overwrite, journal=journal_of(self.path), differing=self.differing(found)
        )  # fmt: skip

    @contextlib.contextmanager
    def begun(self, hopeless: tuple[type[Exception], ...] = ()) -> Iterator[tuple[Journal, bool]]:
        """Lock the file and yield its journal, and whether that is resumed; the block writes the file, and then the journal is removed.

        If the block raises, the journal stays, unless the same run would fail again: at one of the `hopeless` errors.
        """
        files.make_directory(self.path.parent)
        with files.locked(lock_of(self.path), self.path), contextlib.closing(Journal(journal_of(self.path))) as journal:
            states = states_of(journal.path)
            resumed = self.is_begun() and len(journal) > self.records
            if not resumed:
                journal.begin(self.head)
                states.unlink(missing_ok=True)
            remove_partials(self.path.parent, {self.path.name, states.name})
            try:
                yield journal, resumed
            except hopeless:
                journal.remove()
                states.unlink(missing_ok=True)
                raise
            journal.remove()
            states.unlink(missing_ok=True)
