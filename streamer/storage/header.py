"""Validate safetensors headers, with the same validator for reading and writing.

A file is an 8-byte little-endian length N, N bytes of JSON, then the data. The JSON maps each tensor's name to
``{"dtype", "shape", "data_offsets"}``, with offsets relative to the data, and ``__metadata__`` to a map of strings.
Sorted by offset, tensors tile the data exactly. A header is validated completely before any part of it is used. The
validator accepts what the safetensors library accepts, except duplicate keys, of which the library silently uses the last.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from streamer.errors import FormatError
from streamer.storage import files
from streamer.units import format_size, format_sizes, quoted

MAX_HEADER_BYTES = 100_000_000
"""Largest N, which is the safetensors library's own limit."""

DIGEST = "sha256"
"""Metadata key of a digest of the whole file."""

NO_DIGEST = "0" * 64
"""The value in its place while the digest is computed."""

MAX_DEPTH = 127
"""Deepest nesting of lists and objects that the library's JSON parser accepts, including the whole header's braces."""

MAX_FAULT = 400
"""Most characters of a message: a name in a broken header may be as long as the header."""

# Bits per value for every dtype of the format. Dtypes that we cannot compute with are still copied bit for bit.
DTYPE_BITS: dict[str, int] = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Dtype, shape and bytes ``[start, end)`` of one tensor, relative to the file's data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Return the number of bytes of data."""
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """Tensors in offset order, metadata and start of the data, from a valid header.

    Attributes
    ----------
    tensors
        In offset order; together they tile ``[0, data_bytes)``.
    metadata
        The ``__metadata__`` map, in file order.
    data_start
        Offset of the first data byte in the file: 8 + N.
    digest
        SHA-256 (hex) of the header's bytes, including the length field.
    prefix
        What the names of `tensors` have before the names in the file: ``unet.`` for a pipeline's component.
    """

    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    data_start: int = 0
    digest: str = ""
    prefix: str = ""

    def prefixed(self, prefix: str) -> Header:
        """Add a prefix to all names."""
        if not prefix:
            return self
        return replace(
            self,
            prefix=prefix,
            tensors=tuple(replace(t, name=prefix + t.name) for t in self.tensors),
        )

    @property
    def data_bytes(self) -> int:
        """Return the number of bytes of all tensors."""
        return self.tensors[-1].end if self.tensors else 0

    @property
    def file_bytes(self) -> int:
        """Return the number of bytes of the whole file."""
        return self.data_start + self.data_bytes

    @cached_property
    def by_name(self) -> dict[str, TensorInfo]:
        """Map names to tensors."""
        return {t.name: t for t in self.tensors}


def tensor_nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Compute the bytes of a tensor of this dtype and shape.

    Raises
    ------
    ValueError
        If the dtype is unknown, the element count does not fit 64 bits, or a sub-byte dtype does not end on a byte.
    """
    if dtype not in DTYPE_BITS:
        raise ValueError(f"unknown dtype {dtype!r}")
    count = 1
    for n in shape:
        count *= n
        if (
            count >= 2**64
        ):  # checked at every step, as the library does: [0, 2**63, 4] passes, [2**63, 4, 0] does not
            raise ValueError(f"shape {list(shape)} has more elements than 64 bits count")
    bits = count * DTYPE_BITS[dtype]
    if bits >= 2**64 or bits % 8:
        raise ValueError(f"{count} values of {dtype} do not fill whole bytes")
    return bits // 8


def _depth(value: object) -> int:
    """Return the nesting depth of lists and objects in a JSON value."""
    depth = 0
    level = [value]
    while level := [v for v in level if isinstance(v, dict | list)]:
        depth += 1
        level = [child for v in level for child in (v.values() if isinstance(v, dict) else v)]
    return depth


_FIELDS = ("dtype", "shape", "data_offsets")


def _tensor_info(name: str, entry: object) -> TensorInfo:
    if isinstance(entry, list) and len(entry) == len(_FIELDS):
        entry = dict(
            zip(_FIELDS, entry, strict=True)
        )  # the library also accepts the three fields as a list
    if not isinstance(entry, dict):
        raise ValueError(f"tensor {name!r}: expected an object, found {type(entry).__name__}")
    for key in _FIELDS:
        if key not in entry:
            raise ValueError(f"tensor {name!r}: {key!r} is missing")
    if len(entry) > len(_FIELDS) and _depth(entry) > MAX_DEPTH - 1:
        raise ValueError(f"tensor {name!r}: nested too deeply")
    dtype, shape, offsets = (entry[key] for key in _FIELDS)
    if isinstance(dtype, dict) and list(dtype.values()) == [None]:
        dtype = next(iter(dtype))  # the library also accepts {"F32": null} for "F32"
    numbers = (
        [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    )
    fits = (
        isinstance(dtype, str)
        and all(type(n) is int and 0 <= n < 2**64 for n in numbers)
        and len(offsets) == 2
    )
    if not fits:
        found = quoted([dtype, shape, offsets])
        raise ValueError(
            f"tensor {name!r}: expected a dtype, a list of sizes and a pair of offsets, found {found}"
        )
    try:
        nbytes = tensor_nbytes(dtype, shape)
    except ValueError as e:
        raise ValueError(f"tensor {name!r}: {e}") from None
    start, end = offsets
    if end - start != nbytes:
        raise ValueError(
            f"tensor {name!r}: expected {nbytes} bytes for {dtype} {shape}, data_offsets give {end - start}"
        )
    return TensorInfo(name, dtype, tuple(shape), start, end)


def parse_header(raw: bytes, file_bytes: int, where: str) -> Header:
    """Validate a whole header.

    Parameters
    ----------
    raw
        The first 8 + N bytes of the file.
    file_bytes
        Size of the whole file.
    where
        Path for messages.

    Raises
    ------
    FormatError
        If the header violates the format; the message names the tensor and the fault.
    """
    try:
        tree = files.strict_json(raw[8:])
        if not isinstance(tree, dict):
            raise ValueError("the header is not a JSON object")
        metadata = tree.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("__metadata__ is not a map from string to string")
        tensors = sorted(
            (_tensor_info(k, v) for k, v in tree.items()), key=lambda t: (t.start, t.end)
        )
        at = 0
        for t in tensors:
            if t.start != at:
                raise ValueError(
                    f"tensor {t.name!r}: expected to begin at offset {at}, begins at {t.start}"
                )
            at = t.end
    except ValueError as e:
        fault = str(e) if len(str(e)) <= MAX_FAULT else f"{str(e)[:MAX_FAULT]}…"
        raise FormatError(f"{where}: bad safetensors header: {fault}; get the file again") from None
    header = Header(tuple(tensors), metadata, len(raw), hashlib.sha256(raw).hexdigest())
    if header.file_bytes != file_bytes:
        state = "truncated" if file_bytes < header.file_bytes else "too long"
        wanted, found = format_sizes(header.file_bytes, file_bytes)
        raise FormatError(
            f"{where}: expected {wanted} by its header, found {found}: the file is {state}; get it again"
        )
    return header


def read_header_by(read: Callable[[int, int], bytes], file_bytes: int, where: str) -> Header:
    """Read and validate a file's header (see `parse_header`); `read` takes an offset and a length, and gives less at the end."""
    raw = read(0, 8)
    if len(raw) < 8:
        raise FormatError(
            f"{where}: expected a safetensors file, found {format_size(file_bytes)}; get it again"
        )
    n = int.from_bytes(raw, "little")
    if n > MAX_HEADER_BYTES or 8 + n > file_bytes:
        stated, found = format_sizes(n, file_bytes)
        begins = read(0, 24)
        what = f"begins with {begins!r}, and its length field says {stated} of header"
        raise FormatError(
            f"{where}: not a safetensors file, or truncated: {what}, the file has {found}; get it again"
        )
    raw += read(8, n)
    if len(raw) < 8 + n:
        raise FormatError(f"{where}: the file ended inside its header; get it again")
    return parse_header(raw, file_bytes, where)


def read_header(fd: int, where: str) -> Header:
    """Read and validate the header of an open file."""
    with files.storage_errors(Path(where), "read"):
        return read_header_by(
            lambda at, length: files.read_bytes(fd, length, at), os.fstat(fd).st_size, where
        )


def layout(
    entries: Iterable[tuple[str, str, Iterable[int]]],
    metadata: Mapping[str, str] | None = None,
    length: int = 0,
) -> tuple[Header, bytes]:
    """Lay out tensors in the given order without gaps, and make the header and its bytes.

    Parameters
    ----------
    entries
        Name, dtype and shape of each tensor, in file order.
    metadata
        The ``__metadata__`` map; omitted from the file if empty.
    length
        Least number of bytes of the JSON, a multiple of 8, if the header's size was fixed before all of its metadata was known.

    Returns
    -------
    Header, bytes
        The same bytes that the library would write in this order: compact JSON, padded with spaces to a multiple
        of 8. `parse_header` checks them before they are returned.
    """
    tree: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape in entries:
        if name in tree:
            raise FormatError(f"tensor {name!r} is laid out twice")
        size = tensor_nbytes(dtype, tuple(shape))
        tree[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    body = json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    body += b" " * max(length - len(body), -len(body) % 8)
    if len(body) > MAX_HEADER_BYTES:
        raise FormatError(
            f"a header of {len(body)} bytes is over the format's limit of {MAX_HEADER_BYTES}"
        )
    raw = len(body).to_bytes(8, "little") + body
    return parse_header(raw, len(raw) + at, "output"), raw
