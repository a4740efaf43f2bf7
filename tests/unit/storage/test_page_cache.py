"""Large pieces are hashed and written by threads: nothing is lost, late errors are raised, no thread outlives the file.

And what passes through the system's cache does not stay there.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from streamer.errors import StorageError
from streamer.storage import page_cache, system
from streamer.storage.atomic_file import AtomicFile
from streamer.storage.buffers import QUEUE, BufferRing
from streamer.storage.byte_source import LocalSource
from streamer.storage.page_cache import LAG_BYTES, THREADED_BYTES

LARGE = 2 * THREADED_BYTES
STEP_BYTES = 1 << 20


def writers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("streamer write")]


def slow_write(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make each large write take long enough for the caller to be ahead; the descriptors it wrote to."""
    real, seen = os.write, []

    def write(fd: int, data: memoryview) -> int:
        if len(data) >= THREADED_BYTES:
            time.sleep(0.05)
            seen.append(fd)
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    return seen


def test_pieces_of_every_size_arrive_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_write(monkeypatch)
    sizes = [5, LARGE, LARGE, 3, LARGE, THREADED_BYTES, THREADED_BYTES - 1, 0, LARGE]
    pieces = [bytes([65 + i]) * size for i, size in enumerate(sizes)]
    with AtomicFile(tmp_path / "f", sum(sizes)) as f:
        for i, piece in enumerate(pieces):
            f.write(piece)
            assert f.written == sum(sizes[: i + 1])
        assert f.sha256 == hashlib.sha256(b"".join(pieces)).hexdigest()  # of all of it, the piece in hand too
    assert (tmp_path / "f").read_bytes() == b"".join(pieces)
    assert writers() == []


def test_no_write_is_asked_for_more_than_every_system_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = os.write, []
    monkeypatch.setattr(page_cache, "MAX_CALL_BYTES", THREADED_BYTES)
    monkeypatch.setattr(os, "write", lambda fd, data: asked.append(len(data)) or real(fd, data))
    piece = os.urandom(2 * THREADED_BYTES + 5)
    with AtomicFile(tmp_path / "f", len(piece)) as f:
        f.write(piece)
    assert (tmp_path / "f").read_bytes() == piece
    assert asked == [THREADED_BYTES, THREADED_BYTES, 5]


def test_a_ring_of_one_buffer_more_than_is_in_hand_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_write(monkeypatch)
    ring, rounds = BufferRing(LARGE), 3 * (QUEUE + 1)
    with AtomicFile(tmp_path / "f", rounds * (LARGE + 1)) as f:
        for i in range(rounds):
            piece = ring.lease()
            piece.view[:] = bytes([i]) * LARGE
            f.append(piece)
            small = bytearray([i])
            f.write(small)
            small[0] = 255  # a small piece may be changed at once
    assert (tmp_path / "f").read_bytes() == b"".join(bytes([i]) * (LARGE + 1) for i in range(rounds))


def test_a_slow_disk_holds_the_caller_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = slow_write(monkeypatch)
    with AtomicFile(tmp_path / "f", 10 * LARGE) as f:
        for i in range(10):
            f.write(bytes(LARGE))
            assert i + 1 - len(seen) <= QUEUE


@pytest.mark.parametrize("at", [1, 2])
def test_what_the_system_refuses_is_raised_though_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    real, calls = os.write, []

    def write(fd: int, data: memoryview) -> int:
        calls.append(len(data))
        if len(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    with (  # noqa: PT012  # the error comes with the next call, or at the end
        pytest.raises(StorageError, match=r"f: cannot write: No space left on device; free some space"),
        AtomicFile(tmp_path / "f", 2 * LARGE) as f,
    ):
        f.write(bytes(LARGE))
        f.write(bytes(LARGE))
    assert list(tmp_path.iterdir()) == []
    assert writers() == []


def test_a_caller_that_fails_leaves_no_thread_that_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = slow_write(monkeypatch)
    with pytest.raises(KeyError), AtomicFile(tmp_path / "f", LARGE) as f:  # noqa: PT012  # what is tested is the block
        f.write(bytes(LARGE))
        raise KeyError("the caller's")
    assert len(seen) == 1  # it was written before the descriptor was closed
    assert writers() == []
    assert list(tmp_path.iterdir()) == []


MOST_LEFT = 1 / 8
"""Share of a file that may stay in the cache: the system keeps pages that are busy, such as those of a commit of its own journal."""


def cached(path: Path) -> list[bool]:
    """Whether each step of a file lies in the cache, by its first byte."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # or the first question brings in what the next ones ask for

    def there(at: int) -> bool:
        try:
            return os.preadv(fd, [bytearray(1)], at, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False

    try:
        return [there(at) for at in range(0, os.fstat(fd).st_size, STEP_BYTES)]
    finally:
        os.close(fd)


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    """A file on the disk that the cache does not hold."""
    path = tmp_path / "large"
    path.write_bytes(os.urandom(STEP_BYTES) * 16)
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    try:
        if any(cached(path)):
            pytest.skip("this file system keeps its files in memory")
    except OSError:
        pytest.skip("this file system does not tell what the cache holds")
    return path


def test_what_is_read_is_dropped_behind(cold: Path) -> None:
    source, piece = LocalSource(cold, "pread"), memoryview(bytearray(STEP_BYTES // 2 - 1))
    for at in range(0, 16 * STEP_BYTES, len(piece)):
        part = piece[: 16 * STEP_BYTES - at]
        source.read_into(part, at)
        source.release(at, at + len(part))
    source.close()
    assert np.mean(cached(cold)) <= MOST_LEFT


def test_advice_that_is_refused_is_no_error(cold: Path) -> None:
    fd = os.open(cold, os.O_RDONLY)
    os.close(fd)
    system.drop_cached(fd, 0, STEP_BYTES)


def test_a_large_file_is_not_left_in_the_cache(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = LAG_BYTES + 8 * LARGE
    path = cold.parent / "written"
    with AtomicFile(path, size) as f:
        for _ in range(size // LARGE):
            f.write(bytes(LARGE))
    assert np.mean(cached(path)) <= MOST_LEFT
    with AtomicFile(path, LARGE) as f:
        f.write(bytes(LARGE))
    assert all(cached(path))  # a small one is
