"""Files that appear whole or not at all: partial file, fsync, rename.

Several names that appear together are `transaction`'s.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from streamer.errors import StorageError
from streamer.storage.files import fsync_directory, remove_file, storage_error, storage_errors
from streamer.storage.page_cache import Appender
from streamer.storage.system import reserve, sync

PARTIAL = re.compile(r"^\.(?P<name>.+)\.[0-9a-f]{16}\.partial$")

Buffer = bytes | bytearray | memoryview


class AtomicFile:
    """Write a file that gets its final name only when it is complete, durable and checked.

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
    renames
        False leaves the complete file under the name `partial`, for `rename_partial`.

    Raises
    ------
    StorageError
        If the system refuses to write. A failed fsync is never retried on the same file.
    """

    def __init__(self, path: Path, size: int, check: Callable[[int], None] | None = None, renames: bool = True) -> None:
        self.path = path
        self.size = size
        self.written = 0
        self._check, self._renames = check, renames
        self.partial = path.with_name(partial_name(path.name))
        self._fd = -1
        self._appender = Appender(self._fd)

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of what has been written so far."""
        self.flush()
        return self._appender.sha256

    def __enter__(self) -> AtomicFile:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with storage_errors(self.path, "create"):  # what stands there, if anything does, is not ours to discard
            self._fd = os.open(self.partial, flags, 0o666)  # the umask makes the mode
        try:
            reserve(self._fd, self.size)
        except OSError as e:
            self._discard()
            raise storage_error(self.path, "create", e) from e
        self._appender = Appender(self._fd)
        return self

    def write(self, data: Buffer) -> None:
        """Append bytes. A large piece is hashed and written by threads while the caller goes on: see `Appender.append`."""
        view = memoryview(data).cast("B") if not isinstance(data, bytes) else memoryview(data)
        with storage_errors(self.path, "write"):
            self._appender.append(view)
        self.written += len(view)

    def flush(self) -> None:
        """Wait until all that was appended is written: its memory is free."""
        with storage_errors(self.path, "write"):
            self._appender.flush()

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
            sync(self._fd)
            self._appender.drop_pages()
            if self._check is not None:
                self._check(self._fd)
            self._close()
            if self._renames:
                os.rename(self.partial, self.path)
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
            os.unlink(self.partial)


def rename_partial(partial: Path, path: Path) -> None:
    """Give a complete partial file its final name, durably."""
    with storage_errors(path, "finish"):
        os.rename(partial, path)
        fsync_directory(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a small file atomically."""
    with AtomicFile(path, len(data)) as f:
        f.write(data)


def partial_name(name: str) -> str:
    """Make a unique name that `PARTIAL` matches, such as ``.model.safetensors.0123456789abcdef.partial``."""
    return f".{name}.{secrets.token_hex(8)}.partial"


def partials_of(directory: Path, names: set[str]) -> list[Path]:
    """List the partial files that a killed run left for these final names."""
    with os.scandir(directory) as entries:
        return [
            Path(entry.path)
            for entry in entries
            if (match := PARTIAL.match(entry.name)) and match["name"] in names and entry.is_file(follow_symlinks=False)
        ]


def remove_partials(directory: Path, names: set[str]) -> None:
    """Remove what `partials_of` finds. Call it under the lock."""
    for path in partials_of(directory, names):
        remove_file(path)
