"""Large pieces are hashed and written by a thread: nothing is lost, late errors are raised, no thread outlives the file."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from pathlib import Path

import pytest

from streamer.errors import StorageError
from streamer.storage import atomic
from streamer.storage.atomic import BESIDE_BYTES, AtomicFile
from streamer.storage.tensorfile import TensorFile

LARGE = 2 * BESIDE_BYTES


def writers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("write")]


def slow_write(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make each large write take long enough for the caller to be ahead; the descriptors it wrote to."""
    real, seen = os.write, []

    def write(fd: int, data: memoryview) -> int:
        if len(data) >= BESIDE_BYTES:
            time.sleep(0.05)
            seen.append(fd)
        return real(fd, data)

    monkeypatch.setattr(atomic.os, "write", write)
    return seen


def test_pieces_of_every_size_arrive_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_write(monkeypatch)
    sizes = [5, LARGE, LARGE, 3, LARGE, BESIDE_BYTES, BESIDE_BYTES - 1, 0, LARGE]
    pieces = [bytes([65 + i]) * size for i, size in enumerate(sizes)]
    with AtomicFile(tmp_path / "f", sum(sizes)) as f:
        for i, piece in enumerate(pieces):
            f.write(piece)
            assert f.written == sum(sizes[: i + 1])
        assert f.sha256 == hashlib.sha256(b"".join(pieces)).hexdigest()  # of all of it, the piece in hand too
    assert (tmp_path / "f").read_bytes() == b"".join(pieces)
    assert writers() == []


def test_two_buffers_by_turns_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_write(monkeypatch)
    buffers = [bytearray(LARGE), bytearray(LARGE)]
    with AtomicFile(tmp_path / "f", 6 * LARGE) as f:
        for i in range(6):
            buffers[i % 2][:] = bytes([i]) * LARGE
            f.write(buffers[i % 2])
    assert (tmp_path / "f").read_bytes() == b"".join(bytes([i]) * LARGE for i in range(6))


def test_chunks_keep_to_two_buffers(job: tuple[Path, Path]) -> None:
    file = TensorFile(sorted(job[0].glob("*.safetensors"))[0])
    info = max(file.header.tensors, key=lambda t: t.nbytes)
    expected, previous, got = bytes(file.view(info)), b"", b""
    pieces: list[memoryview] = []
    for piece in file.chunks(info, size=1000):
        if pieces:
            assert bytes(pieces[-1]) == previous  # the one before is still whole
        pieces.append(piece)
        previous = bytes(piece)
        got += previous
    assert len(pieces) > 3
    assert got == expected


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

    monkeypatch.setattr(atomic.os, "write", write)
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
