"""An output directory as one resumable transaction.

While a run is under way the directory holds ``.streamer.lock`` and ``.streamer.journal``; the file that makes the output
loadable (the last of the plan's names) comes last. Then the journal gives way to ``streamer.json``, the record of what was
made from what, by which a rerun knows that there is nothing to do. A file's size and digest are journalled *before* it is
renamed: after a kill, a final name that matches its entry is finished, and everything else is done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from streamer.errors import FormatError, InputChangedError, OutputError, OutputExistsError
from streamer.storage.atomic import (
    AtomicFile,
    Journal,
    locked,
    make_directory,
    partials_of,
    remove_partials,
    storage_error,
    write_atomic,
)
from streamer.storage.checkpoint import read_json_object
from streamer.storage.old_output import journal_entry, journal_head, own_files, remove_own_files
from streamer.storage.place import allocated_bytes, check_place, check_space, is_placeholder, is_taken, touch
from streamer.units import format_sizes

RECORD_NAME = "streamer.json"
JOURNAL_NAME = ".streamer.journal"
LOCK_NAME = ".streamer.lock"


@dataclass(frozen=True)
class OutputPlan:
    """What will stand in the output directory.

    Attributes
    ----------
    path
        The directory.
    files
        (relative name, bytes), in the order of writing; the last one is the commit point.
    digest
        SHA-256 (hex) over everything that decides the output's bytes: inputs, options, names.
    stamps
        Stamps of the inputs; a resumed run must find the same.
    inputs
        Input directories that the output must stay out of.
    rivals
        Names that a loader might prefer to ours; they must not be there.
    temporary
        (relative name, bytes at most) of what stands there only while the run is under way.
    late
        Names of files whose contents are known only when all others are made: their planned bytes are the most that they take.
    version
        The tool's. A run that another one began is not taken up: no output is made by two.
    """

    path: Path
    files: tuple[tuple[str, int], ...]
    digest: str
    stamps: dict[str, Sequence[int]]
    inputs: tuple[Path, ...]
    rivals: tuple[str, ...] = ()
    temporary: tuple[tuple[str, int], ...] = ()
    late: frozenset[str] = frozenset()
    version: str = ""

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files)

    @property
    def temporary_bytes(self) -> int:
        """Bytes at most of what does not stay."""
        return sum(size for _, size in self.temporary)


def inspect_output(plan: OutputPlan, overwrite: bool = False, resume: bool = True) -> Literal["new", "resume", "done"]:
    """Say, read-only, whether the plan may be carried out here and what is left to do.

    Raises
    ------
    OutputError
        If the path is a symlink, an input, inside an input or a hub cache, not writable, or holds what is not ours.
    StorageError
        If the plan does not fit on the disk.
    """
    path = plan.path
    check_place(path, plan.inputs)
    state: Literal["new", "resume", "done"] = "new"
    if path.exists() and not is_placeholder(path):
        if not path.is_dir():
            raise OutputExistsError(f"{path}: exists and is not a directory; choose another output", path)
        state = _state_of(plan, overwrite, resume)
    if state != "done":
        check_space(path, missing_bytes(plan, state), at_most=bool(plan.temporary))
    return state


def missing_bytes(plan: OutputPlan, state: str) -> int:
    """Bytes that a plan in this state, ``new`` or ``resume``, still takes on the disk."""
    have = sum(allocated_bytes(p) for home, names in _homes(plan) for p in partials_of(home, names))
    if state == "resume":
        have += sum(size for name, size in plan.files if _size(plan.path / name) == size)
    have += sum(allocated_bytes(plan.path / name) for name, _ in plan.temporary)
    return plan.total_bytes + plan.temporary_bytes - have


def _size(path: Path) -> int:
    try:
        return path.stat(follow_symlinks=False).st_size
    except OSError:
        return -1


def _homes(plan: OutputPlan) -> Iterator[tuple[Path, set[str]]]:
    """Each directory that stands and gets files, and the names of all files: where a killed run left partials."""
    names = {Path(name).name for name, _ in plan.files} | {RECORD_NAME}
    for home in dict.fromkeys((plan.path, *((plan.path / name).parent for name, _ in plan.files))):
        if home.is_dir():
            yield home, names


def _state_of(plan: OutputPlan, overwrite: bool, resume: bool) -> Literal["new", "resume", "done"]:
    path = plan.path
    for name in (*(n for n, _ in plan.files), RECORD_NAME, JOURNAL_NAME, LOCK_NAME):
        if any(p.is_symlink() for p in ((path / name), *(path / name).parents) if path in p.parents):
            raise OutputError(f"{path / name}: is a symlink, and writing never follows one; remove it")
    head = journal_head(path / JOURNAL_NAME)
    if head is not None:
        if head.get("plan") == plan.digest:
            return "new" if not resume or (overwrite and not _is_of_version(plan, head)) else _may_resume(plan, head)
        if not overwrite:
            raise OutputExistsError(
                f"{path}: holds an interrupted run with other inputs or options; finish that one, "
                "choose another output, or pass --overwrite",
                path,
            )
        return "new"
    if overwrite:
        return "new"
    if is_taken(path / RECORD_NAME):
        record = _record(path)
        if record.get("plan") == plan.digest and (stands := _stands(plan, record)):
            return "done" if stands == "whole" else "new"
        raise OutputExistsError(f"{path}: holds another output; choose another directory, or pass --overwrite", path)
    rivals = [name for name in plan.rivals if (path / name).exists()]
    for name in (*(n for n, _ in plan.files if is_taken(path / n)), *rivals):
        raise OutputExistsError(
            f"{path / name}: exists and is not ours; choose another output, or pass --overwrite", path / name
        )
    return "new"


def _stands(plan: OutputPlan, record: dict[str, Any]) -> Literal["whole", "in part", ""]:
    """Say whether the files of a finished output have the sizes that its record gives; by another version a header may have another.

    In part if some are missing, as where a user removed one to have it made again; empty if one differs, which might be an edited one.
    """
    files = record.get("files")
    if not isinstance(files, list):
        return ""
    sizes = {f.get("file"): f.get("bytes") for f in files if isinstance(f, dict)}
    found = {name: _size(plan.path / name) for name, _ in plan.files}
    found = {name: size for name, size in found.items() if size > 0 or size == sizes.get(name)}
    if any(name not in sizes for name, _ in plan.files) or any(size != sizes[name] for name, size in found.items()):
        return ""
    return "whole" if len(found) == len(plan.files) else "in part"


def _is_of_version(plan: OutputPlan, head: dict[str, Any]) -> bool:
    return bool(head.get("version", "") == plan.version)


def _may_resume(plan: OutputPlan, head: dict[str, Any]) -> Literal["resume"]:
    if not _is_of_version(plan, head):
        raise OutputError(
            f"{plan.path}: holds a run that version {head.get('version') or 'before 0.2'} began, and this is {plan.version}; finish it "
            "with that version, or pass --no-resume to start it over"
        )
    if head.get("stamps") != json.loads(json.dumps(plan.stamps)):
        raise InputChangedError(
            f"{plan.path}: an input was modified since this run was interrupted; --no-resume starts it over"
        )
    return "resume"


def _record(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path / RECORD_NAME)
    except FormatError as e:
        raise OutputExistsError(
            f"{path / RECORD_NAME}: is not ours; choose another output, or pass --overwrite", path / RECORD_NAME
        ) from e


class OutputDirectory:
    """The directory while it is being written; made by `open_outputs`."""

    def __init__(self, plan: OutputPlan, journal: Journal, resumed: bool) -> None:
        self.path = plan.path
        self.resumed = resumed
        self._plan = plan
        self._journal = journal
        self._entries: dict[str, dict[str, Any]] = {}
        for i in range(1, len(journal)):
            entry = journal_entry(journal, i)
            self._entries[entry["file"]] = entry

    def finished(self, name: str) -> dict[str, Any] | None:
        """The journal's entry of a file that stands complete, its digest checked; None if it is still to be written."""
        entry = self._entries.get(name)
        if entry is None or _size(self.path / name) != entry["bytes"]:
            return None
        with (self.path / name).open("rb") as f:
            return entry if hashlib.file_digest(f, "sha256").hexdigest() == entry["sha256"] else None

    def entry(self, name: str) -> dict[str, Any]:
        """The journal's entry of a file that this run has written or found finished."""
        return self._entries[name]

    def announce(self, name: str, nbytes: int, sha256: str, **detail: Any) -> None:
        """Journal a file that is about to get its final name."""
        entry = {"file": name, "bytes": nbytes, "sha256": sha256, **detail}
        self._journal.append(json.dumps(entry).encode())
        self._entries[name] = entry

    def write(self, name: str, data: bytes, before_rename: Callable[[], None]) -> None:
        """Write a small file."""
        self._put(name, len(data), lambda f: f.write(data), before_rename)

    def copy(self, name: str, source: Path, before_rename: Callable[[], None]) -> None:
        """Copy a file as it is; the mode follows the umask."""
        size = dict(self._plan.files)[name]

        def pour(f: AtomicFile) -> None:
            with source.open("rb") as src:
                while piece := src.read(8 << 20):
                    f.write(piece)
            if f.written != size:
                wanted, found = format_sizes(size, f.written)
                raise InputChangedError(
                    f"{source}: expected {wanted}, found {found}: it changed during the run; start again"
                )

        try:
            self._put(name, size, pour, before_rename)
        except OSError as e:
            raise storage_error(source, "copy", e) from e

    def _put(self, name: str, size: int, pour: Callable[[AtomicFile], None], before_rename: Callable[[], None]) -> None:
        target = self.path / name
        make_directory(target.parent)

        def check(_: int) -> None:
            before_rename()
            self.announce(name, f.written, f.sha256)

        with AtomicFile(target, size, check) as f:
            pour(f)

    def commit(self, record: dict[str, Any]) -> dict[str, Any]:
        """All files stand: write the record, drop the journal. Returns the record."""
        files = [{k: self._entries[name][k] for k in ("file", "bytes", "sha256")} for name, _ in self._plan.files]
        record = {**record, "plan": self._plan.digest, "files": files}
        write_atomic(self.path / RECORD_NAME, (json.dumps(record, indent=1) + "\n").encode())
        self._journal.remove()
        return record


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as e:
        raise storage_error(path, "remove", e) from e


def finished_record(plan: OutputPlan) -> dict[str, Any]:
    """The record of an output that `inspect_output` calls done."""
    return _record(plan.path)


def touch_output(plan: OutputPlan) -> str:
    """Set the times of a finished output to now: of its files, the commit point and the record last, then of the directory; see `touch`."""
    return touch([*(plan.path / name for name, _ in plan.files), plan.path / RECORD_NAME, plan.path])


@contextlib.contextmanager
def open_outputs(
    plans: Sequence[OutputPlan], overwrite: bool = False, resume: bool = True
) -> Iterator[list[OutputDirectory]]:
    """Lock the directories, take up interrupted runs or begin, and keep the journals if the block raises.

    All are locked and looked at before anything in one of them is touched: one that is refused leaves the others as they were.

    Raises
    ------
    LockedError
        If another run is at work in one of them.
    OutputError, StorageError, InputChangedError
        As `inspect_output`, which is repeated under the locks.
    """
    with contextlib.ExitStack() as stack:
        states = []
        for plan in plans:
            check_place(plan.path, plan.inputs)
            if is_placeholder(plan.path):
                _remove(plan.path)
            make_directory(plan.path)
            stack.enter_context(locked(plan.path / LOCK_NAME))
            states.append(inspect_output(plan, overwrite, resume))
            if states[-1] == "done":
                raise OutputError(
                    f"{plan.path}: another run has just finished this output; run the command again to see it"
                )
        yield [stack.enter_context(_begun(plan, state, overwrite)) for plan, state in zip(plans, states, strict=True)]


@contextlib.contextmanager
def _begun(plan: OutputPlan, state: str, overwrite: bool) -> Iterator[OutputDirectory]:
    """One of them, locked, in the state ``new`` or ``resume``."""
    for home, names in _homes(plan):
        remove_partials(home, names)
    if state == "new":
        # The old commit point goes first, be it another's or that of a run of ours killed at its very end: from here
        # on nobody takes the directory for a finished output.
        old = own_files(plan.path / RECORD_NAME, plan.path / JOURNAL_NAME) if overwrite else []
        for name in (plan.files[-1][0], *(plan.rivals if overwrite else ())):
            _remove(plan.path / name)
        remove_own_files(plan.path, old, {name for name, _ in plan.files})
        _remove(plan.path / RECORD_NAME)
    journal = Journal(plan.path / JOURNAL_NAME)
    if state != "resume":
        journal.clear()
        journal.append(json.dumps({"plan": plan.digest, "version": plan.version, "stamps": plan.stamps}).encode())
    try:
        yield OutputDirectory(plan, journal, state == "resume")
    finally:
        journal.close()
