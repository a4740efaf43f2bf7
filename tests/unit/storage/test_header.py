"""The header validator: what passes, what fails and with which words, and that nothing makes it crash or hang; strict JSON."""

import errno
import os
import struct
from pathlib import Path

import pytest
from faults import failing
from header_cases import ACCEPTED, REFUSED, file_of

from streamer.errors import FormatError, StorageError
from streamer.storage.header import (
    MAX_HEADER_BYTES,
    Header,
    layout,
    parse_header,
    read_header,
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


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_header_is_refused_with_the_reason(case: str) -> None:
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


def test_the_fields_of_a_header_are_read() -> None:
    header = parsed(ACCEPTED["out of order"])
    assert [t.name for t in header.tensors] == ["a", "b"]
    assert header.by_name["b"].start == 4
    assert header.metadata == {}
    assert len(header.digest) == 64
    assert parsed(ACCEPTED["metadata"]).metadata == {"k": "v"}


# Files --------------------------------------------------------------------------------------------------------------


def test_a_length_over_the_limit_is_not_read(tmp_path: Path) -> None:
    """A sparse file as large as its length field claims: refused by the limit, without reading a gigabyte."""
    path = tmp_path / "sparse"
    with path.open("wb") as f:
        f.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        f.truncate(8 + MAX_HEADER_BYTES + 1 + 10)
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(
            FormatError, match=f"its length field says {MAX_HEADER_BYTES + 1} B of header"
        ):
            read_header(fd, str(path))
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        b"<!DOCTYPE html><html><body>401</body></html>",
        b'{\n "schema": "streamer.evaluation/1"}',
        b"PK\x03\x04" + bytes(60),
    ],
)
def test_what_stands_where_a_shard_should_be_is_shown(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        read(tmp_path / "model.safetensors", content)
    assert f": not a safetensors file, or truncated: begins with {content[:24]!r}, " in str(
        caught.value
    )


def test_short_reads_are_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: real(fd, min(n, 5) if at >= 8 else n, at))
    assert len(read(tmp_path / "f", two_tensors()).tensors) == 2


def test_a_file_that_ends_inside_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shrank after its size was taken: an error, not an endless loop."""
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: real(fd, n, at) if at < 8 else b"")
    with pytest.raises(FormatError, match="the file ended inside its header; get it again"):
        read(tmp_path / "f", two_tensors())


def test_a_read_error_in_a_header_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pread", failing(errno.EIO))
    with pytest.raises(StorageError, match="f: cannot read: Input/output error"):
        read(tmp_path / "f", two_tensors())


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
