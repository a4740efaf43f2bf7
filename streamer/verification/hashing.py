"""Compute SHA-256 digests of files, two at a time: one is hashed while the other waits for the disk."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from streamer.errors import StorageError
from streamer.events import Event, Monitor

PIECE_BYTES = 1 << 20
"""Bytes to read at a time, and size of each thread's buffer; hashlib releases Python's lock while it hashes them."""

THREADS = 2

POLL_SECONDS = 0.1
"""Seconds between checks of the threads, for progress and for a request to stop."""


class _Progress:
    """Count the bytes that all threads have hashed, and tell the threads when to stop."""

    def __init__(self) -> None:
        self.done = 0
        self.stop = False
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.done += nbytes


def hash_files(paths: Mapping[Path, int], monitor: Monitor) -> dict[Path, str]:
    """Hash whole files and return their hexadecimal digests.

    Parameters
    ----------
    paths
        Files, each with its size in bytes.
    monitor
        Receives progress in bytes; its request to stop ends the hashing.

    Raises
    ------
    StorageError
        If a file cannot be read.
    """
    total, progress = sum(paths.values()), _Progress()
    largest_first = sorted(paths, key=lambda path: (-paths[path], str(path)))
    with ThreadPoolExecutor(THREADS, thread_name_prefix="streamer hash") as pool:
        digests = {path: pool.submit(_hash_file, path, progress) for path in largest_first}
        try:
            waiting = set(digests.values())
            while waiting:
                monitor.checkpoint()
                begun = next((path for path, digest in digests.items() if not digest.done()), largest_first[-1])
                count = len(digests) - len(waiting)
                # A file that grows during hashing must not end the stage's bar early.
                done = min(progress.done, total - 1)
                monitor.emit(Event("verify", begun.name, done, total, count, len(digests)))
                finished, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
                for digest in finished:
                    digest.result()
        finally:  # on an early end, abandon the files being read and do not start the others
            progress.stop = True
            pool.shutdown(cancel_futures=True)
    monitor.emit(Event("verify", "", total, total, len(digests), len(digests)))
    return {path: digest.result() for path, digest in digests.items()}


def _hash_file(path: Path, progress: _Progress) -> str:
    digest, buffer = hashlib.sha256(), bytearray(PIECE_BYTES)
    view = memoryview(buffer)
    try:
        with path.open("rb", buffering=0) as f:
            while (count := f.readinto(buffer)) and not progress.stop:
                digest.update(view[:count])
                progress.add(count)
    except OSError as e:
        raise StorageError(
            f"{path}: cannot read: {e.strerror or e}; check the disk, and run the same command again"
        ) from e
    return digest.hexdigest()
