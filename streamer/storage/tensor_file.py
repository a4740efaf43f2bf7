"""Open safetensors files, and views of their tensors that are released after use.

A file is opened read-only, once, and stays open: what is read is what was planned, even if the name is replaced. A tensor
is read through a window that maps just its own bytes, or by ``pread`` into a buffer; dropping the view releases it.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from streamer.errors import InputChangedError, StorageError
from streamer.storage.files import file_stamp, open_regular
from streamer.storage.header import Header, TensorInfo, read_header
from streamer.storage.page_cache import QUEUE, Readahead
from streamer.storage.system import read_at
from streamer.units import format_size

IOMode = Literal["mmap", "pread"]
SAMPLE_BYTES = 4096
"""Bytes of each tensor that tell a model from another."""


class TensorFile:
    """Open a safetensors file, validate its header, and give views of its tensors.

    Parameters
    ----------
    path
        The file; symlinks are followed (hub caches are made of them).
    io
        ``mmap`` maps each tensor while it is used; ``pread`` copies it, for network file systems, where a map is slow
        and a vanished page is fatal.
    """

    _fd = -1
    _keeps_pages = False

    def __init__(self, path: Path, io: IOMode = "mmap") -> None:
        self.path = path
        self.io = io
        self._fd, st = open_regular(path, "a safetensors file")
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self.stamp = file_stamp(st)
            self._readahead = Readahead(self._fd)
            self.header: Header = read_header(self._fd, str(path))
            undo.pop_all()

    def close(self) -> None:
        """Close the descriptor; views that are still alive stay valid."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()

    def check_unchanged(self) -> None:
        """Raise `InputChangedError` unless the path still names the same, unmodified file."""
        try:
            now = file_stamp(os.stat(self.path))
        except OSError as e:
            raise InputChangedError(
                f"{self.path}: vanished during the run ({e.strerror}); put it back and start again"
            ) from e
        if now != self.stamp:
            raise InputChangedError(
                f"{self.path}: changed since the run began; start again with a base that stays as it is"
            )

    def view(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> memoryview:
        """Map or read the bytes ``[start, stop)`` of a tensor, counted from its first; the whole of it by default.

        Raises
        ------
        InputChangedError
            If the file has become shorter than its header says. The size is checked before each map, since touching
            a page beyond the end would kill the process.
        """
        stop = info.nbytes if stop is None else stop
        length = stop - start
        at = self.header.data_start + info.start + start
        if self.io == "pread":
            out = bytearray(length)
            self._read_into(memoryview(out), at)
            return memoryview(out)
        return self._window(at, length)

    def _window(self, at: int, length: int) -> memoryview:
        if length == 0:
            return memoryview(b"")
        self._check_size(at + length)
        page = at % mmap.ALLOCATIONGRANULARITY
        try:
            # Private and writable, so that torch takes it as a tensor without a copy; nobody writes to it.
            window = mmap.mmap(self._fd, page + length, flags=mmap.MAP_PRIVATE,
                               prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=at - page)  # fmt: skip
        except ValueError:  # Python looks at the size once more
            self._check_size(at + length)
            raise
        except OSError as e:
            raise StorageError(f"{self.path}: cannot map {format_size(length)}: {e.strerror}; try --io pread") from e
        return memoryview(window)[page:]

    def data(self) -> memoryview:
        """Map the bytes of all tensors at once, each of which is a slice of them: for many small tensors that stay in use."""
        return self._window(self.header.data_start, self.header.data_bytes)

    def chunks(self, info: TensorInfo, size: int = 4 << 20) -> Iterator[memoryview]:
        """Yield a tensor's bytes in pieces, the disk reading ahead. A piece stays as it is until `QUEUE` more were given."""
        buffers = [memoryview(bytearray(min(size, max(0, info.nbytes - i * size)))) for i in range(QUEUE + 1)]
        for i, start in enumerate(range(0, info.nbytes, size)):
            piece = buffers[i % len(buffers)][: min(size, info.nbytes - start)]
            at = self.header.data_start + info.start + start
            self._readahead.prefetch(at, at + len(piece))
            self._read_into(piece, at)
            if not self._keeps_pages:
                self._readahead.release(at + len(piece))
            yield piece

    @contextlib.contextmanager
    def keeping_pages(self) -> Iterator[None]:
        """Keep what `chunks` reads in the page cache until `release_pages`, for several readers that take turns with each tensor."""
        self._keeps_pages = True
        try:
            yield
        finally:
            self._keeps_pages = False

    def release_pages(self, stop: int) -> None:
        """Drop from the page cache what stands before `stop`, counted from the first tensor: all readers have had it."""
        self._readahead.release(self.header.data_start + stop)

    def _check_size(self, wanted: int) -> None:
        have = os.fstat(self._fd).st_size
        if have < wanted:
            raise InputChangedError(f"{self.path}: shrank to {format_size(have)} during the run; get the file again")

    def _read_into(self, out: memoryview, at: int) -> None:
        done = 0
        while done < len(out):
            try:
                n = read_at(self._fd, out[done:], at + done)
            except OSError as e:
                raise StorageError(f"{self.path}: cannot read: {e.strerror}; run the same command again") from e
            if n == 0:
                self._check_size(at + len(out))
                raise StorageError(f"{self.path}: the file ended early at byte {at + done}")
            done += n

    def sample(self, size: int = SAMPLE_BYTES) -> str:
        """Compute the SHA-256 (hex) of the header and the middle `size` bytes of every tensor.

        Two models of one architecture have equal headers; this tells them apart without reading them. It is no
        checksum: a change outside the samples is not seen.
        """
        digest = hashlib.sha256(self.header.digest.encode())
        for t in self.header.tensors:
            middle = max(0, (t.nbytes - size) // 2)
            out = memoryview(bytearray(min(size, t.nbytes)))
            self._read_into(out, self.header.data_start + t.start + middle)
            digest.update(out)
        return digest.hexdigest()


def sampled_bytes(files: Iterable[TensorFile]) -> int:
    """Count the bytes that an identity by headers and samples reads."""
    return sum(f.header.data_start + sum(min(SAMPLE_BYTES, t.nbytes) for t in f.header.tensors) for f in files)
