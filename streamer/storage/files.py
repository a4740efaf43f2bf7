"""Open, stamp and make durable files and directories, and turn the system's errors into those that say what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from streamer.errors import FormatError, MissingInputError, OutputError, StorageError, advice
from streamer.storage.system import MAX_CALL_BYTES, sync

Stamp = tuple[int, int, int, int]
"""Device, inode, size, mtime in ns: what must not change while a plan is carried out."""


def file_stamp(st: os.stat_result) -> Stamp:
    """Take the stamp of a stat result."""
    return st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns


def open_regular(path: Path, what: str) -> tuple[int, os.stat_result]:
    """Open a file for reading and see that it is one: a FIFO would keep us waiting, a device never end.

    Raises
    ------
    MissingInputError, FormatError, StorageError
        If it is not there, is something else than a regular file, or cannot be opened; `what` was expected.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise MissingInputError(f"{path}: no such file; check the path, or finish the download", path) from None
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise FormatError(f"{path}: expected {what}, found a link that leads to itself") from None
        raise storage_error(path, "open", e) from e
    st = os.fstat(fd)
    if not stat.S_ISREG(st.st_mode):
        os.close(fd)
        raise FormatError(f"{path}: expected {what}, found something that is not a regular file")
    return fd, st


def read_bytes(fd: int, length: int, at: int) -> bytes:
    """Read bytes from offset `at`, whatever the system brings in one call; fewer where the file ends."""
    out = bytearray()
    while len(out) < length and (piece := os.pread(fd, min(length - len(out), MAX_CALL_BYTES), at + len(out))):
        out += piece
    return bytes(out)


def make_directory(path: Path) -> None:
    """Make a directory and its missing parents, durably; one that stands already is left as it is."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    with storage_errors(path, "create"):
        path.mkdir(parents=True, exist_ok=True)
        for new in reversed(missing):
            fsync_directory(new.parent)


def remove_file(path: Path) -> None:
    """Remove a file, if it is there."""
    with storage_errors(path, "remove"):
        path.unlink(missing_ok=True)


def fsync_directory(path: Path) -> None:
    """Make the directory's entries durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(fd)
    finally:
        os.close(fd)


def storage_error(path: Path, action: str, e: OSError) -> StorageError | OutputError:
    """Turn an `OSError` into the error that says where, what, and what to do."""
    kind = OutputError if e.errno == errno.ENAMETOOLONG else StorageError
    return kind(f"{path}: cannot {action}: {e.strerror or e}; {advice(e)}")


@contextlib.contextmanager
def storage_errors(path: Path, action: str) -> Iterator[None]:
    """Raise the `storage_error` of an `OSError` in the block."""
    try:
        yield
    except OSError as e:
        raise storage_error(path, action, e) from e


_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/+.*")


def absent(path: Path, what: str) -> MissingInputError:
    """Make the error for an input directory that is not there; `what` it should have been.

    Parameters
    ----------
    path
        As the user gave it. Of an address a `Path` has only one slash left.
    """
    text = os.fspath(path)
    if _ADDRESS.fullmatch(text):
        return MissingInputError(f"{text}: is an address as a path; pass it as a string", path)
    hint = "" if path.is_absolute() else "; a hub name has the form OWNER/NAME, and no directory OWNER may exist here"
    return MissingInputError(f"{text}: no such directory; check the path of the {what}{hint}", path)
