"""Write files that appear complete or not at all: partial file, fsync, rename.

`transaction` handles several files that appear together.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from pathlib import Path
from typing import Self

from streamer.errors import InputChangedError, StorageError
from streamer.storage.buffers import Buffer, Piece
from streamer.storage.files import fsync_directory, remove_file, storage_errors
from streamer.storage.page_cache import LAG_BYTES, Appender
from streamer.storage.system import drop_cached, reserve, sync
from streamer.units import format_sizes

PARTIAL = re.compile(r"^\.(?P<name>.+)\.[0-9a-f]{16}\.partial$")


class AtomicFile(Appender):
    """A file to write that gets its final name only when it is complete, durable and checked.

    ``with AtomicFile(path, size) as f: f.write(...)`` writes ``.<name>.<unique>.partial`` beside the target. Leaving the
    block without an exception calls `complete`, renames the file and fsyncs the directory; an exception removes the
    partial file. It never follows a symlink, and it replaces an existing file at `path` in one step.

    Parameters
    ----------
    path
        The final name. Its directory must exist.
    size
        Exact number of bytes to be written; reserved at once, so that a full disk is found before the work is done.
    head
        The first bytes, written on entry.
    renames
        False leaves the complete file under its name `partial`, for `rename_partial`.

    Raises
    ------
    StorageError
        If the system refuses to write. Never retry a failed fsync on the same file.
    """

    def __init__(self, path: Path, size: int, head: bytes = b"", renames: bool = True) -> None:
        super().__init__(path)
        self.size = size
        self._head, self._renames, self._is_complete = head, renames, False
        self.partial = path.with_name(partial_name(path.name))

    def __enter__(self) -> Self:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with storage_errors(self.path, "create"):  # an existing file is not ours to discard
            self._fd = os.open(self.partial, flags, 0o666)  # the umask determines the mode
        with contextlib.ExitStack() as undo:
            undo.callback(self._discard)
            with storage_errors(self.path, "create"):
                reserve(self._fd, self.size)
            self.write(self._head)
            undo.pop_all()
        return self

    def write(self, data: Buffer) -> None:
        """Append bytes that will not change."""
        self.append(Piece(data))

    def copy(self, source: Path) -> None:
        """Append another file, which forms the rest of this one."""
        with storage_errors(source, "copy"):
            try:
                file = source.open("rb")
            except FileNotFoundError as e:
                raise InputChangedError.vanished(source) from e
            with file:
                while data := file.read(8 << 20):
                    self.write(data)
        if self.written != self.size:
            wanted, found = format_sizes(self.size, self.written)
            raise InputChangedError(
                f"{source}: expected {wanted}, found {found}: it changed during the run; start again"
            )

    def complete(self) -> None:
        """Check the byte count and fsync, so that only the rename remains; a second call does nothing."""
        if self._is_complete:
            return
        self.flush()
        if self.written != self.size:
            raise StorageError(f"{self.path}: expected {self.size} bytes, wrote {self.written}; please report this")
        with storage_errors(self.path, "finish"):
            sync(self._fd)
            if self.written > LAG_BYTES:
                drop_cached(self._fd, 0, self.written)
        self._is_complete = True

    def __exit__(self, kind: object, *_: object) -> None:
        with contextlib.ExitStack() as undo:
            undo.callback(self._discard)
            if kind is None:
                if not self._is_complete:
                    self.complete()
                with storage_errors(self.path, "finish"):
                    self.close()
                    if self._renames:
                        os.rename(self.partial, self.path)
                    fsync_directory(self.path.parent)
                undo.pop_all()

    def _discard(self) -> None:
        with contextlib.suppress(OSError):
            self.close()
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
    """Make a unique name that matches `PARTIAL`, such as ``.model.safetensors.0123456789abcdef.partial``."""
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
    """Remove the files found by `partials_of`. Call it under the lock."""
    for path in partials_of(directory, names):
        remove_file(path)
