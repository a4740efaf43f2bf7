"""Planned files: exact sizes before a byte is written, streamed in pieces from leased buffers, read back before they get their name."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import streamer
from streamer import errors
from streamer.storage.atomic_file import (
    QUEUE,
    THREADED_BYTES,
    BufferRing,
    Piece,
    Shard,
    ShardPlan,
    index_bytes,
    plan_shard,
    write_shard,
)
from streamer.storage.header import TensorInfo
from streamer.weights.base import as_tensor

NAME = "model.safetensors"
DATA = {"a": bytes(range(24)), "e": b"", "b": b"\x01\x00\xff"}


@pytest.fixture
def plan() -> ShardPlan:
    return plan_shard(
        NAME, [("a", "F32", [2, 3]), ("e", "BF16", [0, 5]), ("b", "U8", [3])], {"format": "pt"}
    )


def source(info: TensorInfo) -> Iterable[Piece]:
    raw = DATA[info.name]
    return (Piece(raw[i : i + 5]) for i in range(0, len(raw), 5))


def shard(plan: ShardPlan, source: Callable[[TensorInfo], Iterable[Piece]] = source) -> Shard:
    return ((info, source(info)) for info in plan.header.tensors)


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


@pytest.mark.parametrize(("tensor", "change"), [("a", -1), ("a", 1), ("e", 1), ("b", -3)])
def test_a_tensor_of_another_size_stops_the_file(
    tmp_path: Path, plan: ShardPlan, tensor: str, change: int
) -> None:
    def wrong(info: TensorInfo) -> Iterable[Piece]:
        raw = DATA[info.name]
        return [Piece(raw if info.name != tensor else (raw + b"x")[: len(raw) + change])]

    want = len(DATA[tensor])
    with pytest.raises(errors.NumericError) as caught:
        write_shard(tmp_path, plan, shard(plan, wrong))
    assert (
        str(caught.value)
        == f"tensor {tensor!r}: planned {want} bytes, got {want + change}; please report this"
    )
    assert list(tmp_path.iterdir()) == []


def test_tensors_come_in_the_plans_order(tmp_path: Path, plan: ShardPlan) -> None:
    """Those of one size would take each other's place."""
    with pytest.raises(
        errors.NumericError, match="tensor 'b': the plan has another one here; please report this"
    ):
        write_shard(tmp_path, plan, reversed([*shard(plan)]))
    assert list(tmp_path.iterdir()) == []


def test_the_header_is_read_back(
    tmp_path: Path, plan: ShardPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that gives back something else: found before the file gets its name."""
    real = os.pread

    def other(fd: int, n: int, at: int) -> bytes:
        return real(fd, n, at).replace(b'"a"', b'"c"')

    monkeypatch.setattr(os, "pread", other)
    with pytest.raises(errors.NumericError) as caught:
        write_shard(tmp_path, plan, shard(plan))
    words = "the header read back differs from what was written; check the disk"
    assert str(caught.value) == f"{tmp_path / NAME}: {words}"
    assert caught.value.exit_code == 7
    assert list(tmp_path.iterdir()) == []


def test_index_bytes() -> None:
    """The base's own index, in its own order; only total_size is ours."""
    base = {
        "metadata": {"note": "é", "total_size": 1},
        "weight_map": {"z": "1", "a": "2"},
        "more": [1.5],
    }
    raw = index_bytes(base, 1234)
    assert raw.endswith(b"}\n")
    tree = json.loads(raw)
    assert tree == {**base, "metadata": {"note": "é", "total_size": 1234}}
    assert list(tree) == list(base)
    assert list(tree["weight_map"]) == ["z", "a"]
    assert base["metadata"] == {"note": "é", "total_size": 1}
    for metadata in (None, [], "x"):
        assert json.loads(index_bytes({"metadata": metadata, "weight_map": {}}, 5))["metadata"] == {
            "total_size": 5
        }


MIXED = {
    "a": torch.arange(15.0).reshape(5, 3), "b": torch.arange(6.0).reshape(3, 2).T.to(torch.bfloat16), "c": torch.arange(5),
    "d": torch.tensor([True, False, True]), "e": torch.arange(9.0).to(torch.float8_e4m3fn), "f": torch.tensor([1 + 2j, 3 - 1j]),
    "g": torch.empty(0, 5), "h": torch.tensor(3.0, dtype=torch.float64), "i": torch.zeros(2)[::2],
}  # fmt: skip
"""Tensors of many dtypes, one of them not contiguous."""


@pytest.mark.parametrize("raw", [False, True])
def test_the_public_writer_writes_what_safetensors_does(tmp_path: Path, raw: bool) -> None:
    ours = tmp_path / "ours.safetensors"
    theirs = tmp_path / "theirs.safetensors"
    save_file({name: t.clone().contiguous() for name, t in MIXED.items()}, theirs, {"format": "pt"})
    tensors = dict(streamer.read_tensors(theirs))
    entries = [(name, t.dtype, t.shape) for name, t in tensors.items()]
    data = {
        name: t.flatten().view(torch.uint8).numpy().tobytes() if raw else MIXED[name]
        for name, t in tensors.items()
    }
    streamer.write_safetensors(ours, entries, data.items(), metadata={"format": "pt"})
    assert ours.read_bytes() == theirs.read_bytes()
    for read in (tensors, dict(streamer.read_tensors(ours))):
        assert all(t.dtype == MIXED[n].dtype and torch.equal(t, MIXED[n]) for n, t in read.items())
    assert tensors.keys() == MIXED.keys()


def test_the_public_writer_makes_shards(tmp_path: Path) -> None:
    """As a loader of models has them; an array that its owner fills again for the next tensor is no trap."""
    out = tmp_path / "out"
    array = np.empty((300, 1000), np.float32)
    entries = [(f"t{i}", array.dtype, array.shape) for i in range(5)]

    def tensors(names: Iterable[str]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        for name in names:
            array.fill(int(name[1]))
            yield name, array

    streamer.write_safetensors(
        out, entries, tensors([e[0] for e in entries]), max_shard_bytes=2 * array.nbytes
    )
    shards = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(p.name for p in out.iterdir()) == [
        *shards,
        "model.safetensors.index.json",
        "streamer.json",
    ]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 5 * array.nbytes}
    loaded = {name: t for shard in shards for name, t in load_file(out / shard).items()}
    assert {name: index["weight_map"][name] for name in loaded} == {
        f"t{i}": shards[i // 2] for i in range(5)
    }
    for name, tensor in streamer.read_tensors(out):
        assert torch.equal(tensor, loaded[name])
        assert bool((tensor == int(name[1])).all())
    for named in (entries, entries[:1]):
        with pytest.raises(errors.OutputExistsError):
            streamer.write_safetensors(
                out, named, tensors(["t0"]), max_shard_bytes=2 * array.nbytes
            )
    streamer.write_safetensors(out, entries[:1], tensors(["t0"]), overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["model.safetensors", "streamer.json"]


def test_bytes_of_a_dtype_that_torch_lacks(tmp_path: Path) -> None:
    entries = [("q", "F4", (2, 3))]
    streamer.write_safetensors(tmp_path / "a.safetensors", entries, [("q", b"abc")])
    streamer.write_safetensors(
        tmp_path / "b.safetensors", entries, streamer.read_tensors(tmp_path / "a.safetensors")
    )
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


F23 = ("x", "F32", (2, 3))
WELL = ("x", torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("kind", "entries", "tensors", "words"),
    [
        (errors.UsageError, [F23, F23], [], "entries and metadata: tensor 'x' is laid out twice"),
        (
            errors.UsageError,
            [("x", float, (1,))],
            [],
            "entry ('x', <class 'float'>, (1,)): unknown dtype",
        ),
        *[
            (
                errors.UsageError,
                [F23],
                bad,
                f"tensors: expected pairs (name, tensor), as a dict's items(), found {kind}",
            )
            for bad, kind in [
                ({"xy": 1}, "str"),
                (np.zeros((2, 2)), "ndarray"),
                ([("x",)], "tuple"),
                ([(*WELL, 1)], "tuple"),
                ([(1, WELL)], "tuple"),
                ([WELL, "no"], "str"),
                ([WELL, None], "NoneType"),
            ]
        ],
        (
            errors.MismatchError,
            [F23],
            [("x", np.ma.zeros((2, 3), "f4"))],
            "tensor 'x': expected plain values in memory, found a masked",
        ),
        (
            errors.UsageError,
            [("x", "F33", (1,))],
            [],
            "entry ('x', 'F33', (1,)): unknown dtype 'F33'",
        ),
        (
            errors.UsageError,
            [("x", "F4", (1,))],
            [],
            "entry ('x', 'F4', (1,)): 1 values of F4 do not fill whole bytes",
        ),
        (
            errors.UsageError,
            [("x", "U8", (-1,))],
            [],
            "entry ('x', 'U8', (-1,)): the name is the metadata's, or a size is negative",
        ),
        (
            errors.UsageError,
            ["x"],
            [],
            "entry 'x': not enough values to unpack (expected 3, got 1)",
        ),
        (
            errors.MismatchError,
            [F23, ("y", "U8", ())],
            [WELL],
            "tensor 'y': expected next, found 'no more tensors'; give the tensors",
        ),
        (
            errors.MismatchError,
            [F23],
            [("z", b"")],
            "tensor 'x': expected next, found 'z'; give the tensors",
        ),
        (
            errors.MismatchError,
            [F23],
            [WELL, ("y", b"")],
            "tensor 'y': has no entry; give each tensor an entry, in the same order",
        ),
        (
            errors.MismatchError,
            [F23],
            [("x", torch.zeros(3, 2))],
            "tensor 'x': expected F32 [2, 3] by its entry, found F32 [3, 2]",
        ),
        (
            errors.MismatchError,
            [F23],
            [("x", np.zeros((2, 3), ">f4"))],
            "tensor 'x': expected F32 [2, 3] by its entry, found >f4 [2, 3]",
        ),
        (
            errors.MismatchError,
            [F23],
            [("x", bytes(23))],
            "tensor 'x': expected 24 bytes by its entry, found 23 bytes",
        ),
        (
            errors.MismatchError,
            [F23],
            [("x", [1])],
            "tensor 'x': expected F32 [2, 3] by its entry, found <class 'list'> []",
        ),
        (
            errors.MismatchError,
            [F23],
            [("x", torch.zeros(2, 3, device="meta"))],
            "tensor 'x': expected plain values in memory; Cannot copy",
        ),
    ],
)
@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_the_public_writer_refuses(
    tmp_path: Path,
    name: str,
    kind: type[errors.StreamerError],
    entries: list[Any],
    tensors: list[Any],
    words: str,
) -> None:
    with pytest.raises(errors.StreamerError) as caught:
        streamer.write_safetensors(tmp_path / name, entries, iter(tensors))
    assert type(caught.value) is kind
    assert str(caught.value).startswith(words)
    assert not [*tmp_path.rglob("*.safetensors"), *tmp_path.rglob("*.partial")]
    streamer.write_safetensors(tmp_path / name, [F23], [WELL])  # the mistake corrected
    assert dict(streamer.read_tensors(tmp_path / name)).keys() == {"x"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metadata": {"a": 1}}, "metadata: expected strings by name, found {'a': 1}"),
        ({"metadata": {1: "a"}}, "metadata: expected strings by name, found {1: 'a'}"),
        ({"metadata": ["ab"]}, "metadata: expected strings by name, found ['ab']"),
        ({"metadata": {"a": "\udc80"}}, "entries and metadata: 'utf-8' codec can't encode"),
        ({"max_shard_bytes": 0}, "max_shard_bytes: expected 1 or more, found 0"),
    ],
)
def test_the_public_writer_refuses_an_option(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(errors.UsageError) as caught:
        streamer.write_safetensors(tmp_path / "out", [F23], [WELL], **options)
    assert str(caught.value).startswith(words)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("dtype", [np.float32, np.dtype("f4"), "float32", torch.float32])
def test_an_entry_takes_a_dtype_in_each_spelling(tmp_path: Path, dtype: object) -> None:
    streamer.write_safetensors(tmp_path / "a.safetensors", [("x", dtype, (2, 3))], [WELL])
    assert load_file(tmp_path / "a.safetensors")["x"].dtype == torch.float32


LARGE = 2 * THREADED_BYTES
"""A piece that is written and hashed by threads."""


def filled(ring: BufferRing, i: int) -> Piece:
    piece = ring.lease()
    piece.view[:] = bytes([i]) * len(piece.view)
    return piece


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
