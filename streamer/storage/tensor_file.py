"""Open safetensors files, and views of their tensors that are released after use.

A file is opened read-only, once, and stays open, so that reads see the planned file even if its name is replaced. A tensor
is read through a window that maps only its own bytes, or into a buffer; dropping the view releases it.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from streamer.errors import FormatError
from streamer.storage.atomic_file import BufferRing, Piece
from streamer.storage.header import DIGEST, NO_DIGEST, IOMode, LocalSource, TensorInfo
from streamer.storage.remote_source import RemoteSource, read_manifest

__all__ = ["SAMPLE_BYTES", "IOMode", "TensorFile", "sampled_bytes"]

SAMPLE_BYTES = 4096
"""Number of bytes of each tensor that identify a model."""

HASHED_BYTES = 1 << 20
"""Number of bytes read at a time to hash a file."""

PIECES = 256
"""Number of samples read at a time: from a remote file, many are requested together."""


class TensorFile:
    """An open safetensors file with a validated header, which gives views of its tensors.

    Parameters
    ----------
    path
        The file; symlinks are followed (hub caches consist of them). If a manifest beside it names it, it is read from its URL.
    io
        ``mmap`` maps each tensor while it is used; ``pread`` copies it, for network file systems, where a map is slow
        and a page that vanishes is fatal.
    prefix
        Added to the names of all tensors.

    Attributes
    ----------
    source
        The source of its bytes.
    remote
        Whether each read crosses a network.
    """

    remote = False
    source: LocalSource | RemoteSource
    _keeps_pages = False
    _read_through = False

    def __init__(self, path: Path, io: IOMode = "mmap", prefix: str = "") -> None:
        self.path = path
        manifest = read_manifest(path.parent)
        far = None if manifest is None else manifest.files.get(path.name)
        source: LocalSource | RemoteSource = LocalSource(path, io) if far is None else RemoteSource(far)
        with contextlib.ExitStack() as undo:
            undo.callback(source.close)
            self.header = source.header().prefixed(prefix)
            undo.pop_all()
        self.source, self.io, self.stamp, self.remote = source, source.io, source.stamp, source.remote

    def close(self) -> None:
        """Close the file; existing views stay valid."""
        if hasattr(self, "source"):  # not if opening failed
            self.source.close()

    def __del__(self) -> None:
        if not sys.is_finalizing():  # modules are gone then, and files are closed
            self.close()

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError(
            f"{self.path}: is open, and a process cannot give that to another; it would close a file of the other's"
        )

    def check_unchanged(self) -> None:
        """Raise `InputChangedError` unless the path still names the same, unmodified file."""
        self.source.check_unchanged()

    def view(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> memoryview:
        """Map or read the bytes ``[start, stop)`` of a tensor, relative to its first; by default all of them.

        Raises
        ------
        InputChangedError
            If the file has become shorter than its header says.
        """
        stop = info.nbytes if stop is None else stop
        return self.source.view(self.header.data_start + info.start + start, stop - start)

    def data(self) -> memoryview:
        """Return the bytes of all tensors at once, for many small tensors that stay in use; each is a slice of the result."""
        return self.source.view(self.header.data_start, self.header.data_bytes)

    def chunks(self, info: TensorInfo, size: int = 4 << 20) -> Iterator[Piece]:
        """Yield a tensor's bytes in pieces that the caller releases, while the disk reads ahead."""
        source, first = self.source, self.header.data_start + info.start
        end = self.header.file_bytes if self._read_through else first + info.nbytes
        ring = BufferRing(min(size, info.nbytes))
        for start in range(0, info.nbytes, size):
            at, stop = first + start, first + min(start + size, info.nbytes)
            piece = ring.lease(stop - at)
            source.prefetch(at, stop, end)
            source.read_into(piece.view, at)
            if not self._keeps_pages:
                source.release(at, stop)
            yield piece

    @contextlib.contextmanager
    def read_through(self, by_several: bool) -> Iterator[None]:
        """Tell `chunks` that all tensors are read, in file order.

        Parameters
        ----------
        by_several
            Whether several readers take turns with each tensor: its pages then stay in the page cache until `release_pages`. For one
            reader, `chunks` reads ahead beyond the tensor.
        """
        self._read_through, self._keeps_pages = not by_several, by_several
        try:
            yield
        finally:
            self._read_through = self._keeps_pages = False

    def release_pages(self, stop: int) -> None:
        """Drop pages before `stop`, relative to the first tensor, from the page cache: all readers are done with them."""
        self.source.release(0, self.header.data_start + stop)

    def check_digest(self, again: str) -> None:
        """Compare the whole file with the digest in its metadata, at about 1 s per gigabyte; see `ShardPlan.sealed`.

        Parameters
        ----------
        again
            How to make the file again, for messages.

        Raises
        ------
        FormatError
            If they differ, or the file has no digest, as in versions before 0.2: such a file cannot be checked for damage.
        """
        stated = self.header.metadata.get(DIGEST)
        if stated is None:
            raise FormatError(
                f"{self.path}: expected a SHA-256 of the file in its metadata, found none, as in files of versions before 0.2; {again}"
            )
        source, at, end = self.source, self.header.data_start, self.header.file_bytes
        header = bytes(source.view(0, at))
        digest = hashlib.sha256(header.replace(stated.encode(), NO_DIGEST.encode(), 1))
        buffer = memoryview(bytearray(HASHED_BYTES))
        while at < end:
            piece = buffer[: end - at]
            source.read_into(piece, at)
            digest.update(piece)
            at += len(piece)
        if (found := digest.hexdigest()) != stated:
            raise FormatError(
                f"{self.path}: is damaged: expected SHA-256 {stated[:16]}… by its metadata, found {found[:16]}…; copy it again, or {again}"
            )

    def sample(self) -> str:
        """Compute the SHA-256 (hex) of the header and the middle `SAMPLE_BYTES` of every tensor.

        Two models of one architecture have equal headers; the samples distinguish them without reading everything. This is not a
        checksum: a change outside the samples goes unnoticed.
        """
        digest = hashlib.sha256(self.header.digest.encode())
        tensors = self.header.tensors
        for i in range(0, len(tensors), PIECES):
            pieces = []
            for t in tensors[i : i + PIECES]:
                middle = max(0, (t.nbytes - SAMPLE_BYTES) // 2)
                out = memoryview(bytearray(min(SAMPLE_BYTES, t.nbytes)))
                pieces.append((out, self.header.data_start + t.start + middle))
            self.source.read_pieces(pieces)
            for out, _ in pieces:
                digest.update(out)
        return digest.hexdigest()


def sampled_bytes(files: Iterable[TensorFile]) -> int:
    """Count the bytes that are read to identify files by headers and samples."""
    return sum(f.header.data_start + sum(min(SAMPLE_BYTES, t.nbytes) for t in f.header.tensors) for f in files)
