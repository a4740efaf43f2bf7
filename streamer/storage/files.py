"""Open files, stamp them and make them durable, and turn system errors into messages that say what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from streamer.errors import FormatError, MissingInputError, OutputError, StorageError, StreamerError, advice
from streamer.storage.system import MAX_CALL_BYTES, sync

Stamp = tuple[int, int, int, int]
"""Device, inode, size and mtime in ns, which must not change while a plan is carried out."""


def file_stamp(st: os.stat_result) -> Stamp:
    """Return the stamp in a stat result."""
    return st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns


def open_regular(path: Path, what: str) -> tuple[int, os.stat_result]:
    """Open a regular file for reading; refuse others, because a FIFO would block and a device might never end.

    Raises
    ------
    MissingInputError, FormatError, StorageError
        If the file is missing, is not a regular file, or cannot be opened; `what` names the expected file.
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
    """Read bytes from offset `at`, repeating calls that return fewer; fewer only at the end of the file."""
    out = bytearray()
    while len(out) < length and (piece := os.pread(fd, min(length - len(out), MAX_CALL_BYTES), at + len(out))):
        out += piece
    return bytes(out)


def make_directory(path: Path) -> None:
    """Create a directory and its missing parents durably; leave an existing one unchanged."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    with storage_errors(path, "create"):
        path.mkdir(parents=True, exist_ok=True)
        for new in reversed(missing):
            fsync_directory(new.parent)


def remove_file(path: Path) -> None:
    """Remove a file durably, if it exists."""
    with storage_errors(path, "remove"), contextlib.suppress(FileNotFoundError):
        path.unlink()
        fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make the directory's entries durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(fd)
    finally:
        os.close(fd)


def storage_error(path: Path, action: str, e: OSError) -> StorageError | OutputError:
    """Convert an `OSError` into an error that says where it happened, what failed, and what to do."""
    kind = OutputError if e.errno == errno.ENAMETOOLONG else StorageError
    return kind(f"{path}: cannot {action}: {e.strerror or e}; {advice(e)}")


@contextlib.contextmanager
def storage_errors(path: Path, action: str) -> Iterator[None]:
    """Convert an `OSError` in the block into a `storage_error`."""
    try:
        yield
    except StreamerError:
        raise
    except OSError as e:
        raise storage_error(path, action, e) from e


_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/+.*")


def absent(path: Path, what: str) -> MissingInputError:
    """Make the error for a missing input directory; `what` names the expected input.

    Parameters
    ----------
    path
        The path as the user gave it. A URL in a `Path` has only one slash left.
    """
    text = os.fspath(path)
    if _ADDRESS.fullmatch(text):
        return MissingInputError(f"{text}: is an address as a path; pass it as a string", path)
    hint = "" if path.is_absolute() else "; a hub name has the form OWNER/NAME, and no directory OWNER may exist here"
    return MissingInputError(f"{text}: no such directory; check the path of the {what}{hint}", path)
