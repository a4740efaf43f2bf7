"""Write behind, and keep pages of large files out of the system's cache."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from streamer.storage.buffers import CHECKED, QUEUE, Piece
from streamer.storage.files import storage_errors
from streamer.storage.system import MAX_CALL_BYTES, drop_cached

THREADED_BYTES = 1 << 18
"""Pieces of at least this many bytes are hashed and written by threads; smaller ones are not worth it if no others are pending."""

LAG_BYTES = 64 << 20
"""Written pages are dropped when the file has grown by this much more: by then they are on disk."""


class Appender:
    """Appends to a file and hashes the data: one thread writes, one hashes, and the caller makes the next piece.

    Unchanged bytes take this path too: the digest needs them in memory anyway, and ``copy_file_range`` was slower
    (docs/benchmarks.md). Written pages stay in the cache only as long as the disk needs them, so their memory is reused, and
    the fsync at the end finds little left to do.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.written, self._fd, self._at = path, 0, -1, 0
        self._hash = hashlib.sha256()
        self._threads: tuple[ThreadPoolExecutor, ...] = ()
        self._pending: deque[tuple[Piece, int, tuple[Future[None], ...]]] = deque()

    @property
    def sha256(self) -> str:
        """Return the SHA-256 (hex) of the data appended so far."""
        self.flush()
        return self._hash.hexdigest()

    def append(self, piece: Piece) -> None:
        """Append a whole piece, repeating calls that write less; the piece is released when it is written and hashed.

        Up to `QUEUE` large pieces are still pending when this returns.

        Raises
        ------
        StorageError
            If the system refused this piece or an earlier one.
        """
        self.written += len(piece.view)
        if len(piece.view) < THREADED_BYTES:
            with piece as view:
                if not self._pending:
                    with storage_errors(self.path, "write"):
                        self._write(view)
                    self._hash.update(view)
                    return
                piece = Piece(bytes(view))
        self._threads = self._threads or tuple(ThreadPoolExecutor(1, "streamer write") for _ in range(2))
        self.flush(QUEUE - 1)
        (writer, hasher), view = self._threads, piece.view
        futures = writer.submit(self._write, view), hasher.submit(self._hash.update, view)
        self._pending.append((piece, zlib.crc32(view) if CHECKED else 0, futures))

    def flush(self, pieces: int = 0) -> None:
        """Wait until at most this many pieces are pending, and raise the errors of the others."""
        while len(self._pending) > pieces:
            piece, checksum, futures = self._pending.popleft()
            with storage_errors(self.path, "write"):
                for future in futures:
                    future.result()
            if CHECKED and zlib.crc32(piece.view) != checksum:
                raise BufferError("a piece of a tensor was changed before its release")
            piece.release()

    def close(self) -> None:
        """Close the file: writes that have not begun are dropped, so that none goes to a descriptor that is reused for another file."""
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)
        fd, self._fd = self._fd, -1  # a failed close has still closed the descriptor
        if fd >= 0:
            os.close(fd)

    def _write(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += os.write(self._fd, view[done : done + MAX_CALL_BYTES])
        begun, self._at = self._at, self._at + len(view)
        if len(view) >= THREADED_BYTES:
            # These pages are still dirty, so they stay, but Linux begins to write them.
            drop_cached(self._fd, begun, len(view))
            if begun >= LAG_BYTES:
                drop_cached(self._fd, begun - LAG_BYTES, len(view))
