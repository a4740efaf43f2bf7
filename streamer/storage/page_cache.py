"""Write behind, and leave no pages of large files in the system's cache."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from streamer.storage.system import MAX_CALL_BYTES, drop_cached

QUEUE = 3
"""Pieces being written and hashed at most. A maker that uses its buffers again takes them by turns from one more than these."""

THREADED_BYTES = 1 << 18
"""Pieces from this many bytes are hashed and written by threads; smaller ones are not worth it where nothing waits."""

LAG_BYTES = 64 << 20
"""Written pages are dropped when the file has grown this much further: by then the disk has them."""


class Appender:
    """Append to a descriptor and hash what is appended: one thread writes, one hashes, and the caller makes the next piece.

    Untouched bytes come this way too: the digest takes them through memory anyway, and ``copy_file_range`` was slower
    (docs/benchmarks.md). Pages that are written lie in the cache no longer than the disk needs: their memory is used again, and
    the fsync at the end finds little left.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._at = 0
        self._hash = hashlib.sha256()
        self._threads: tuple[ThreadPoolExecutor, ...] = ()
        self._pending: deque[tuple[Future[None], ...]] = deque()

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of what has been appended so far."""
        self.flush()
        return self._hash.hexdigest()

    def append(self, view: memoryview) -> None:
        """Append bytes, all of them, whatever the system does in one call.

        A large piece may still be in hand when this returns: leave its bytes as they are until `QUEUE` more have been appended,
        or `flush` has returned.

        Raises
        ------
        OSError
            What the system refused, this piece or one before it.
        """
        if len(view) < THREADED_BYTES:
            if not self._pending:
                self._write(view)
                self._hash.update(view)
                return
            view = memoryview(bytes(view))
        self._threads = self._threads or tuple(ThreadPoolExecutor(1, thread_name_prefix=f"write-{i}") for i in (1, 2))
        self.flush(QUEUE - 1)
        writer, hasher = self._threads
        self._pending.append((writer.submit(self._write, view), hasher.submit(self._hash.update, view)))

    def flush(self, pieces: int = 0) -> None:
        """Wait until at most so many pieces are in hand, and raise what became of the others."""
        while len(self._pending) > pieces:
            for future in self._pending.popleft():
                future.result()

    def close(self) -> None:
        """Stop the threads: what has not been begun is left out, and nothing writes to the descriptor any more."""
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)

    def drop_pages(self) -> None:
        """Drop the last pages of a large file from the cache, after its fsync."""
        if self._at > LAG_BYTES:
            drop_cached(self._fd, 0, self._at)

    def _write(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += os.write(self._fd, view[done : done + MAX_CALL_BYTES])
        begun, self._at = self._at, self._at + len(view)
        if len(view) >= THREADED_BYTES:
            # Still dirty, these pages stay, but Linux begins to write them.
            drop_cached(self._fd, begun, len(view))
            if begun >= LAG_BYTES:
                drop_cached(self._fd, begun - LAG_BYTES, len(view))
