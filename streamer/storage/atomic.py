"""Files that appear whole or not at all: partial file, fsync, rename; lock; append-only journal.

What this does not promise: that two names appear together. `transaction` builds that from these pieces.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol

from streamer.errors import LockedError, OutputError, StorageError
from streamer.storage.page_cache import Appender

PARTIAL = re.compile(r"^\.(?P<name>.+)\.[0-9a-f]{16}\.partial$")

Buffer = bytes | bytearray | memoryview


class Sink(Protocol):
    """Where bytes go: an `AtomicFile`, or anything else with ``write``."""

    def write(self, data: Buffer) -> None:
        """Append bytes."""


def storage_error(path: Path, action: str, e: OSError) -> StorageError | OutputError:
    """Turn an `OSError` into the error that says where, what, and what to do."""
    kind = OutputError if e.errno == errno.ENAMETOOLONG else StorageError
    return kind(f"{path}: cannot {action}: {e.strerror or e}; {advice(e)}")


def advice(e: OSError) -> str:
    """What to do about it."""
    if e.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return "free some space, then run the same command again"
    if e.errno in {errno.EMFILE, errno.ENFILE}:
        return "take fewer adapters at once, or raise `ulimit -n`"
    if e.errno == errno.ENAMETOOLONG:
        return "choose a shorter name"
    return "run the same command again once the cause is gone"


def fsync_directory(path: Path) -> None:
    """Make the directory's entries durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """Make a directory and its missing parents, durably; one that stands already is left as it is."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        for new in reversed(missing):
            fsync_directory(new.parent)
    except OSError as e:
        raise storage_error(path, "create", e) from e


class AtomicFile:
    """A file under its final name only when it is complete, durable and checked.

    ``with AtomicFile(path, size) as f: f.write(...)`` writes ``.<name>.<unique>.partial`` beside the target. Leaving the
    block without an exception checks the byte count, fsyncs, calls `check`, renames and fsyncs the directory; leaving it
    with one removes the partial. It never follows a symlink and it replaces what stands at `path` in one step.

    Parameters
    ----------
    path
        The final name. Its directory must exist.
    size
        Exact bytes to come; reserved up front, so that a full disk is found before the work is done.
    check
        Called with the partial's descriptor after the fsync and before the rename; raises to prevent the rename.

    Raises
    ------
    StorageError
        If the system refuses to write. A failed fsync is never retried on the same file.
    """

    def __init__(self, path: Path, size: int, check: Callable[[int], None] | None = None) -> None:
        self.path = path
        self.size = size
        self.written = 0
        self._check = check
        self._partial = path.with_name(partial_name(path.name))
        self._fd = -1
        self._appender = Appender(self._fd)

    @property
    def sha256(self) -> str:
        """Hex digest of what has been written so far."""
        self.flush()
        return self._appender.sha256

    def __enter__(self) -> AtomicFile:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._fd = os.open(self._partial, flags, 0o666)  # the umask makes the mode
        except OSError as e:  # what stands there, if anything does, is not ours to discard
            raise storage_error(self.path, "create", e) from e
        try:
            self._reserve()
        except OSError as e:
            self._discard()
            raise storage_error(self.path, "create", e) from e
        self._appender = Appender(self._fd)
        return self

    def _reserve(self) -> None:
        if self.size == 0:
            return
        try:
            os.posix_fallocate(self._fd, 0, self.size)
        except OSError as e:
            if e.errno not in {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}:  # a file system that cannot reserve
                raise

    def write(self, data: Buffer) -> None:
        """Append bytes. A large piece is hashed and written beside the caller: see `Appender.append`."""
        view = memoryview(data).cast("B") if not isinstance(data, bytes) else memoryview(data)
        try:
            self._appender.append(view)
        except OSError as e:
            raise storage_error(self.path, "write", e) from e
        self.written += len(view)

    def flush(self) -> None:
        """Wait until all that was appended is written: its memory is free."""
        try:
            self._appender.flush()
        except OSError as e:
            raise storage_error(self.path, "write", e) from e

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            self._discard()
            return
        done = False
        try:
            self.flush()
            if self.written != self.size:
                raise StorageError(
                    f"{self.path}: expected to write {self.size} bytes, wrote {self.written}; please report this"
                )
            os.fsync(self._fd)
            self._appender.forget()
            if self._check is not None:
                self._check(self._fd)
            self._close()
            os.rename(self._partial, self.path)
            fsync_directory(self.path.parent)
            done = True
        except OSError as e:
            raise storage_error(self.path, "finish", e) from e
        finally:
            if not done:
                self._discard()

    def _close(self) -> None:
        self._appender.close()  # waits: nothing may write to a descriptor that is closed, or another file's by then
        fd, self._fd = self._fd, -1  # a close that fails has closed the descriptor all the same
        if fd >= 0:
            os.close(fd)

    def _discard(self) -> None:
        with contextlib.suppress(OSError):
            self._close()
        with contextlib.suppress(OSError):
            os.unlink(self._partial)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a small file atomically."""
    with AtomicFile(path, len(data)) as f:
        f.write(data)


def partial_name(name: str) -> str:
    """A name that `PARTIAL` matches, and that is nobody else's."""
    return f".{name}.{secrets.token_hex(8)}.partial"


def partials_of(directory: Path, names: set[str]) -> list[Path]:
    """What a killed run of ours left half-written for these final names."""
    with os.scandir(directory) as entries:
        return [
            Path(entry.path)
            for entry in entries
            if (match := PARTIAL.match(entry.name)) and match["name"] in names and entry.is_file(follow_symlinks=False)
        ]


def remove_partials(directory: Path, names: set[str]) -> None:
    """Remove what `partials_of` finds. Call it under the lock."""
    for path in partials_of(directory, names):
        try:
            os.unlink(path)
        except OSError as e:
            raise storage_error(path, "remove", e) from e


@contextlib.contextmanager
def locked(path: Path, output: Path | None = None) -> Iterator[None]:
    """Hold the lock file at `path`; it is removed at the end. A lock of a dead process does not hold.

    Parameters
    ----------
    path
        The lock file.
    output
        What it locks, for messages; by default its directory.

    Raises
    ------
    LockedError
        If another process holds it: at once, without waiting.
    """
    output = output or path.parent
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as e:
            if e.errno == errno.ELOOP:
                raise OutputError(f"{path}: a symlink stands where the lock must be; remove it") from None
            raise storage_error(path, "lock", e) from e
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise LockedError(f"{output}: another run is writing here; wait for it, or choose another output") from None
        except OSError:
            pass  # a file system without locks: unique partial names still keep runs apart
        # The holder before us may have removed the file between our open and our lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False)):
                break
        os.close(fd)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(fd)


class Journal:
    """An append-only file of records that survives a kill: a torn last record is dropped on opening.

    A record is its length (8 bytes, little-endian), the SHA-256 of its payload (32 bytes), and the payload. Each append
    is durable before it returns. The first record is the head: it says what run this journal belongs to. Open it under a lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            self._spans = list(self._scan())
            self._end = self._spans[-1][0] + self._spans[-1][1] if self._spans else 0
            os.ftruncate(self._fd, self._end)
        except OSError as e:
            raise storage_error(path, "open the journal", e) from e
        self._stale = False
        remove_partials(path.parent, {path.name})

    def _scan(self) -> Iterator[tuple[int, int]]:
        size = os.fstat(self._fd).st_size
        at = 0
        while at + 40 <= size:
            frame = self._read(40, at)
            length = int.from_bytes(frame[:8], "little")
            if length > size - at - 40 or hashlib.sha256(self._read(length, at + 40)).digest() != frame[8:]:
                return
            yield at + 40, length
            at += 40 + length

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, i: int) -> bytes:
        start, length = self._spans[i]
        return self._read(length, start)

    def _read(self, length: int, at: int) -> bytes:
        out = bytearray()
        while len(out) < length and (piece := os.pread(self._fd, length - len(out), at + len(out))):
            out += piece
        return bytes(out)

    def append(self, payload: bytes) -> None:
        """Add a record, durably."""
        frame = len(payload).to_bytes(8, "little") + hashlib.sha256(payload).digest() + payload
        try:
            if self._stale:
                self._replace(frame)
            else:
                done = 0
                while done < len(frame):
                    done += os.pwrite(self._fd, frame[done:], self._end + done)
                os.fsync(self._fd)
                if not self._spans:
                    fsync_directory(self.path.parent)  # the name of a new journal must last as well
        except OSError as e:
            raise storage_error(self.path, "append to the journal", e) from e
        self._spans.append((self._end + 40, len(payload)))
        self._end += len(frame)

    def _replace(self, frame: bytes) -> None:
        write_atomic(self.path, frame)
        self.close()
        self._fd = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._stale = False

    def clear(self) -> None:
        """Forget every record. On disk they stay until the next append replaces them, in one step.

        A kill at any point leaves the old records or the new head: never a journal that belongs to no run.
        """
        self._stale = self._stale or bool(self._spans)
        self._spans.clear()
        self._end = 0

    def close(self) -> None:
        """Close the file; the journal stays on disk."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """Close and delete the journal: the run is finished."""
        self.close()
        os.unlink(self.path)
