"""Output directories, each written as one resumable transaction.

While a run is under way the directory holds ``.streamer.lock`` and ``.streamer.journal``; the file that makes the output
loadable (the last of the plan's names) comes last. Then the journal gives way to ``streamer.json``, the record of what was
made from what, by which a rerun knows that there is nothing to do. A file's size and digest are journalled *before* it is
renamed: after a kill, a final name that matches its entry is finished, and everything else is done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from streamer.errors import OutputError, StorageError
from streamer.storage.atomic_file import AtomicFile, remove_partials, rename_partial, write_atomic
from streamer.storage.files import make_directory, remove_file
from streamer.storage.journal import Journal
from streamer.storage.lock import locked
from streamer.storage.old_output import NAMES, OLD, as_entries, journal_entry, own_files, remove_own_files
from streamer.storage.output_checks import check_output_path, is_placeholder, touch
from streamer.storage.output_plan import (
    JOURNAL_NAME,
    LOCK_NAME,
    RECORD_NAME,
    OutputPlan,
    inspect_output,
    output_directories,
    size_of,
)


class OutputDirectory:
    """Write the files of an output directory; made by `open_outputs`."""

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
        """Find the journal's entry of a file that stands complete, its digest checked; None if it is still to be written."""
        entry = self._entries.get(name)
        if entry is None or size_of(self.path / name) != entry["bytes"]:
            return None
        with (self.path / name).open("rb") as f:
            return entry if hashlib.file_digest(f, "sha256").hexdigest() == entry["sha256"] else None

    def entry(self, name: str) -> dict[str, Any]:
        """Find the journal's entry of a file that this run has written or found finished."""
        return self._entries[name]

    def announce(self, name: str, nbytes: int, sha256: str, **detail: Any) -> None:
        """Journal a file that is about to get its final name."""
        entry = {"file": name, "bytes": nbytes, "sha256": sha256, **detail}
        self._journal.append(json.dumps(entry).encode())
        self._entries[name] = entry

    @contextlib.contextmanager
    def file(self, name: str, size: int) -> Iterator[AtomicFile]:
        """Open a file to be written; when the block ends it is complete, journalled and renamed."""
        make_directory((self.path / name).parent)
        with AtomicFile(self.path / name, size) as f:
            yield f
            f.complete()
            self.announce(name, f.written, f.sha256)

    def take(self, name: str, partial: str, nbytes: int, sha256: str, **detail: Any) -> None:
        """Take a complete partial file that a worker has left in the directory: journal it, and give it its name."""
        found = size_of(self.path / partial)
        if found != nbytes or nbytes != dict(self._plan.files)[name]:
            raise StorageError(
                f"{self.path / partial}: a worker wrote {nbytes} bytes, found {found}; run the same command again"
            )
        self.announce(name, nbytes, sha256, **detail)
        rename_partial(self.path / partial, self.path / name)

    def commit(self, record: dict[str, Any]) -> dict[str, Any]:
        """Write the record, with a digest of itself, and remove the journal, when all files stand; return the record.

        The digest is the SHA-256 of the record's file, taken with 64 zeros in its own place.
        """
        files = [{k: self._entries[name][k] for k in ("file", "bytes", "sha256")} for name, _ in self._plan.files]
        record = {**record, "plan": self._plan.digest, "files": files, "sha256": "0" * 64}
        record["sha256"] = hashlib.sha256(_record_bytes(record)).hexdigest()
        write_atomic(self.path / RECORD_NAME, _record_bytes(record))
        self._journal.remove()
        return record


def _record_bytes(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=1) + "\n").encode()


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
            check_output_path(plan.path, plan.inputs)
            if is_placeholder(plan.path):
                remove_file(plan.path)
            make_directory(plan.path)
            stack.enter_context(locked(plan.path / LOCK_NAME))
            states.append(inspect_output(plan, overwrite, resume))
            if states[-1] == "done":
                raise OutputError(
                    f"{plan.path}: another run has just finished this output; run the command again to see it"
                )
        yield [stack.enter_context(_begun(plan, state)) for plan, state in zip(plans, states, strict=True)]


@contextlib.contextmanager
def _begun(plan: OutputPlan, state: str) -> Iterator[OutputDirectory]:
    """Begin or take up one output, locked, in the state ``new`` or ``resume``."""
    for directory, names in output_directories(plan):
        remove_partials(directory, names)
    old = own_files(plan.path / RECORD_NAME, plan.path / JOURNAL_NAME)
    if state == "new":
        # The old commit point goes first, be it another's or that of a run of ours killed at its very end: from here
        # on nobody takes the directory for a finished output.
        remove_file(plan.path / plan.files[-1][0])
    journal = Journal(plan.path / JOURNAL_NAME)
    try:
        if state == "new":
            # Before anything else goes: a kill on the way leaves a run to take up, which knows what is still to be removed.
            head = {**plan.head, NAMES: [name for name, _ in plan.files], OLD: as_entries(old)}
            journal.clear()
            journal.append(json.dumps(head).encode())
        for path in (plan.path / name for name in plan.conflicting_names):
            if is_placeholder(path):
                remove_file(path)
        remove_own_files(plan.path, old, {name for name, _ in plan.files})
        remove_file(plan.path / RECORD_NAME)
        yield OutputDirectory(plan, journal, state == "resume")
    finally:
        journal.close()
