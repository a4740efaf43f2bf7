"""Read the bytes of a file on a disk: through memory maps, or into buffers. `remote_source` reads files at URLs in the same way."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from streamer.errors import InputChangedError, StorageError
from streamer.storage import files
from streamer.storage.header import Header, read_header
from streamer.units import format_size

IOMode = Literal["mmap", "pread"]


class LocalSource:
    """A file on a disk, opened once: reads see the planned file even if its name is replaced. `RemoteSource` has the same methods.

    Attributes
    ----------
    io
        Whether a view is a memory map (``mmap``) or a copy in anonymous memory (``pread``).
    stamp
        Identity that must not change while a plan is carried out.
    """

    remote = False
    """Whether each read crosses a network: bytes that are read twice should then be kept."""

    _fd = -1

    def __init__(self, path: Path, io: IOMode) -> None:
        self.path = path
        self.io = io
        self._fd, st = files.open_regular(path, "a safetensors file")
        self.stamp = files.file_stamp(st)

    def header(self) -> Header:
        """Read and validate the header."""
        return read_header(self._fd, str(self.path))

    def close(self) -> None:
        """Close the descriptor; existing views stay valid."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def check_unchanged(self) -> None:
        """Raise `InputChangedError` unless the path still names the same, unmodified file."""
        try:
            now = files.file_stamp(os.stat(self.path))
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
        if length == 0:
            return memoryview(b"")
        self._check_size(at + length)
        page = at % mmap.ALLOCATIONGRANULARITY
        try:
            # Private and writable, so that torch accepts it as a tensor without a copy; nobody writes to it.
            window = mmap.mmap(
                self._fd,
                page + length,
                flags=mmap.MAP_PRIVATE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
                offset=at - page,
            )
        except ValueError:  # Python checks the size again
            self._check_size(at + length)
            raise
        except OSError as e:
            raise StorageError(
                f"{self.path}: cannot map {format_size(length)}: {e.strerror}; try --io pread"
            ) from e
        return memoryview(window)[page:]

    def read_pieces(self, pieces: Iterable[tuple[memoryview, int]]) -> None:
        """Read small pieces throughout the file one after the other, each into its buffer from its offset."""
        for out, at in pieces:
            self.read_into(out, at)

    def read_into(self, out: memoryview, at: int) -> None:
        """Read bytes from offset `at` until `out` is full, repeating calls that return fewer."""
        done = 0
        while done < len(out):
            with files.storage_errors(self.path, "read"):
                n = files.read_at(self._fd, out[done:], at + done)
            if n == 0:
                self._check_size(at + len(out))
                raise StorageError(f"{self.path}: the file ended early at byte {at + done}")
            done += n

    def prefetch(self, start: int, stop: int, end: int) -> None:
        """Do nothing: for a disk the kernel reads ahead."""

    def release(self, start: int, stop: int) -> None:
        """Drop bytes from the system's cache."""
        files.drop_cached(self._fd, start, stop - start)

    def _check_size(self, wanted: int) -> None:
        have = os.fstat(self._fd).st_size
        if have < wanted:
            raise InputChangedError(
                f"{self.path}: shrank to {format_size(have)} during the run; get the file again"
            )
