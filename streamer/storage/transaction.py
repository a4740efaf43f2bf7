"""Write output directories, each as one resumable transaction.

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
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from streamer.errors import OutputError, StorageError
from streamer.storage.atomic_file import AtomicFile, rename_partial
from streamer.storage.files import make_directory, remove_file
from streamer.storage.journal import Journal
from streamer.storage.lock import locked
from streamer.storage.old_output import NAMES, OLD, as_files, journal_entry, own_files, remove_own_files, stands
from streamer.storage.output_checks import check_output_path, is_placeholder, is_taken
from streamer.storage.output_plan import (
    JOURNAL_NAME,
    LOCK_NAME,
    RECORD_NAME,
    STAGE_NAME,
    OutputPlan,
    inspect_output,
    own_partials,
    size_of,
)


class OutputDirectory:
    """Writer of an output directory's files; made by `open_outputs`."""

    def __init__(self, plan: OutputPlan, path: Path, journal: Journal, resumed: bool) -> None:
        self.path, self.resumed, self._plan, self._journal = path, resumed, plan, journal
        self._entries: dict[str, dict[str, Any]] = {}
        for i in range(1, len(journal)):
            entry = journal_entry(journal, i)
            self._entries[entry["file"]] = entry

    def finished(self, name: str) -> dict[str, Any] | None:
        """Return the journal's entry of a complete file, checking its digest; None if it must still be written."""
        places = [self.path]
        if RECORD_NAME in self._entries:  # all files were complete, and some may have been renamed into place
            places.append(self._plan.path)
        entry = self._entries.get(name)
        return entry if any(stands(place, file) for file in as_files([entry]) for place in places) else None

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
        make_directory((self.path / name).parent)
        with AtomicFile(self.path / name, size) as f:
            yield f
            f.complete()
            self.announce(name, f.written, f.sha256)

    def take(self, name: str, partial: str | Path, nbytes: int, sha256: str, **detail: Any) -> None:
        """Accept a complete partial file that a worker left beside the final name, or one elsewhere: journal it and rename it."""
        made = (self.path / name).parent / partial
        found = size_of(made)
        if found != nbytes or nbytes != dict(self._plan.files)[name]:
            raise StorageError(f"{made}: expected {nbytes} bytes, found {found}; run the same command again")
        self.announce(name, nbytes, sha256, **detail)
        rename_partial(made, self.path / name)

    def commit(self, record: dict[str, Any]) -> dict[str, Any]:
        """Write the record with its own digest and remove the journal, once all files exist; return the record.

        The digest is the SHA-256 of the record's file with 64 zeros in the digest's place.
        """
        files = [{k: self._entries[name][k] for k in ("file", "bytes", "sha256")} for name, _ in self._plan.files]
        record = {**record, "plan": record.get("plan", self._plan.digest), "files": files, "sha256": "0" * 64}
        record["sha256"] = hashlib.sha256(_record_bytes(record)).hexdigest()
        with self.file(RECORD_NAME, len(_record_bytes(record))) as file:
            file.write(_record_bytes(record))
        if self.path != self._plan.path:
            self._replace()
        self._journal.remove()
        return record

    def _replace(self) -> None:
        """Replace the old output by the new files, which are complete.

        If a loader reads more than one file that differs, the commit point goes first and comes last, so that no loader finds files of both
        outputs. A kill leaves the old output, or what the same command completes by these steps.
        """
        path, names = self._plan.path, [*(name for name, _ in self._plan.files), RECORD_NAME]
        left = [name for name in names if size_of(self.path / name) >= 0]
        old = as_files(json.loads(self._journal[0])[OLD])
        differing = {file.file for file in {*old} ^ {*as_files([*self._entries.values()])}}
        if len(differing - self._plan.editable - {RECORD_NAME}) > 1 and names[-2] in left:
            remove_file(path / names[-2])
        remove_own_files(path, old, names)
        remove_file(path / RECORD_NAME)
        for name in left:
            make_directory((path / name).parent)
            rename_partial(self.path / name, path / name)
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
                remove_file(plan.path)
            make_directory(plan.path)
            stack.enter_context(locked(plan.path / LOCK_NAME))
            states.append(inspect_output(plan, overwrite, resume))
            if states[-1] == "done":
                raise OutputError(f"{plan.path}: another run has just finished this; run the command again to see it")
        for path in (path for plan in plans for path in own_partials(plan)):
            remove_file(path)
        yield [_begun(plan, state) for plan, state in zip(plans, states, strict=True)]


@contextlib.contextmanager
def _begun(plan: OutputPlan, state: str) -> Iterator[OutputDirectory]:
    """Begin or resume one locked output in the state ``new`` or ``resume``."""
    old = own_files(plan.path / RECORD_NAME, plan.path / JOURNAL_NAME)
    names, stage = [name for name, _ in plan.files], plan.path / STAGE_NAME
    if state == "new":
        shutil.rmtree(stage, ignore_errors=True)
    stays = is_taken(plan.path / RECORD_NAME) or stage.exists()
    if state == "new" and not stays:
        # An interrupted run may have been killed at its end: from here on, nobody mistakes the directory for a finished output.
        remove_file(plan.path / names[-1])
    journal = Journal(plan.path / JOURNAL_NAME)
    try:
        if state == "new":
            # Before anything else is removed: a kill from here on leaves a run that can be resumed and knows what is still to be removed.
            journal.begin({**plan.head, NAMES: names, OLD: [asdict(file) for file in old]})
        for path in filter(is_placeholder, (plan.path / name for name in plan.conflicting_names)):
            remove_file(path)
        if stays:
            make_directory(stage)
        else:
            remove_own_files(plan.path, old, names)
        yield OutputDirectory(plan, stage if stays else plan.path, journal, state == "resume")
    finally:
        journal.close()
