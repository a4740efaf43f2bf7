"""The safetensors library beside us: the same files accepted and refused, the same bytes written, the same tensors read.

We may only be stricter, and only where a key stands twice.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import header_cases
import pytest
import safetensors
import torch
from helpers import like
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from seeds import vary

from streamer.errors import FormatError
from streamer.storage.atomic_file import Piece, Shard, ShardPlan, gather, plan_shard, write_shard
from streamer.storage.checkpoint import TensorFile
from streamer.storage.header import DTYPE_BITS, layout, parse_header

Verdict = list[tuple[str, str, tuple[int, ...], int]] | None
"""Name, dtype, shape and bytes of each tensor, sorted; None where the file is refused."""

TORCH = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64, "C64": torch.complex64,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


def theirs(whole: bytes) -> Verdict:
    try:
        tensors = safetensors.deserialize(whole)
    except safetensors.SafetensorError:
        return None
    return sorted((name, t["dtype"], tuple(t["shape"]), len(t["data"])) for name, t in tensors)


def ours(whole: bytes) -> tuple[Verdict, str]:
    """Our verdict, and the message where it is a refusal."""
    n = int.from_bytes(whole[:8], "little")
    if len(whole) < 8 or n > len(whole) - 8:
        return None, "length"
    try:
        header = parse_header(whole[: 8 + n], len(whole), "x")
    except FormatError as e:
        return None, str(e)
    return sorted((t.name, t.dtype, t.shape, t.nbytes) for t in header.tensors), ""


def agree(whole: bytes) -> bool:
    """Whether both take the file, or both refuse it; what both take they read alike."""
    mine, message = ours(whole)
    return mine == theirs(whole) or (mine is None and "appears twice" in message)


# Accept and refuse --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", header_cases.ACCEPTED)
def test_the_library_accepts_what_we_accept(case: str) -> None:
    whole = header_cases.ACCEPTED[case]
    assert theirs(whole) is not None
    assert agree(whole)


@pytest.mark.parametrize("case", header_cases.REFUSED)
def test_the_library_refuses_what_we_refuse(case: str) -> None:
    whole, words = header_cases.REFUSED[case]
    if "appears twice" not in words:
        assert theirs(whole) is None


def test_only_duplicate_keys_are_refused_here_alone() -> None:
    entry = header_cases.F32
    for body in (
        f'{{"a":{entry},"a":{entry}}}',
        f'{{"__metadata__":{{"k":"1","k":"2"}},"a":{entry}}}',
        f'{{"a":{entry[:-1]},"x":1,"x":2}}}}',
    ):
        whole = header_cases.file_of(body)
        assert theirs(whole) is not None
        mine, message = ours(whole)
        assert mine is None
        assert "appears twice" in message


def small() -> bytes:
    """A file with metadata, two dtypes, and every kind of token in its header."""
    _, raw = layout([("one", "BF16", [2, 2]), ("é", "U8", [3])], {"k": "v"})
    return raw + bytes(range(11))


def test_every_bit_of_a_small_header() -> None:
    """Flipped, one after the other, the length field's as well: an error, or what the library reads."""
    whole = small()
    refused = 0
    for bit in range(8 * (len(whole) - 11)):
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        assert agree(bytes(broken)), (bit, ours(bytes(broken)), theirs(bytes(broken)))
        refused += ours(bytes(broken))[0] is None
    assert (
        refused > 0.8 * 8 * (len(whole) - 11) - 8 * 20
    )  # names and metadata may change without a fault


def test_every_length_of_a_small_file() -> None:
    whole = small()
    for size in range(len(whole) + 9):
        cut = (whole + bytes(9))[:size]
        assert agree(cut)
        assert (ours(cut)[0] is not None) == (size == len(whole))


PIECES = [
    "{", "}", "[", "]", ",", ":", '"', "null", "true", "0", "-0", "1", "4", "8", "-1", "1.0", "1e400", "NaN", '""', '"a"', " ", "\n", "\0",
    "18446744073709551616", "18446744073709551615", "9223372036854775808", "9" * 320, "\\ud800", "\\u0061", "é", "\x7f", "{}", "[]",
    "[" * 130,
    '"F4"', '"BF16"', '"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"x":1,', '"x":{"y":[1e-400]},', '{"F32":null}',
    '["F32",[1],[0,4]]', '"b":["U8",[0],[0,0]],', '"b":["U8",[1],[4,5]],',
]  # fmt: skip


def broken_headers(seed: int, count: int) -> Iterator[bytes]:
    """Headers with pieces of JSON put in, cut out, or in place of others."""
    rng = random.Random(vary(seed))
    starts = [json.loads(small()[8:-11])]
    starts.append(
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {"k": "v"}}
    )
    texts = [json.dumps(s, ensure_ascii=False) for s in starts]
    for _ in range(count):
        text = rng.choice(texts)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text) + 1)
            # At a token's border a change makes another valid header more often.
            if rng.random() < 0.7:
                at = rng.choice([i for i, c in enumerate(text) if c in '{}[],:" '] or [0])
            text = text[:at] + rng.choice(["", *PIECES]) + text[at + rng.choice([0, 0, 1, 2, 4]) :]
        yield header_cases.file_of(text, rng.choice([0, 4, 11]))


def test_broken_headers() -> None:
    both = 0
    for whole in broken_headers(0, 8_000):
        assert agree(whole), (whole, ours(whole), theirs(whole))
        both += ours(whole)[0] is not None
    assert both > 40  # some of them are still valid, or the comparison would be empty


@given(st.binary(max_size=200))
def test_any_bytes(raw: bytes) -> None:
    assert agree(raw)
    assert agree(struct.pack("<Q", len(raw)) + raw)


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_is_the_librarys(dtype: str) -> None:
    for count in range(9):
        bits = count * DTYPE_BITS[dtype]
        whole = header_cases.file_of(
            f'{{"t":{{"dtype":"{dtype}","shape":[{count}],"data_offsets":[0,{bits // 8}]}}}}',
            bits // 8,
        )
        assert agree(whole)
        assert (theirs(whole) is not None) == (bits % 8 == 0)


# Write and read -----------------------------------------------------------------------------------------------------


def pour(plan: ShardPlan, data: dict[str, bytes], step: int = 7) -> Shard:
    for info in plan.header.tensors:
        raw = data[info.name]
        yield info, [Piece(raw[i : i + step]) for i in range(0, len(raw), step)]


def as_torch(raw: bytes, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    flat = (
        torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        if raw
        else torch.empty(0, dtype=torch.uint8)
    )
    return flat.view(TORCH[dtype]).reshape(shape)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60
)
@given(
    header_cases.entries(),
    st.dictionaries(st.text(), st.text(), max_size=3),
    st.randoms(use_true_random=False),
)
def test_the_library_reads_what_we_write(
    tmp_path: Path,
    tensors: list[tuple[str, str, list[int]]],
    metadata: dict[str, str],
    rng: random.Random,
) -> None:
    plan = plan_shard("model.safetensors", tensors, metadata)
    data = {t.name: rng.randbytes(t.nbytes) for t in plan.header.tensors}
    write_shard(tmp_path, plan, pour(plan, data))
    path = tmp_path / "model.safetensors"
    assert {n: bytes(t["data"]) for n, t in safetensors.deserialize(path.read_bytes())} == data
    with safe_open(path, "pt") as f:
        assert set(f.keys()) == set(data)
        assert (f.metadata() or {}) == metadata
        for t in plan.header.tensors:
            if t.dtype in TORCH:
                read = f.get_tensor(t.name)
                assert (read.dtype, tuple(read.shape)) == (TORCH[t.dtype], t.shape)
                assert torch.equal(
                    read.reshape(-1).view(torch.uint8),
                    torch.tensor(list(data[t.name]), dtype=torch.uint8),
                )


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60
)
@given(
    header_cases.entries(),
    st.dictionaries(st.text(), st.text(), max_size=3),
    st.randoms(use_true_random=False),
)
def test_we_read_what_the_library_writes(
    tmp_path: Path,
    tensors: list[tuple[str, str, list[int]]],
    metadata: dict[str, str],
    rng: random.Random,
) -> None:
    path = tmp_path / "theirs.safetensors"
    known = {n: (d, tuple(s)) for n, d, s in tensors if d in TORCH}
    written = {}
    for name, (dtype, shape) in known.items():
        raw = rng.randbytes(plan_shard("x", [("t", dtype, shape)], {}).header.data_bytes)
        written[name] = raw
    save_file(
        {n: as_torch(written[n], d, s) for n, (d, s) in known.items()}, path, metadata or None
    )
    for io in ("mmap", "pread"):
        file = TensorFile(path, io)
        assert {t.name: (t.dtype, t.shape) for t in file.header.tensors} == known
        assert dict(file.header.metadata) == metadata
        for t in file.header.tensors:
            assert bytes(file.view(t)) == written[t.name]
            assert gather(file.chunks(t, 5), t.nbytes) == written[t.name]
    # And planned again it has the same bytes, header and all: also the metadata, whose order is the file's.
    again = like(path.name, file.header)
    raw = path.read_bytes()
    assert again.raw_header == raw[: file.header.data_start]
    assert again.header == file.header
    file.close()


def test_a_planned_copy_equals_the_librarys_file(tmp_path: Path) -> None:
    """Byte for byte, from its own header's plan."""
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.arange(7),
        "empty": torch.empty(0, 4),
        "one": torch.tensor(True),
    }
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    file = TensorFile(tmp_path / "theirs.safetensors")
    ours = like("ours.safetensors", file.header)
    write_shard(tmp_path, ours, ((t, file.chunks(t)) for t in ours.header.tensors))
    assert (tmp_path / "ours.safetensors").read_bytes() == (
        tmp_path / "theirs.safetensors"
    ).read_bytes()
    file.close()
