"""Define the source of a safetensors file's bytes: an interface, and files on disk."""

from __future__ import annotations

import contextlib
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Literal

from streamer.errors import InputChangedError, StorageError
from streamer.storage.files import Stamp, file_stamp, open_regular, storage_errors
from streamer.storage.header import Header, read_header
from streamer.storage.system import drop_cached, read_at
from streamer.units import format_size

IOMode = Literal["mmap", "pread"]


class ByteSource(ABC):
    """Bytes of one version of a safetensors file.

    Attributes
    ----------
    io
        Whether a view is a memory map (``mmap``) or a copy in anonymous memory (``pread``).
    stamp
        Identity that must not change while a plan is carried out.
    """

    remote: ClassVar[bool] = False
    """Whether each read crosses a network: bytes that are read twice should then be kept."""

    io: IOMode
    stamp: Stamp

    @abstractmethod
    def header(self) -> Header:
        """Read and validate the header."""

    @abstractmethod
    def view(self, at: int, length: int) -> memoryview:
        """Return the bytes ``[at, at + length)`` of the file, as a map or a copy."""

    @abstractmethod
    def read_pieces(self, pieces: Iterable[tuple[memoryview, int]]) -> None:
        """Read small pieces throughout the file, each into its buffer from its offset."""

    @abstractmethod
    def read_into(self, out: memoryview, at: int) -> None:
        """Read bytes from offset `at` until `out` is full."""

    def prefetch(self, start: int, stop: int, end: int) -> None:  # noqa: B027  # for a disk the kernel does this
        """Start reading ``[start, stop)``, which the caller will request next, and what follows, but nothing from `end` on."""

    def release(self, start: int, stop: int) -> None:  # noqa: B027  # bytes from a server are in no cache
        """Drop ``[start, stop)`` from the system's cache after reading it."""

    @abstractmethod
    def check_unchanged(self) -> None:
        """Raise `InputChangedError` unless the file is still the one that was opened."""

    @abstractmethod
    def close(self) -> None:
        """Release system resources; existing views stay valid."""


class LocalSource(ByteSource):
    """A file on a disk, opened once: reads see the planned file even if its name is replaced."""

    _fd = -1

    def __init__(self, path: Path, io: IOMode) -> None:
        self.path = path
        self.io = io
        self._fd, st = open_regular(path, "a safetensors file")
        self.stamp = file_stamp(st)

    def header(self) -> Header:
        """Read and validate the header."""
        return read_header(self._fd, str(self.path))

    def close(self) -> None:
        """Close the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def check_unchanged(self) -> None:
        """Raise `InputChangedError` unless the path still names the same, unmodified file."""
        try:
            now = file_stamp(os.stat(self.path))
        except OSError as e:
            raise InputChangedError.vanished(self.path) from e
        if now != self.stamp:
            raise InputChangedError.changed(self.path)

    def view(self, at: int, length: int) -> memoryview:
        """Map or read bytes.

        Raises
        ------
        InputChangedError
            If the file has become shorter than its header says. The size is checked before each map, because touching
            a page beyond the end would kill the process.
        """
        if self.io == "pread":
            out = memoryview(bytearray(length))
            self.read_into(out, at)
            return out
        return self._map(at, length)

    def _map(self, at: int, length: int) -> memoryview:
        if length == 0:
            return memoryview(b"")
        self._check_size(at + length)
        page = at % mmap.ALLOCATIONGRANULARITY
        try:
            # Private and writable, so that torch accepts it as a tensor without a copy; nobody writes to it.
            window = mmap.mmap(self._fd, page + length, flags=mmap.MAP_PRIVATE,
                               prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=at - page)  # fmt: skip
        except ValueError:  # Python checks the size again
            self._check_size(at + length)
            raise
        except OSError as e:
            raise StorageError(f"{self.path}: cannot map {format_size(length)}: {e.strerror}; try --io pread") from e
        return memoryview(window)[page:]

    def read_pieces(self, pieces: Iterable[tuple[memoryview, int]]) -> None:
        """Read the pieces one after the other."""
        for out, at in pieces:
            self.read_into(out, at)

    def read_into(self, out: memoryview, at: int) -> None:
        """Read bytes, repeating calls that return fewer."""
        done = 0
        while done < len(out):
            with storage_errors(self.path, "read"):
                n = read_at(self._fd, out[done:], at + done)
            if n == 0:
                self._check_size(at + len(out))
                raise StorageError(f"{self.path}: the file ended early at byte {at + done}")
            done += n

    def release(self, start: int, stop: int) -> None:
        """Drop pages from the system's cache, including the page at `start`, whose beginning belongs to the previous piece."""
        start -= start % mmap.PAGESIZE
        drop_cached(self._fd, start, stop - start)

    def _check_size(self, wanted: int) -> None:
        have = os.fstat(self._fd).st_size
        if have < wanted:
            raise InputChangedError(f"{self.path}: shrank to {format_size(have)} during the run; get the file again")


def opened(source: ByteSource) -> tuple[ByteSource, Header]:
    """Read the header of a source; close the source if that fails."""
    with contextlib.ExitStack() as undo:
        undo.callback(source.close)
        header = source.header()
        undo.pop_all()
    return source, header
