"""The header validator: what passes, what fails and with which words, and that nothing makes it crash or hang; strict JSON."""

import contextlib
import errno
import json
import os
import struct
import time
from pathlib import Path

import pytest
from faults import failing
from header_cases import ACCEPTED, REFUSED, entries, file_of
from hypothesis import given
from hypothesis import strategies as st

from streamer.errors import FormatError, StorageError
from streamer.storage.files import strict_json
from streamer.storage.header import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    Header,
    layout,
    parse_header,
    read_header,
    tensor_nbytes,
)


def parsed(whole: bytes) -> Header:
    (n,) = struct.unpack("<Q", whole[:8])
    return parse_header(whole[: 8 + n], len(whole), "x.safetensors")


def read(path: Path, whole: bytes) -> Header:
    path.write_bytes(whole)
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_header(fd, str(path))
    finally:
        os.close(fd)


def two_tensors() -> bytes:
    _, raw = layout([("one", "BF16", [2, 2]), ("two", "U8", [3])], {"format": "pt"})
    return raw + bytes(11)


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(case: str) -> None:
    header = parsed(ACCEPTED[case])
    assert header.file_bytes == len(ACCEPTED[case])
    at = 0
    for t in header.tensors:
        assert (t.start, t.nbytes) == (at, tensor_nbytes(t.dtype, t.shape))
        at = t.end
    assert at == header.data_bytes


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    whole, words = REFUSED[case]
    with pytest.raises(FormatError) as caught:
        parsed(whole)
    message = str(caught.value)
    assert message.startswith("x.safetensors: bad safetensors header: ")
    assert words in message
    assert message.endswith("; get the file again")
    assert "\n" not in message
    assert caught.value.exit_code == 3


def test_a_message_is_short_whatever_the_header() -> None:
    name = "x" * 1_000_000
    with pytest.raises(FormatError) as caught:
        parsed(file_of(f'{{"{name}":null}}'))
    assert len(str(caught.value)) < 600


def test_header_fields() -> None:
    header = parsed(ACCEPTED["out of order"])
    assert [t.name for t in header.tensors] == ["a", "b"]
    assert header.by_name["b"].start == 4
    assert header.metadata == {}
    assert len(header.digest) == 64
    assert parsed(ACCEPTED["metadata"]).metadata == {"k": "v"}


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_by_its_bits(dtype: str) -> None:
    assert tensor_nbytes(dtype, [2, 4]) == DTYPE_BITS[dtype]
    header, raw = layout([("t", dtype, [2, 4])])
    assert header.file_bytes == len(raw) + DTYPE_BITS[dtype]
    if DTYPE_BITS[dtype] < 8:
        with pytest.raises(ValueError, match=f"1 values of {dtype} do not fill whole bytes"):
            tensor_nbytes(dtype, [])


# Files --------------------------------------------------------------------------------------------------------------


def test_truncated_or_padded_at_every_boundary(tmp_path: Path) -> None:
    """At each end of a part, one byte before and one after: the words say which part is short."""
    whole = two_tensors()
    start = len(whole) - 11
    words = {
        0: "expected a safetensors file, found 0 B", 7: "expected a safetensors file, found 7 B",
        8: "not a safetensors file, or truncated", 9: "not a safetensors file, or truncated",
        start - 1: "not a safetensors file, or truncated",
        start: f"expected {len(whole)} B by its header, found {start} B: the file is truncated",
        start + 1: "the file is truncated", start + 7: "the file is truncated", start + 8: "the file is truncated",
        start + 9: "the file is truncated", len(whole) - 1: "the file is truncated",
        len(whole) + 1: "the file is too long", len(whole) + 4096: "the file is too long",
    }  # fmt: skip
    assert read(tmp_path / "whole", whole).file_bytes == len(whole)
    for size, expected in words.items():
        with pytest.raises(FormatError) as caught:
            read(tmp_path / "cut", (whole + bytes(4096))[:size])
        assert expected in str(caught.value), size
        assert "get it again" in str(caught.value)


def test_every_bit_of_the_length_field(tmp_path: Path) -> None:
    whole = two_tensors()
    began = time.process_time()
    for bit in range(64):
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError, match=r"get (it|the file) again"):
            read(tmp_path / "broken", bytes(broken))
    assert time.process_time() - began < 5


def test_a_length_over_the_limit_is_not_read(tmp_path: Path) -> None:
    """A sparse file as large as its length field claims: refused by the limit, without reading a gigabyte."""
    path = tmp_path / "sparse"
    with path.open("wb") as f:
        f.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        f.truncate(8 + MAX_HEADER_BYTES + 1 + 10)
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(FormatError, match=f"its length field says {MAX_HEADER_BYTES + 1} B of header"):
            read_header(fd, str(path))
    finally:
        os.close(fd)


@pytest.mark.parametrize(("content", "hint"), [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer: run `git lfs pull`"),
    (b"<!DOCTYPE html><html><body>401</body></html>", "a web page"),
    (b"\n  <?xml version='1.0'?><Error/>", "a web page"),
    (b'{\n "schema": "streamer.evaluation/1"}', "JSON; check the path"),
    (b"PK\x03\x04" + bytes(60), "a pickle: convert it to safetensors"),
    (b"\x80\x02}q\x00(X\x01\x00\x00\x00a" + bytes(60), "a pickle: convert it to safetensors"),
])  # fmt: skip
def test_what_stands_where_a_shard_should_be(tmp_path: Path, content: bytes, hint: str) -> None:
    with pytest.raises(FormatError) as caught:
        read(tmp_path / "model.safetensors", content)
    assert f": expected a safetensors file, found {hint}" in str(caught.value)


def test_a_length_that_looks_like_text_is_a_length(tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        read(tmp_path / "model.safetensors", (31_520).to_bytes(8, "little") + b'{"a":' + bytes(60))  # b" {" and zeros
    assert "JSON" not in str(caught.value)


def test_short_reads_are_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: real(fd, min(n, 5) if at >= 8 else n, at))
    assert len(read(tmp_path / "f", two_tensors()).tensors) == 2


def test_a_file_that_ends_inside_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shrank after its size was taken: an error, not an endless loop."""
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: real(fd, n, at) if at < 8 else b"")
    with pytest.raises(FormatError, match="the file ended inside its header; get it again"):
        read(tmp_path / "f", two_tensors())


def test_a_disk_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pread", failing(errno.EIO))
    with pytest.raises(StorageError, match="f: cannot read: Input/output error"):
        read(tmp_path / "f", two_tensors())


@given(entries(), st.dictionaries(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8"))))
def test_layout_is_read_back(tensors: list[tuple[str, str, list[int]]], metadata: dict[str, str]) -> None:
    header, raw = layout(tensors, metadata)
    again = parse_header(raw, header.file_bytes, "x")
    assert again == header
    assert [(t.name, t.dtype, list(t.shape)) for t in again.tensors] == tensors
    assert dict(again.metadata) == metadata
    assert len(raw) % 8 == 0


def test_layout_bytes() -> None:
    """Golden: compact JSON in the given order, metadata first, padded with spaces."""
    _, raw = layout([("ü", "BF16", [2, 2]), ("b", "U8", [])], {"format": "pt"})
    body = (
        '{"__metadata__":{"format":"pt"},"ü":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]},'
        '"b":{"dtype":"U8","shape":[],"data_offsets":[8,9]}}'
    ).encode()
    body += b" " * (-len(body) % 8)
    assert raw == struct.pack("<Q", len(body)) + body


def test_layout_refuses_what_could_not_be_read() -> None:
    with pytest.raises(FormatError, match="tensor 'a' is laid out twice"):
        layout([("a", "F32", [1]), ("a", "F32", [1])])
    with pytest.raises(FormatError, match="__metadata__ is not a map"):
        layout([("__metadata__", "F32", [1])])
    with pytest.raises(ValueError, match="unknown dtype 'F31'"):
        layout([("a", "F31", [1])])


def test_layout_keeps_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamer.storage.header.MAX_HEADER_BYTES", 64)
    layout([("a", "U8", [1])])
    with pytest.raises(FormatError, match="over the format's limit of 64"):
        layout([("a" * 30, "U8", [1])])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(JSON)
def test_strict_json_is_json(value: object) -> None:
    assert strict_json(json.dumps(value).encode()) == value


@given(st.binary(max_size=60))
def test_strict_json_fails_by_value_error_only(raw: bytes) -> None:
    with contextlib.suppress(ValueError):
        strict_json(raw)
