"""Buffers are leased and released: who breaks the rule fails, and no file gets its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from streamer.storage.buffers import QUEUE, BufferRing, Piece, gather
from streamer.storage.page_cache import THREADED_BYTES
from streamer.storage.shard_writer import plan_shard, write_shard
from streamer.storage.tensor_file import TensorFile
from streamer.weights.dtypes import as_tensor

LARGE = 2 * THREADED_BYTES
"""A piece that is written and hashed by threads."""


def filled(ring: BufferRing, i: int) -> Piece:
    piece = ring.lease()
    piece.view[:] = bytes([i]) * len(piece.view)
    return piece


def test_a_ring_refuses_when_all_buffers_are_leased() -> None:
    ring = BufferRing(8, 2)
    first, second = ring.lease(), ring.lease(3)
    assert (len(first.view), len(second.view)) == (8, 3)
    with pytest.raises(
        BufferError, match="all buffers of a ring are leased, and none was released; please report this"
    ):
        ring.lease()
    second.release()
    assert len(ring.lease().view) == 8


def test_a_ring_makes_no_more_buffers_than_are_in_use() -> None:
    ring, addresses = BufferRing(8), set()
    for _ in range(9):
        with ring.lease() as data:
            addresses.add(np.frombuffer(data, np.uint8).ctypes.data)
    assert len(addresses) == 1


def test_a_late_reader_is_refused_or_reads_nan() -> None:
    piece = filled(BufferRing(64), 1)
    view = piece.view
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    tensors = [as_tensor(view, dtype, (64 // dtype.itemsize,)) for dtype in dtypes]
    piece.release()
    with pytest.raises(ValueError, match="released memoryview"):
        bytes(piece.view)
    with pytest.raises(ValueError, match="released memoryview"):
        piece.release()
    assert all(bool(t.float().isnan().all()) for t in tensors)
    assert set(view) == {255}


def keeps_the_piece() -> Iterator[Piece]:
    """Leases, and writes once more to what it gave away."""
    ring = BufferRing(LARGE)
    for i in range(2 * QUEUE):
        piece = filled(ring, i)
        yield piece
        piece.view[-1] ^= 1


def keeps_the_memory() -> Iterator[Piece]:
    """Has a buffer of its own, which it uses again too early."""
    buffer = bytearray(LARGE)
    for i in range(2 * QUEUE):
        buffer[:] = bytes([i]) * LARGE
        yield Piece(buffer)


def gives_twice() -> Iterator[Piece]:
    piece = filled(BufferRing(LARGE), 1)
    for _ in range(2 * QUEUE):
        yield piece


def hoards() -> Iterator[Piece]:
    """Leases, and gives copies."""
    ring = BufferRing(LARGE)
    for i in range(2 * QUEUE):
        yield Piece(bytes(filled(ring, i).view))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (keeps_the_piece, "changed before its release|released memoryview"),
        (keeps_the_memory, "changed before its release"),
        (gives_twice, "released memoryview"),
        (hoards, "all buffers of a ring are leased"),
    ],
)
def test_a_source_that_breaks_the_rule_makes_no_file(
    tmp_path: Path, source: Callable[[], Iterator[Piece]], words: str
) -> None:
    plan = plan_shard("f.safetensors", [("a", "U8", [2 * QUEUE * LARGE])], {})
    with pytest.raises((BufferError, ValueError), match=words):
        write_shard(tmp_path, plan, ((info, source()) for info in plan.header.tensors))
    assert list(tmp_path.iterdir()) == []


def test_chunks_are_refused_to_who_releases_none(inputs: tuple[Path, Path]) -> None:
    file = TensorFile(sorted(inputs[0].glob("*.safetensors"))[0])
    info = max(file.header.tensors, key=lambda t: t.nbytes)
    assert gather(file.chunks(info, 100), info.nbytes) == file.view(info)
    pieces = file.chunks(info, 100)
    kept = [next(pieces) for _ in range(QUEUE + 1)]
    assert b"".join(bytes(piece.view) for piece in kept) == file.view(info, 0, 100 * (QUEUE + 1))
    with pytest.raises(BufferError, match="all buffers of a ring are leased"):
        next(pieces)
