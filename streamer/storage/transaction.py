"""Write files and output directories as resumable transactions: check the path, journal what is finished, resume or start over.

During a run the directory contains ``.streamer.lock`` and ``.streamer.journal``; the file that makes the output
loadable (the last of the plan's names) comes last. Then the record ``streamer.json`` replaces the journal. It says what was
made from what, so that a rerun knows that nothing is left to do. A file's size and digest are journalled *before* it is
renamed: after a kill, a file whose final name matches its entry is finished, and everything else is done again.

Where a finished output is replaced, all of this happens in ``.streamer.new`` inside it, up to the record. Once that is journalled, the new
files are complete, and they are renamed into place (`OutputDirectory._replace`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from streamer.errors import (
    InputChangedError,
    OutputError,
    OutputExistsError,
    StorageError,
    UsageError,
)
from streamer.events import Event, Monitor
from streamer.storage import atomic_file, files
from streamer.storage.atomic_file import AtomicFile
from streamer.units import format_sizes, listed

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
        atomic_file.remove_partials(path.parent, {path.name})

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

    def part(self, i: int, start: int, stop: int) -> bytes:
        """Read the bytes ``[start, stop)`` of a record."""
        at, length = self._spans[i]
        return files.read_bytes(self._fd, min(stop, length) - start, at + start)

    def begin(self, head: Mapping[str, Any]) -> None:
        """Start a new run's journal. The old records stay on disk until the head replaces them in one step.

        A kill at any point leaves the old records or the new head, never a journal that belongs to no run.
        """
        self._stale = self._stale or bool(self._spans)
        self._spans.clear()
        self._end = 0
        self.append(json.dumps(head).encode())
        states_of(self.path).unlink(missing_ok=True)

    def append(self, payload: bytes) -> None:
        """Add a record durably."""
        frame = len(payload).to_bytes(8, "little") + hashlib.sha256(payload).digest() + payload
        with files.storage_errors(self.path, "append to the journal"):
            if self._stale:
                atomic_file.write_atomic(self.path, frame)
                self.close()
                self._fd = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                self._stale = False
            else:
                done = 0
                while done < len(frame):
                    done += os.pwrite(
                        self._fd, frame[done : done + files.MAX_CALL_BYTES], self._end + done
                    )
                files.sync(self._fd)
                if not self._spans:
                    files.fsync_directory(
                        self.path.parent
                    )  # the name of a new journal must be durable as well
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
        """Close and delete the journal of a finished run, and the states of its sweep."""
        self.close()
        files.remove_file(self.path)
        states_of(self.path).unlink(missing_ok=True)


def _records(fd: int) -> Iterator[tuple[int, bytes]]:
    """Read the complete records of a journal, up to the first torn one, as offsets and payloads."""
    size = os.fstat(fd).st_size
    at = 0
    while at + FRAME_BYTES <= size:
        frame = files.read_bytes(fd, FRAME_BYTES, at)
        length = int.from_bytes(frame[:8], "little")
        at += FRAME_BYTES
        payload = files.read_bytes(fd, length, at) if length <= size - at else b""
        if len(payload) < length or hashlib.sha256(payload).digest() != frame[8:]:
            return
        yield at, payload
        at += length


def may_resume(
    path: Path,
    begun: Mapping[str, Any],
    head: Mapping[str, Any],
    *,
    resume: bool = True,
    overwrite: bool = False,
    journal: Path | None = None,
    differing: str = "",
) -> bool:
    """Decide whether to resume an interrupted run (True) or to start over (False).

    Parameters
    ----------
    path
        The output, for messages.
    begun, head
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
    if begun.get("plan") != head["plan"]:
        if overwrite:
            return False
        run = f"an interrupted run with other inputs or options{differing}"
        said = f"{run} has its journal there" if journal else f"holds {run}"
        raise OutputExistsError(
            f"{path}: {said}; finish that one, choose another output, or pass --overwrite",
            journal or path,
        )
    began = begun.get("version", "")
    version = head["version"]
    if (
        not resume
        or begun.get("bits", "") != head.get("bits", "")
        or (overwrite and began != version)
    ):
        return False
    if began != version:
        holds_run = f"{journal}: is of a run" if journal else f"{path}: holds a run"
        what = f"{holds_run} that version {began or 'before 0.2'} began, and this is {version}"
        raise OutputError(
            f"{what}; finish it with that version, or pass --no-resume to start it over"
        )
    if begun.get("stamps") != json.loads(json.dumps(head["stamps"])):
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
            atomic_file.remove_partials(
                path.parent, {path.name, journal_of(path).name, states.name}
            )
            journal_of(path).unlink(missing_ok=True)
            states.unlink(missing_ok=True)


def touch_finished(path: Path, monitor: Monitor, note: str = "") -> None:
    """Keep a file that is complete, but set its time to now, and remove what a run that was killed just after renaming it left."""
    remove_leftovers(path)
    if note:
        monitor.note(note)
    touch([path], monitor)
    monitor.outputs[path] = "present"


def touch(paths: Sequence[Path], monitor: Monitor) -> None:
    """Set the times of finished files to now, so that `make` considers them newer than their inputs; warn if the system refuses."""
    try:
        for path in paths:
            os.utime(path)
    except OSError as e:
        monitor.emit(
            Event(
                "warning",
                f"{e.filename}: {e.strerror or e}: its time stays; `make` may ask for it again",
            )
        )


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
        head = next(Journal.peek(journal_of(self.path)), {})
        return (
            self.resume
            and {"plan", "stamps"} <= head.keys()
            and may_resume(
                self.path,
                head,
                self.head,
                overwrite=self.overwrite,
                journal=journal_of(self.path),
                differing=self.differing(head),
            )
        )

    @contextlib.contextmanager
    def begun(self, hopeless: tuple[type[Exception], ...] = ()) -> Iterator[tuple[Journal, bool]]:
        """Lock the file and yield its journal, and whether that is resumed; the block writes the file, and then the journal is removed.

        If the block raises, the journal stays, unless the same run would fail again: at one of the `hopeless` errors.
        """
        files.make_directory(self.path.parent)
        with (
            files.locked(lock_of(self.path), self.path),
            contextlib.closing(Journal(journal_of(self.path))) as journal,
        ):
            resumed = self.is_begun() and len(journal) > self.records
            if not resumed:
                journal.begin(self.head)
            atomic_file.remove_partials(
                self.path.parent, {self.path.name, states_of(journal.path).name}
            )
            try:
                yield journal, resumed
            except hopeless:
                journal.remove()
                raise
            journal.remove()


def refuse_symlink(path: Path) -> None:
    """Refuse an output that is a symlink."""
    if path.is_symlink():
        raise OutputError(
            f"{path}: is a symlink, and writing never follows one; name its target {os.path.realpath(path)}"
        )


def refuse_address(path: Path) -> None:
    """Refuse an output given as ``-``, or as a URL like ``s3://bucket/name``, which would become directories here."""
    if path == Path("-"):
        raise UsageError(
            f"{path}: expected a path, found the sign for stdout: outputs are resumable files; name one (--json prints to stdout)"
        )
    scheme = re.fullmatch(r"[a-z][a-z0-9+.-]+:", path.parts[0] if path.parts else "")
    if scheme and not os.path.lexists(path.parts[0]):
        raise UsageError(
            f"{path}: is an address, and outputs are written to disks; write to a directory and upload it"
        )


def is_placeholder(path: Path) -> bool:
    """Test whether an empty regular file is here, as ``mktemp`` and workflow systems create one for a future output."""
    found = _stat(path)
    return found is not None and stat.S_ISREG(found.st_mode) and found.st_size == 0


def _stat(path: Path) -> os.stat_result | None:
    with contextlib.suppress(OSError):
        return path.stat(follow_symlinks=False)
    return None


def is_taken(path: Path) -> bool:
    """Test whether a new file's name is taken; an empty file is a placeholder and does not count."""
    return path.exists() and not is_placeholder(path)


def check_replaced(path: Path, overwrite: bool, is_own: Callable[[Path], bool], what: str) -> None:
    """Refuse a file's path if another file exists there, and create its directory.

    Parameters
    ----------
    overwrite
        Whether to replace an existing file of this kind; other files are never replaced unless empty.
    is_own
        Tests whether a file may be replaced.
    what
        Name of that kind of file, for messages.
    """
    _refuse_as_file(path)
    if path.exists() and path.stat().st_size > 0:
        if not overwrite:
            raise OutputExistsError(
                f"{path}: exists; choose another output, or pass overwrite=True", path
            )
        if not is_own(path):
            raise not_own(path, what)
    files.make_directory(path.parent)


def _refuse_as_file(path: Path, example: str = "", what: str = "file") -> None:
    """Refuse an address, a symlink or a directory instead of a file to write; `example` is a possible name."""
    refuse_address(path)
    refuse_symlink(path)
    if path.is_dir():
        such = f", such as {path / example}" if example else ""
        raise OutputError(f"{path}: is a directory; name a {what} in it{such}")


def check_file_path(path: Path, example: str, longest: str, what: str = "file") -> None:
    """Refuse a path at which no file can be written: an address, a directory, a symlink, inside a hub cache.

    Parameters
    ----------
    example, what
        A possible name, and the kind of file, for messages.
    longest
        The longest name beside it, whose partial file must have a possible name, too.
    """
    _refuse_as_file(path, example, what)
    check_output_path(path.parent.resolve(), (), path)
    check_name(path, atomic_file.partial_name(longest))


def not_own(path: Path, what: str) -> OutputExistsError:
    """Make the error for an output of a kind that this command does not replace."""
    return _foreign(path, f"exists and is not {what}, and no other file is replaced")


def _foreign(path: Path, what: str = "exists and is not ours") -> OutputExistsError:
    return OutputExistsError(f"{path}: {what}; choose another output, or move it away", path)


def holds(path: Path, what: str) -> OutputExistsError:
    """Make the error for an output that holds something else, which the user may allow to be replaced."""
    return OutputExistsError(
        f"{path}: holds {what}; choose another output, or pass --overwrite", path
    )


def check_output_path(path: Path, inputs: Sequence[Path], output: Path | None = None) -> None:
    """Refuse an output that is a symlink or an input, is inside an input or a hub cache, or cannot be written.

    Parameters
    ----------
    path
        Directory to write to.
    inputs
        Input directories and files that must not contain the output.
    output
        The output as the user named it, for messages, if it is a file in the directory.
    """
    refuse_symlink(path)
    refuse_address(path)
    real = Path(os.path.realpath(path))
    path = output or path
    for source in inputs:
        inside = Path(os.path.realpath(source))
        if _same(real, inside):
            raise OutputError(f"{path}: is the input {source}; choose another output")
        if any(_same(parent, inside) for parent in real.parents):
            raise OutputError(
                f"{path}: lies inside the input {source}; choose an output outside it"
            )
        if any(_same(real, parent) for parent in inside.parents):
            raise OutputError(f"{path}: contains the input {source}; choose an output beside it")
    for parent in (real, *real.parents):
        if parent.name.startswith(("models--", "datasets--", "spaces--")) and any(
            (parent / part).is_dir() for part in ("blobs", "refs", "snapshots")
        ):
            raise OutputError(
                f"{path}: lies inside a hub cache, which is never written to; choose another output"
            )
    if nowhere := next((p for p in path.parents if p.is_symlink() and not p.exists()), None):
        raise OutputError(f"{path}: {nowhere} is a link that leads nowhere; choose another output")
    there = _existing(real.parent if is_placeholder(real) else real)
    if not there.is_dir():
        what = "is" if os.path.realpath(path) == str(there) else f"{there} is"
        raise OutputError(
            f"{path}: {what} a file, not a directory; choose another output, or move the file away"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: {there} is not writable; choose another output")


def check_name(path: Path, longest: str) -> None:
    """Refuse an output if a file, even a temporary one, would get a name longer than the file system allows."""
    most = os.pathconf(_existing(path.parent), "PC_NAME_MAX")
    found = len(os.fsencode(longest))
    if 0 < most < found:
        sizes = f"with what a partial file adds it has {found} bytes, the file system takes {most}"
        raise OutputError(f"{path}: its name is too long: {sizes}; choose a shorter name")


def free_bytes(path: Path) -> int:
    """Return the free bytes on the disk of a path, which need not exist."""
    return shutil.disk_usage(_existing(path)).free


def check_space(path: Path, needed: int, at_most: bool = False) -> None:
    """Refuse a plan that does not fit on the disk; `at_most` means that less may be needed."""
    free = free_bytes(path)
    if needed > free:
        wanted, found = format_sizes(needed, free)
        what = f"needs {'up to ' if at_most else ''}{wanted}, the disk has {found} free"
        raise StorageError(f"{path}: {what}; free some space, or choose another disk")


def allocated_bytes(path: Path) -> int:
    """Return the bytes on disk that removing a file would free; 0 if there is none."""
    return 0 if (found := _stat(path)) is None else found.st_blocks * 512


def _same(a: Path, b: Path) -> bool:
    """Test whether two paths are the same, also by device and inode: a mount shows a directory under a second name."""
    return a == b or (a.exists() and b.exists() and a.samefile(b))


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.parents) if p.exists())


OLD = "old"
"""Key of a journal's head: files that existed before the run."""

PLANNED_NAMES = "names"
"""Key of a journal's head: names of files to come."""


@dataclass(frozen=True)
class OldFile:
    """Relative name, size and SHA-256 (hex) of a file as an earlier run wrote it, as in records and journals."""

    file: str
    bytes: int
    sha256: str


def own_files(record: Path, journal: Path) -> list[OldFile]:
    """List the files of earlier outputs, finished or not, in the order of writing, from their record and journal.

    A journal's head names the files from before its run; until that run has finished, they may still exist.
    """
    head, *finished = [*Journal.peek(journal)] or [{}]
    lists = ((record_at(record) or {}).get("files"), head.get(OLD), finished)
    return list(dict.fromkeys(file for entries in lists for file in as_files(entries)))


def as_files(entries: Any) -> list[OldFile]:
    """Convert a list from JSON to the files that its entries describe; an entry of another kind describes none."""
    described = []
    for entry in entries if isinstance(entries, list) else ():
        match entry:
            case {"file": str(name), "bytes": int(nbytes), "sha256": str(digest)} if (
                type(nbytes) is int
            ):
                described.append(OldFile(name, nbytes, digest))
    return described


def remove_own_files(directory: Path, old: Sequence[OldFile], keep: Collection[str]) -> None:
    """Remove the unchanged files of an earlier output, starting with the last, which makes it loadable.

    Parameters
    ----------
    keep
        Names that the new output will replace in one step.

    Raises
    ------
    StorageError
        If the system refuses.
    """
    for file in reversed(old):
        path = directory / file.file
        if file.file in keep or not is_unchanged(directory, file):
            continue
        files.remove_file(path)
        for parent in path.relative_to(directory).parents[:-1]:
            with contextlib.suppress(OSError):  # it contains other files
                (directory / parent).rmdir()


def is_unchanged(directory: Path, file: OldFile) -> bool:
    """Test whether a file exists unchanged, under a plain name in the directory, with no symlink in its path."""
    path = directory / file.file
    if not _is_within(directory, file.file):
        return False
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size != file.bytes:
            return False
        return (
            _digest(path, (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns))
            == file.sha256
        )
    except OSError:
        return False


@lru_cache(maxsize=1024)
def _digest(path: Path, stamp: tuple[int, ...]) -> str:
    """Compute the SHA-256 (hex) of a file's bytes. Cached, because preflight, lock and removal each need it."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _is_within(directory: Path, name: str) -> bool:
    """Test whether a name stays in the directory, with no symlink in its path: ``a/b`` does, ``../b`` and ``/b`` do not."""
    plain = PurePosixPath(name)
    paths = [directory / plain, *(directory / parent for parent in plain.parents[:-1])]
    return not (
        plain.is_absolute()
        or ".." in plain.parts
        or "\0" in name
        or any(map(os.path.islink, paths))
    )


def record_at(path: Path) -> dict[str, Any] | None:
    """Read the record of an output; None if there is none."""
    try:
        tree = files.strict_json(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError):
        return None
    if isinstance(tree, dict) and str(tree.get("schema")).startswith("streamer.output/"):
        return tree
    return None


RECORD_NAME = "streamer.json"
JOURNAL_NAME = ".streamer.journal"
LOCK_NAME = ".streamer.lock"
STAGE_NAME = ".streamer.new"
"""Directory in a finished output with the files that are to replace it."""


def refuse_within_output(path: Path) -> None:
    """Refuse a new file or directory inside a complete output, whose record lists everything that belongs there."""
    real = Path(os.path.realpath(path))
    for parent in (real, *real.parents):
        if record_at(parent / RECORD_NAME) is not None:
            raise OutputError(
                f"{path}: lies inside the output {parent}, which is complete: its {RECORD_NAME} lists its files; choose another path"
            )


@dataclass(frozen=True)
class OutputPlan:
    """Files of an output directory to write, with everything that determines their bytes.

    Attributes
    ----------
    path
        The directory.
    files
        (relative name, bytes) in the order of writing; the last one is the commit point.
    digest
        SHA-256 (hex) over everything that determines the output's bytes: inputs, options, names.
    stamps
        Stamps of the inputs; a resumed run must find the same stamps.
    inputs
        Input directories that must not contain the output.
    conflicting_names
        Names of files that a loader might prefer to ours, such as ``model.safetensors`` beside an index, or would read as parts of the
        output. They must not exist, unless they belong to an old output and are removed with it.
    temporary
        (relative name, largest size in bytes) of files that exist only during the run.
    editable
        Names of files that users may edit: an output with an edited one counts as complete, and no edited one is replaced or removed.
    bits
        Distinguishes inputs that differ only in rounding. A finished output of either counts as this one; an interrupted run with the
        other is started over, so that no output mixes the two.
    version
        The tool's version. A run that another version began is not resumed: two versions must not make one output.
    """

    path: Path
    files: tuple[tuple[str, int], ...]
    digest: str
    stamps: dict[str, Sequence[int]]
    inputs: tuple[Path, ...]
    conflicting_names: tuple[str, ...] = ()
    temporary: tuple[tuple[str, int], ...] = ()
    editable: frozenset[str] = frozenset()
    bits: str = ""
    version: str = ""

    @property
    def head(self) -> dict[str, Any]:
        """Make the head of the run's journal, as compared by `may_resume`."""
        return {
            "plan": self.digest,
            "version": self.version,
            "bits": self.bits,
            "stamps": self.stamps,
        }

    @property
    def total_bytes(self) -> int:
        """Return the number of bytes of all files."""
        return sum(size for _, size in self.files)

    @property
    def temporary_bytes(self) -> int:
        """Return the largest number of bytes of the temporary files."""
        return sum(size for _, size in self.temporary)


def inspect_output(
    plan: OutputPlan, overwrite: bool = False, resume: bool = True
) -> Literal["new", "resume", "done"]:
    """Determine, without writing, whether the plan may be carried out here and what remains to be done.

    Raises
    ------
    OutputError
        If the path is a symlink or an input, is inside an input or a hub cache, is not writable, or holds foreign files.
    StorageError
        If the plan does not fit on the disk.
    """
    path = plan.path
    names = [name for name, _ in plan.files]
    check_output_path(path, plan.inputs)
    for name in names:
        check_name(path / name, atomic_file.partial_name((path / name).name))
    for name in (
        *names,
        RECORD_NAME,
        JOURNAL_NAME,
        LOCK_NAME,
        *(f"{STAGE_NAME}/{name}" for name in names),
    ):
        if any(
            p.is_symlink() for p in ((path / name), *(path / name).parents) if path in p.parents
        ):
            raise OutputError(
                f"{path / name}: is a symlink, and writing never follows one; remove it"
            )
    state = _recorded_state(plan, overwrite, resume)
    if state != "done":
        own = own_files(path / RECORD_NAME, path / JOURNAL_NAME)
        if state == "new":
            _refuse_foreign(plan, own, overwrite)
        for name in (name for name in names if name in plan.editable and is_taken(path / name)):
            if not any(is_unchanged(path, file) for file in own if file.file == name):
                raise _foreign(path / name, "was edited since it was written")
        check_space(path, missing_bytes(plan, state), at_most=bool(plan.temporary))
    return state


def missing_bytes(plan: OutputPlan, state: str) -> int:
    """Compute the additional bytes on disk that a plan in the state ``new`` or ``resume`` needs."""
    stage = plan.path / STAGE_NAME
    leftovers = own_partials(plan) | {
        place / name for place in (plan.path, stage) for name, _ in plan.temporary
    }
    leftovers |= {*stage.rglob("*")} if state == "new" else set()
    entries = [*Journal.peek(plan.path / JOURNAL_NAME)] if state == "resume" else []
    finished = {file.file for file in as_files(entries)}
    todo = sum(size for name, size in plan.files if name not in finished)
    return todo + plan.temporary_bytes - sum(map(allocated_bytes, leftovers))


def file_size(path: Path) -> int:
    """Return the size of the file at a path; -1 if there is none."""
    return -1 if (found := _stat(path)) is None else found.st_size


def own_partials(plan: OutputPlan) -> set[Path]:
    """Find the partial files that killed runs, of this plan or an earlier one, left in the output's directories."""
    planned = next(Journal.peek(plan.path / JOURNAL_NAME), {}).get(PLANNED_NAMES, [])
    old = [file.file for file in own_files(plan.path / RECORD_NAME, plan.path / JOURNAL_NAME)]
    names = [RECORD_NAME, *plan.conflicting_names, *(name for name, _ in plan.files)]
    names += [
        name for name in (*planned, *old) if _is_within(plan.path, name)
    ]  # a record may come from elsewhere
    paths = [place / name for place in (plan.path, plan.path / STAGE_NAME) for name in names]
    directories = {path.parent for path in paths if path.parent.is_dir()}
    last_names = {path.name for path in paths}
    return {
        path for directory in directories for path in atomic_file.partials_of(directory, last_names)
    }


def _recorded_state(
    plan: OutputPlan, overwrite: bool, resume: bool
) -> Literal["new", "resume", "done"]:
    """Determine the state from journal and record."""
    path = plan.path
    record = record_at(path / RECORD_NAME)
    if is_taken(path / RECORD_NAME) and record is None:
        raise _foreign(path / RECORD_NAME)
    head = next(Journal.peek(path / JOURNAL_NAME), None)
    if head is not None:
        if may_resume(path, head, plan.head, resume=resume, overwrite=overwrite):
            return "resume"
        return "new"
    if overwrite or record is None:
        return "new"
    if record.get("plan") == plan.digest:
        return _check_stands(plan, record)
    raise holds(path, "another output")


def _refuse_foreign(plan: OutputPlan, own: Sequence[OldFile], overwrite: bool) -> None:
    """Refuse to write over, or beside, files that no record or journal of ours names: they may be someone's weights.

    An unchanged file of ours under a conflicting name is removed; so is an empty one with `overwrite`.
    """
    path = plan.path
    names = {file.file for file in own}
    for name, _ in plan.files:
        if is_taken(path / name) and not (name in names and (path / name).is_file()):
            raise _foreign(path / name)
    for name in plan.conflicting_names:
        if not (path / name).exists() or (overwrite and is_placeholder(path / name)):
            continue
        if name not in names:
            raise _foreign(path / name)
        if not any(is_unchanged(path, file) for file in own if file.file == name):
            what = "was changed since it was written, and a loader would read it as a part of this output"
            raise _foreign(path / name, what)
    is_ours = any((path / name).exists() for name in (RECORD_NAME, JOURNAL_NAME))
    if not (overwrite or is_ours) and (
        others := sorted(p.name for p in path.glob("[!.]*") if is_taken(p))
    ):
        do = "choose another directory, or pass --overwrite, which leaves them there"
        raise OutputExistsError(f"{path}: holds other files ({listed(others)}); {do}", path)


def _check_stands(plan: OutputPlan, record: dict[str, Any]) -> Literal["done", "new"]:
    """Check that the files of a finished output have the sizes in its record; another version's headers may differ in size.

    Missing files make it new, as when a user removed one on purpose; a different size is refused, because the file may be edited.
    """
    sizes = {file.file: file.bytes for file in as_files(record.get("files"))}
    missing = False
    for name, _ in plan.files:
        size = file_size(plan.path / name)
        wanted = sizes.get(name)
        if size == wanted or (size > 0 and name in plan.editable):
            continue
        if wanted is None:
            raise holds(plan.path, "another output")
        if size > 0:
            expected, is_now = format_sizes(wanted, size)
            fault = f"was changed since it was written, expected {expected}, found {is_now}"
            do = "remove it to have the output made again, choose another output, or pass --overwrite"
            raise OutputExistsError(f"{plan.path / name}: {fault}; {do}", plan.path / name)
        missing = True
    return "new" if missing else "done"


class OutputDirectory:
    """Writer of an output directory's files; made by `open_outputs`."""

    def __init__(self, plan: OutputPlan, path: Path, journal: Journal, resumed: bool) -> None:
        self.path = path
        self.resumed = resumed
        self._plan = plan
        self._journal = journal
        entries = (files.strict_json(journal[i]) for i in range(1, len(journal)))
        self._entries: dict[str, dict[str, Any]] = {entry["file"]: entry for entry in entries}

    def finished(self, name: str) -> dict[str, Any] | None:
        """Return the journal's entry of a complete file, checking its digest; None if it must still be written."""
        places = [self.path]
        if (
            RECORD_NAME in self._entries
        ):  # all files were complete, and some may have been renamed into place
            places.append(self._plan.path)
        entry = self._entries.get(name)
        if any(is_unchanged(place, file) for file in as_files([entry]) for place in places):
            return entry
        return None

    def entry(self, name: str) -> dict[str, Any]:
        """Return the journal's entry of a file that this run has written or found finished."""
        return self._entries[name]

    def announce(self, name: str, nbytes: int, sha256: str, **detail: Any) -> None:
        """Journal a file that is about to get its final name."""
        entry = {"file": name, "bytes": nbytes, "sha256": sha256, **detail}
        self._journal.append(json.dumps(entry).encode())
        self._entries[name] = entry

    @contextlib.contextmanager
    def file(self, name: str, size: int) -> Iterator[AtomicFile]:
        """Open a file to write; at the end of the block it is completed, journalled and renamed."""
        files.make_directory((self.path / name).parent)
        with AtomicFile(self.path / name, size) as f:
            yield f
            f.complete()
            self.announce(name, f.written, f.sha256)

    def take(self, name: str, partial: str | Path, nbytes: int, sha256: str, **detail: Any) -> None:
        """Accept a complete partial file that a worker left beside the final name, or one elsewhere: journal it and rename it."""
        partial_path = (self.path / name).parent / partial
        found = file_size(partial_path)
        if found != nbytes or nbytes != dict(self._plan.files)[name]:
            raise StorageError(
                f"{partial_path}: expected {nbytes} bytes, found {found}; run the same command again"
            )
        self.announce(name, nbytes, sha256, **detail)
        atomic_file.rename_partial(partial_path, self.path / name)

    def commit(self, record: dict[str, Any]) -> None:
        """Write the record with its own digest and remove the journal, once all files exist.

        The digest is the SHA-256 of the record's file with 64 zeros in the digest's place.
        """
        written = [
            {k: self._entries[name][k] for k in ("file", "bytes", "sha256")}
            for name, _ in self._plan.files
        ]
        record = {
            **record,
            "plan": record.get("plan", self._plan.digest),
            "files": written,
            "sha256": "0" * 64,
        }
        record["sha256"] = hashlib.sha256(_record_bytes(record)).hexdigest()
        data = _record_bytes(record)
        with self.file(RECORD_NAME, len(data)) as file:
            file.write(data)
        if self.path != self._plan.path:
            self._replace()
        self._journal.remove()

    def _replace(self) -> None:
        """Replace the old output by the new files, which are complete.

        If a loader reads more than one file that differs, the commit point goes first and comes last, so that no loader finds files of both
        outputs. A kill leaves the old output, or what the same command completes by these steps.
        """
        path = self._plan.path
        names = [*(name for name, _ in self._plan.files), RECORD_NAME]
        to_rename = [name for name in names if file_size(self.path / name) >= 0]
        old = as_files(json.loads(self._journal[0])[OLD])
        differing = {file.file for file in {*old} ^ {*as_files([*self._entries.values()])}}
        if len(differing - self._plan.editable - {RECORD_NAME}) > 1 and names[-2] in to_rename:
            files.remove_file(path / names[-2])
        remove_own_files(path, old, names)
        files.remove_file(path / RECORD_NAME)
        for name in to_rename:
            files.make_directory((path / name).parent)
            atomic_file.rename_partial(self.path / name, path / name)
        shutil.rmtree(self.path, ignore_errors=True)


def _record_bytes(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=1) + "\n").encode()


@contextlib.contextmanager
def open_outputs(
    plans: Sequence[OutputPlan], overwrite: bool = False, resume: bool = True
) -> Iterator[list[OutputDirectory]]:
    """Lock the directories, resume interrupted runs or begin new ones, and keep the journals if the block raises.

    All are locked and checked before anything in any of them changes, so that a refusal leaves all of them unchanged.
    """
    with locked_outputs(plans, overwrite, resume) as outputs, contextlib.ExitStack() as stack:
        yield [stack.enter_context(output) for output in outputs]


@contextlib.contextmanager
def locked_outputs(
    plans: Sequence[OutputPlan], overwrite: bool, resume: bool
) -> Iterator[list[contextlib.AbstractContextManager[OutputDirectory]]]:
    """Lock and check the directories. Entering a context begins or resumes its output's run; until then the old files stay unchanged.

    Raises
    ------
    LockedError
        If another run is active in one of them.
    OutputError, StorageError, InputChangedError
        As raised by `inspect_output`, which is repeated under the locks.
    """
    with contextlib.ExitStack() as stack:
        states = []
        for plan in plans:
            check_output_path(plan.path, plan.inputs)
            if is_placeholder(plan.path):
                files.remove_file(plan.path)
            files.make_directory(plan.path)
            stack.enter_context(files.locked(plan.path / LOCK_NAME))
            states.append(inspect_output(plan, overwrite, resume))
            if states[-1] == "done":
                raise OutputError(
                    f"{plan.path}: another run has just finished this; run the command again to see it"
                )
        for path in (path for plan in plans for path in own_partials(plan)):
            files.remove_file(path)
        yield [_begun(plan, state) for plan, state in zip(plans, states, strict=True)]


@contextlib.contextmanager
def _begun(plan: OutputPlan, state: str) -> Iterator[OutputDirectory]:
    """Begin or resume one locked output in the state ``new`` or ``resume``."""
    old = own_files(plan.path / RECORD_NAME, plan.path / JOURNAL_NAME)
    names = [name for name, _ in plan.files]
    stage = plan.path / STAGE_NAME
    if state == "new":
        shutil.rmtree(stage, ignore_errors=True)
    stays = is_taken(plan.path / RECORD_NAME) or stage.exists()
    if state == "new" and not stays:
        # An interrupted run may have been killed at its end: from here on, nobody mistakes the directory for a finished output.
        files.remove_file(plan.path / names[-1])
    journal = Journal(plan.path / JOURNAL_NAME)
    try:
        if state == "new":
            # Before anything else is removed: a kill from here on leaves a run that can be resumed and knows what is still to be removed.
            journal.begin({**plan.head, PLANNED_NAMES: names, OLD: [asdict(file) for file in old]})
        for path in filter(is_placeholder, (plan.path / name for name in plan.conflicting_names)):
            files.remove_file(path)
        if stays:
            files.make_directory(stage)
        else:
            remove_own_files(plan.path, old, names)
        yield OutputDirectory(plan, stage if stays else plan.path, journal, state == "resume")
    finally:
        journal.close()
