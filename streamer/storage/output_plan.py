"""Plan an output directory, and determine the state of an existing one, without writing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from streamer.errors import OutputError, OutputExistsError
from streamer.storage.atomic_file import partial_name, partials_of
from streamer.storage.checkpoint import read_json_object
from streamer.storage.journal import Journal, may_resume
from streamer.storage.old_output import OldFile, as_files, is_record, own_files, own_names, stands
from streamer.storage.output_checks import allocated_bytes, check_name, check_output_path, check_space, is_taken
from streamer.units import format_sizes, listed

RECORD_NAME = "streamer.json"
JOURNAL_NAME = ".streamer.journal"
LOCK_NAME = ".streamer.lock"
STAGE_NAME = ".streamer.new"
"""Directory in a finished output with the files that are to replace it."""


def refuse_within_output(path: Path) -> None:
    """Refuse a new file or directory inside a complete output, whose record lists everything that belongs there."""
    real = Path(os.path.realpath(path))
    for parent in (real, *real.parents):
        if is_record(parent / RECORD_NAME):
            raise OutputError(
                f"{path}: lies inside the output {parent}, which is complete: its {RECORD_NAME} lists what belongs there; choose a path "
                "outside it"
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
        Names that a loader might prefer to ours, such as ``model.safetensors`` beside an index. They must not exist, unless they belong
        to an old output and are removed with it.
    beside_names
        Names of other files that a loader would read as parts of the output. An old output's are removed with it; any other, even an
        empty one, is refused and stays.
    temporary
        (relative name, largest size in bytes) of files that exist only during the run.
    editable
        Names of files that users may edit: an output with an edited one counts as complete, and no edited one is replaced or removed.
    instead
        For names of files that are optional, how to do without them.
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
    instead: Mapping[str, str] = field(default_factory=dict)
    bits: str = ""
    version: str = ""
    beside_names: tuple[str, ...] = ()

    @property
    def head(self) -> dict[str, Any]:
        """Make the head of the run's journal, as compared by `may_resume`."""
        return {"plan": self.digest, "version": self.version, "bits": self.bits, "stamps": self.stamps}

    @property
    def total_bytes(self) -> int:
        """Return the number of bytes of all files."""
        return sum(size for _, size in self.files)

    @property
    def temporary_bytes(self) -> int:
        """Return the largest number of bytes of the temporary files."""
        return sum(size for _, size in self.temporary)


def inspect_output(plan: OutputPlan, overwrite: bool = False, resume: bool = True) -> Literal["new", "resume", "done"]:
    """Determine, without writing, whether the plan may be carried out here and what remains to be done.

    Raises
    ------
    OutputError
        If the path is a symlink or an input, is inside an input or a hub cache, is not writable, or holds foreign files.
    StorageError
        If the plan does not fit on the disk.
    """
    path, names = plan.path, [name for name, _ in plan.files]
    check_output_path(path, plan.inputs)
    for name in names:
        check_name(path / name, partial_name((path / name).name))
    if is_taken(path) and not path.is_dir():
        raise OutputExistsError(f"{path}: exists and is not a directory; choose another output", path)
    for name in (*names, RECORD_NAME, JOURNAL_NAME, LOCK_NAME, *(f"{STAGE_NAME}/{name}" for name in names)):
        if any(p.is_symlink() for p in ((path / name), *(path / name).parents) if path in p.parents):
            raise OutputError(f"{path / name}: is a symlink, and writing never follows one; remove it")
    state = _recorded_state(plan, overwrite, resume)
    if state != "done":
        own = own_files(path / RECORD_NAME, path / JOURNAL_NAME)
        if state == "new":
            _refuse_foreign(plan, own, overwrite)
        _refuse_edited(plan, own)
        check_space(path, missing_bytes(plan, state), at_most=bool(plan.temporary))
    return state


def missing_bytes(plan: OutputPlan, state: str) -> int:
    """Compute the additional bytes on disk that a plan in the state ``new`` or ``resume`` needs."""
    stage = plan.path / STAGE_NAME
    leftovers = own_partials(plan) | {place / name for place in (plan.path, stage) for name, _ in plan.temporary}
    leftovers |= {*stage.rglob("*")} if state == "new" else set()
    finished = {one.file for one in as_files([*Journal.peek(plan.path / JOURNAL_NAME)])} if state == "resume" else set()
    todo = sum(size for name, size in plan.files if name not in finished)
    return todo + plan.temporary_bytes - sum(map(allocated_bytes, leftovers))


def size_of(path: Path) -> int:
    """Return the size of the file at a path; -1 if there is none."""
    try:
        return path.stat(follow_symlinks=False).st_size
    except OSError:
        return -1


def own_partials(plan: OutputPlan) -> set[Path]:
    """Find the partial files that killed runs, of this plan or an earlier one, left in the output's directories."""
    old = own_names(plan.path, plan.path / RECORD_NAME, plan.path / JOURNAL_NAME)
    names = (RECORD_NAME, *plan.conflicting_names, *(name for name, _ in plan.files), *old)
    paths = [place / name for place in (plan.path, plan.path / STAGE_NAME) for name in names]
    directories = {path.parent for path in paths if path.parent.is_dir()}
    return {partial for directory in directories for partial in partials_of(directory, {path.name for path in paths})}


def _recorded_state(plan: OutputPlan, overwrite: bool, resume: bool) -> Literal["new", "resume", "done"]:
    """Determine the state from journal and record."""
    path = plan.path
    if is_taken(path / RECORD_NAME) and not is_record(path / RECORD_NAME):
        raise _foreign(path / RECORD_NAME)
    head = next(Journal.peek(path / JOURNAL_NAME), None)
    if head is not None:
        return "resume" if may_resume(path, head, plan.head, resume=resume, overwrite=overwrite) else "new"
    if overwrite or not is_taken(path / RECORD_NAME):
        return "new"
    record = read_json_object(path / RECORD_NAME)
    if record.get("plan") == plan.digest:
        return _check_stands(plan, record)
    raise _another(path)


def _refuse_foreign(plan: OutputPlan, own: Sequence[OldFile], overwrite: bool) -> None:
    """Refuse to write over, or beside, files that no record or journal of ours names: they may be someone's weights.

    An unchanged file of ours under a conflicting name is removed; so is an empty one with `overwrite`.
    """
    path, names = plan.path, {file.file for file in own}
    for name, _ in plan.files:
        if is_taken(path / name) and not (name in names and (path / name).is_file()):
            raise _foreign(path / name, plan.instead.get(name, ""))
    for name in (*plan.conflicting_names, *plan.beside_names):
        removable = overwrite and name in plan.conflicting_names and not is_taken(path / name)
        if not (path / name).exists() or removable:
            continue
        if name not in names:
            read = "exists, and a loader would read it as a part of the output"
            raise _foreign(path / name, what=read) if name in plan.beside_names else _foreign(path / name)
        if not any(stands(path, file) for file in own if file.file == name):
            raise OutputExistsError(
                f"{path / name}: was changed since it was written, and a loader would read it as a part of this output; "
                "choose another output, or move it away",
                path / name,
            )
    is_ours = any((path / name).exists() for name in (RECORD_NAME, JOURNAL_NAME))
    if not (overwrite or is_ours) and (others := sorted(p.name for p in path.glob("[!.]*") if is_taken(p))):
        raise OutputExistsError(
            f"{path}: holds other files ({listed(others)}); choose another directory, or pass --overwrite, which leaves them there",
            path,
        )


def _another(path: Path) -> OutputExistsError:
    return OutputExistsError(f"{path}: holds another output; choose another directory, or pass --overwrite", path)


def _refuse_edited(plan: OutputPlan, own: Sequence[OldFile]) -> None:
    """Refuse to replace or remove a file that users may edit, such as a model card, if someone did."""
    for path, name in ((plan.path / name, name) for name, _ in plan.files if name in plan.editable):
        if is_taken(path) and not any(stands(plan.path, file) for file in own if file.file == name):
            raise _foreign(path, plan.instead.get(name, ""), "was edited since it was written")


def _foreign(path: Path, instead: str = "", what: str = "exists and is not ours") -> OutputExistsError:
    do = f"choose another output, move it away, or {instead}" if instead else "choose another output, or move it away"
    return OutputExistsError(f"{path}: {what}; {do}", path)


def _check_stands(plan: OutputPlan, record: dict[str, Any]) -> Literal["done", "new"]:
    """Check that the files of a finished output have the sizes in its record; another version's headers may differ in size.

    Missing files make it new, as when a user removed one on purpose; a different size is refused, because the file may be edited.
    """
    sizes, missing = {file.file: file.bytes for file in as_files(record.get("files"))}, False
    for name, _ in plan.files:
        found, wanted = size_of(plan.path / name), sizes.get(name)
        if found == wanted or (found > 0 and name in plan.editable):
            continue
        if wanted is None:
            raise _another(plan.path)
        if found > 0:
            expected, is_now = format_sizes(wanted, found)
            raise OutputExistsError(
                f"{plan.path / name}: was changed since it was written, expected {expected}, found {is_now}; remove it to have the "
                "output made again, choose another output, or pass --overwrite",
                plan.path / name,
            )
        missing = True
    return "new" if missing else "done"


def finished_record(plan: OutputPlan) -> dict[str, Any]:
    """Read the record of an output that `inspect_output` reports as done."""
    return read_json_object(plan.path / RECORD_NAME)
