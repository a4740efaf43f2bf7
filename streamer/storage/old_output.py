"""Find the files of an earlier output by its record or journal, and remove them before another output is written."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from typing import Any

from streamer.storage.files import remove_file
from streamer.storage.journal import Journal
from streamer.storage.strict_json import strict_json

MAX_RECORD_BYTES = 200_000_000

OLD, NAMES = "old", "names"
"""Keys of a journal's head: files that existed before the run, and names of files to come."""


@dataclass(frozen=True)
class OldFile:
    """Relative name, size and SHA-256 (hex) of a file as an earlier run wrote it, as in records and journals."""

    file: str
    bytes: int
    sha256: str


def journal_entry(journal: Journal, i: int) -> dict[str, Any]:
    """Read a journal's entry for a file: its name, size and digest.

    Raises
    ------
    OutputError
        If another version wrote it.
    """
    try:
        entry = strict_json(journal[i])
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or not as_files([entry]):
        raise journal.foreign(i)
    return entry


def own_files(record: Path, journal: Path) -> list[OldFile]:
    """List the files of earlier outputs, finished or not, in the order of writing, from their record and journal.

    A journal's head names the files from before its run; until that run has finished, they may still exist.
    """
    head, *finished = [*Journal.peek(journal)] or [{}]
    listed = ((_record(record) or {}).get("files"), head.get(OLD), finished)
    return list(dict.fromkeys(file for entries in listed for file in as_files(entries)))


def own_names(directory: Path, record: Path, journal: Path) -> list[str]:
    """List the names in this directory for which earlier runs wrote or planned files, and so may have left partial files."""
    planned = next(Journal.peek(journal), {}).get(NAMES)
    names = [file.file for file in own_files(record, journal)]
    names += [name for name in planned if isinstance(name, str)] if isinstance(planned, list) else []
    return [name for name in dict.fromkeys(names) if _is_within(directory, name)]


def as_files(entries: Any) -> list[OldFile]:
    """Convert a list from JSON to the files that its entries describe; an entry of another kind describes none."""
    files = []
    for entry in entries if isinstance(entries, list) else ():
        match entry:
            case {"file": str(name), "bytes": int(nbytes), "sha256": str(digest)} if type(nbytes) is int:
                files.append(OldFile(name, nbytes, digest))
    return files


def remove_own_files(directory: Path, files: Sequence[OldFile], keep: Collection[str]) -> None:
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
    for file in reversed(files):
        path = directory / file.file
        if file.file in keep or not stands(directory, file):
            continue
        remove_file(path)
        for parent in path.relative_to(directory).parents[:-1]:
            with contextlib.suppress(OSError):  # it contains other files
                (directory / parent).rmdir()


def stands(directory: Path, file: OldFile) -> bool:
    """Test whether a file exists unchanged, under a plain name in the directory, with no symlink in its path."""
    path = directory / file.file
    if not _is_within(directory, file.file):
        return False
    try:
        found = path.stat()
        if not S_ISREG(found.st_mode) or found.st_size != file.bytes:
            return False
        return _digest(path, (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)) == file.sha256
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
    return not (plain.is_absolute() or ".." in plain.parts or "\0" in name or any(map(os.path.islink, paths)))


def is_record(path: Path) -> bool:
    """Test whether a file is the record of an output."""
    return _record(path) is not None


def _record(path: Path) -> dict[str, Any] | None:
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_RECORD_BYTES:
            return None
        tree = strict_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) and str(tree.get("schema")).startswith("streamer.output/") else None
