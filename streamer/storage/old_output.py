"""The files of an earlier output, by its record or its journal, and their removal before another is written."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from streamer.errors import OutputError
from streamer.storage.atomic import Journal, storage_error
from streamer.storage.header import strict_json

MAX_RECORD_BYTES = 200_000_000

HASHED_BYTES = 64 << 20
"""Up to this size a file is known by its digest, which tells a config that was edited by hand; beyond it by its size."""


@dataclass(frozen=True)
class OwnFile:
    """One file as an earlier run wrote it: its relative name, bytes, and SHA-256 (hex)."""

    name: str
    nbytes: int
    sha256: str


def journal_head(path: Path) -> dict[str, Any] | None:
    """Read the first record of a journal, which says what run it is of; None where there is no journal, or none of ours."""
    try:
        with path.open("rb") as f:
            frame = f.read(40)
            length = int.from_bytes(frame[:8], "little")
            payload = f.read(length) if length <= os.fstat(f.fileno()).st_size else b""
    except FileNotFoundError:
        return None
    except OSError as e:
        raise storage_error(path, "read", e) from e
    if len(frame) < 40 or hashlib.sha256(payload).digest() != frame[8:]:
        return None  # torn before the run did anything
    try:
        head = strict_json(payload)
    except ValueError:
        return None
    return head if isinstance(head, dict) else None


def journal_entry(journal: Journal, i: int) -> dict[str, Any]:
    """Read what a journal says of a file: its name, bytes and digest.

    Raises
    ------
    OutputError
        If another version wrote it.
    """
    try:
        entry = strict_json(journal[i])
    except ValueError:
        entry = None
    kinds = {"file": str, "bytes": int, "sha256": str}
    if not isinstance(entry, dict) or any(type(entry.get(key)) is not kind for key, kind in kinds.items()):
        raise OutputError(f"{journal.path}: its record {i} is not one of this version; --no-resume starts the run over")
    return entry


def own_files(record: Path, journal: Path) -> list[OwnFile]:
    """List the files of an earlier output, finished or not, in the order of writing; what is no record or journal of ours names none."""
    return list(dict.fromkeys([*_recorded(record), *_journalled(journal)]))


def remove_own_files(directory: Path, files: Sequence[OwnFile], keep: Collection[str]) -> None:
    """Remove the files of an earlier output that stand as they were written, the last first: it is the one that others stand on.

    Parameters
    ----------
    keep
        Names that the output to come will replace in one step.

    Raises
    ------
    StorageError
        If the system refuses.
    """
    for file in reversed(files):
        path = directory / file.name
        if file.name in keep or not _stands(directory, file):
            continue
        try:
            path.unlink()
        except OSError as e:
            raise storage_error(path, "remove", e) from e
        for parent in path.relative_to(directory).parents[:-1]:
            with contextlib.suppress(OSError):  # other files are in it
                (directory / parent).rmdir()


def _stands(directory: Path, file: OwnFile) -> bool:
    """Whether a file is there as it was written, under a plain name in the directory, and no symlink leads to it."""
    name = PurePosixPath(file.name)
    path = directory / name
    above = [directory / parent for parent in name.parents[:-1]]
    if name.is_absolute() or ".." in name.parts or any(os.path.islink(p) for p in (path, *above)):
        return False
    try:
        if not path.is_file() or path.stat().st_size != file.nbytes:
            return False
        if file.nbytes > HASHED_BYTES:
            return True
        return hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return False


def _recorded(path: Path) -> Iterator[OwnFile]:
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_RECORD_BYTES:
            return
        tree = strict_json(path.read_bytes())
    except (OSError, ValueError):
        return
    if (
        isinstance(tree, dict)
        and isinstance(tree.get("files"), list)
        and str(tree.get("schema")).startswith("streamer.output/")
    ):
        yield from _entries(tree["files"])


def _journalled(path: Path) -> Iterator[OwnFile]:
    if path.is_symlink() or not path.is_file():
        return
    journal = Journal(path)
    try:
        for i in range(1, len(journal)):
            with contextlib.suppress(ValueError):
                yield from _entries([strict_json(journal[i])])
    finally:
        journal.close()


def _entries(trees: Iterable[Any]) -> Iterator[OwnFile]:
    for tree in trees:
        if isinstance(tree, dict):
            name, nbytes, digest = tree.get("file"), tree.get("bytes"), tree.get("sha256")
            if isinstance(name, str) and type(nbytes) is int and isinstance(digest, str):
                yield OwnFile(name, nbytes, digest)
