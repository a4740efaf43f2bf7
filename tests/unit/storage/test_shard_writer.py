"""Planned files: exact sizes before a byte is written, streamed in pieces, read back before they get their name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamer.errors import FormatError, InputChangedError, NumericError, StorageError
from streamer.storage.buffers import Buffer, BufferRing, Piece
from streamer.storage.header import TensorInfo
from streamer.storage.shard_writer import Shard, ShardFile, ShardPlan, index_bytes, like, plan_shard, write_shard
from streamer.storage.tensor_file import TensorFile

NAME = "model.safetensors"
DATA = {"a": bytes(range(24)), "e": b"", "b": b"\x01\x00\xff"}


@pytest.fixture
def plan() -> ShardPlan:
    return plan_shard(NAME, [("a", "F32", [2, 3]), ("e", "BF16", [0, 5]), ("b", "U8", [3])], {"format": "pt"})


def source(info: TensorInfo) -> Iterable[Piece]:
    raw = DATA[info.name]
    return (Piece(raw[i : i + 5]) for i in range(0, len(raw), 5))


def shard(plan: ShardPlan, source: Callable[[TensorInfo], Iterable[Piece]] = source) -> Shard:
    return ((info, source(info)) for info in plan.header.tensors)


def test_a_planned_file(tmp_path: Path, plan: ShardPlan) -> None:
    with ShardFile(tmp_path, plan) as file:
        for tensor, pieces in shard(plan):
            file.add(tensor, pieces)
        file.complete()
        assert not (tmp_path / NAME).exists()
        announced = file.written, file.sha256
    raw = (tmp_path / NAME).read_bytes()
    assert raw == plan.raw_header + DATA["a"] + DATA["b"]
    assert len(raw) == plan.nbytes
    assert announced == (len(raw), hashlib.sha256(raw).hexdigest())
    tensors = load_file(tmp_path / NAME)
    assert tensors["b"].tolist() == [1, 0, 255]
    assert tensors["e"].shape == (0, 5)
    assert [p.name for p in tmp_path.iterdir()] == [NAME]


def test_pieces_are_asked_for_one_at_a_time(tmp_path: Path, plan: ShardPlan) -> None:
    """In file order, and each is written before the next is made: one buffer serves them all."""
    ring = BufferRing(5, 1)
    order: list[str] = []

    def reused(info: TensorInfo) -> Iterator[Piece]:
        order.append(info.name)
        raw = DATA[info.name]
        for i in range(0, len(raw), 5):
            piece = ring.lease(len(raw[i : i + 5]))
            piece.view[:] = raw[i : i + 5]
            yield piece

    write_shard(tmp_path, plan, shard(plan, reused))
    assert order == ["a", "e", "b"]
    assert (tmp_path / NAME).read_bytes() == plan.raw_header + DATA["a"] + DATA["b"]


def test_like_is_the_same_file(tmp_path: Path) -> None:
    save_file({"x": torch.randn(3), "y": torch.arange(4)}, tmp_path / "theirs.safetensors", {"format": "pt"})
    file = TensorFile(tmp_path / "theirs.safetensors")
    copy = like("copy.safetensors", file.header)
    assert copy.header == file.header
    write_shard(tmp_path, copy, shard(copy, file.chunks))
    assert (tmp_path / "copy.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_like_keeps_what_torch_does_not_know(tmp_path: Path) -> None:
    """Sub-byte values are copied bit for bit."""
    data = os.urandom(12 + 3)
    first = plan_shard("first.safetensors", [("f4", "F4", [3, 8]), ("f6", "F6_E3M2", [4])], {})
    write_shard(tmp_path, first, shard(first, lambda t: [Piece(data[t.start : t.end])]))
    file = TensorFile(tmp_path / "first.safetensors")
    second = like("second.safetensors", file.header)
    write_shard(tmp_path, second, shard(second, file.chunks))
    assert (tmp_path / "second.safetensors").read_bytes() == (tmp_path / "first.safetensors").read_bytes()


def test_a_plan_that_cannot_be() -> None:
    with pytest.raises(FormatError, match="tensor 'a' is laid out twice"):
        plan_shard(NAME, [("a", "F32", [1]), ("a", "F32", [1])], {})


@pytest.mark.parametrize(("tensor", "change"), [("a", -1), ("a", 1), ("e", 1), ("b", -3)])
def test_a_tensor_of_another_size_stops_the_file(tmp_path: Path, plan: ShardPlan, tensor: str, change: int) -> None:
    def wrong(info: TensorInfo) -> Iterable[Piece]:
        raw = DATA[info.name]
        return [Piece(raw if info.name != tensor else (raw + b"x")[: len(raw) + change])]

    want = len(DATA[tensor])
    with pytest.raises(NumericError) as caught:
        write_shard(tmp_path, plan, shard(plan, wrong))
    assert str(caught.value) == f"tensor {tensor!r}: planned {want} bytes, got {want + change}; please report this"
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_fails(tmp_path: Path, plan: ShardPlan) -> None:
    def fails(info: TensorInfo) -> Iterator[Piece]:
        yield Piece(DATA["a"][:5])
        raise InputChangedError("gone")

    (tmp_path / NAME).write_bytes(b"old")
    with pytest.raises(InputChangedError, match="gone"):
        write_shard(tmp_path, plan, shard(plan, fails))
    assert [p.name for p in tmp_path.iterdir()] == [NAME]
    assert (tmp_path / NAME).read_bytes() == b"old"


def test_tensors_come_in_the_plans_order(tmp_path: Path, plan: ShardPlan) -> None:
    """Those of one size would take each other's place."""
    with pytest.raises(NumericError, match="tensor 'b': the plan has another one here; please report this"):
        write_shard(tmp_path, plan, reversed([*shard(plan)]))
    assert list(tmp_path.iterdir()) == []


def test_the_header_is_read_back(tmp_path: Path, plan: ShardPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that gives back something else: found before the file gets its name."""
    real = os.pread

    def other(fd: int, n: int, at: int) -> bytes:
        return real(fd, n, at).replace(b'"a"', b'"c"')

    monkeypatch.setattr(os, "pread", other)
    with pytest.raises(NumericError) as caught:
        write_shard(tmp_path, plan, shard(plan))
    words = "the header read back differs from what was written; check the disk"
    assert str(caught.value) == f"{tmp_path / NAME}: {words}"
    assert caught.value.exit_code == 7
    assert list(tmp_path.iterdir()) == []


def test_a_header_read_back_broken(tmp_path: Path, plan: ShardPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: real(fd, n, at).replace(b"F32", b"F31"))
    with pytest.raises(FormatError, match="unknown dtype 'F31'"):
        write_shard(tmp_path, plan, shard(plan))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("nth", [1, 2, 5])
def test_a_full_disk_in_mid_file(tmp_path: Path, plan: ShardPlan, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    real: Callable[..., int] = os.write
    calls: list[int] = []

    def full(fd: int, data: Buffer) -> int:
        calls.append(fd)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match=f"{NAME}: cannot write: No space left on device; free some space"):
        write_shard(tmp_path, plan, shard(plan))
    assert list(tmp_path.iterdir()) == []


def test_index_bytes() -> None:
    """The base's own index, in its own order; only total_size is ours."""
    base = {"metadata": {"note": "é", "total_size": 1}, "weight_map": {"z": "1", "a": "2"}, "more": [1.5]}
    raw = index_bytes(base, 1234)
    assert raw.endswith(b"}\n")
    tree = json.loads(raw)
    assert tree == {**base, "metadata": {"note": "é", "total_size": 1234}}
    assert list(tree) == list(base)
    assert list(tree["weight_map"]) == ["z", "a"]
    assert base["metadata"] == {"note": "é", "total_size": 1}
    for metadata in (None, [], "x"):
        assert json.loads(index_bytes({"metadata": metadata, "weight_map": {}}, 5))["metadata"] == {"total_size": 5}
