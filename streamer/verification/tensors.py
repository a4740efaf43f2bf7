"""Read tensors of safetensors files with numpy, as float64 rows of (out, in) matrices, and bound the effect of one rounding.

Define the result of a verification: the object of `streamer verify --json`, schema ``streamer.verification/1``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from streamer.errors import FormatError
from streamer.json_types import Amount, Count

SCHEMA: Final = "streamer.verification/1"
RECORD_NAME = "streamer.json"
"""Name of an output's record, in its directory."""


class NotRecomputed(Exception):  # a reason, not an error
    """Reason why a matrix is not recomputed or a tensor not compared: a kind, size or encoding that no formula here covers."""


# fmt: off
class DifferenceRecord(TypedDict):
    """A difference."""
    file: Annotated[str, "Path of the file that differs, or that states something else."]
    tensor: Annotated[str | None, "The tensor that it is about, or null."]
    expected: Annotated[str, "What the record or the inputs state."]
    found: Annotated[str, "What was found."]
    message: Annotated[str, "The line on stderr: file, tensor, expected and found."]

class RecomputedRecord(TypedDict):
    """A matrix that was recomputed."""
    tensor: Annotated[str, "Name of the tensor in the base."]
    error: Annotated[Amount, "The largest error found, as a share of what rounding permits: at most 1 if nothing differs."]

class SkippedRecord(TypedDict):
    """A matrix that was not recomputed, or a tensor that was not compared."""
    tensor: Annotated[str, "Its name; for a matrix, the name of the tensor in the base, followed by [N] in a stack of experts."]
    reason: Annotated[str, "Why not."]

class TotalsRecord(TypedDict):
    """Counts."""
    files: Annotated[Count, "Files that were compared with their digests; 1 for findings."]
    bytes: Annotated[Count, "Their bytes."]
    matrices: Annotated[Count, "Matrices that the record or the findings list."]
    recomputed: Annotated[Count, "Matrices that were recomputed."]
    not_recomputed: Annotated[Count, "Matrices that were tried but cannot be recomputed."]
    tensors: Annotated[Count, "Other tensors of the output, and tensors of the inputs that it lacks; 0 for findings or without inputs."]
    compared: Annotated[Count, "Of `tensors`, those compared with the inputs, byte by byte or within a rounding; 0 without --sample all."]
    not_compared: Annotated[Count, "Matrices that were not recomputed, and other tensors that were not compared."]
    differences: Annotated[Count, "Differences."]

class _Inputs(TypedDict):
    base: Annotated[str, "The base."]
    adapter: Annotated[str, "The adapter."]

class Verification(TypedDict):
    """What `streamer verify --json` prints, whether it is verified or not (exit code 7)."""
    schema: Literal["streamer.verification/1"]
    output: Annotated[str, "Path of the output, as given."]
    kind: Annotated[Literal["model", "adapter", "findings"], "What it is: a merged model, a mitigated adapter, or findings."]
    verified: Annotated[bool, "Whether nothing differs, and everything that was asked for was recomputed and compared."]
    inputs: NotRequired[Annotated[_Inputs, "Paths of base and adapter, as given; absent without them."]]
    totals: Annotated[TotalsRecord, "Counts."]
    recomputed: Annotated[list[RecomputedRecord], "The matrices that were recomputed, with those that differ."]
    not_recomputed: Annotated[list[SkippedRecord], "The matrices that were tried but cannot be recomputed."]
    not_compared: Annotated[list[SkippedRecord], "Other tensors that --sample all could not compare."]
    differences: Annotated[list[DifferenceRecord], "The differences, each listed once."]
# fmt: on


@dataclass
class Outcome:
    """Differences and recomputed matrices of one output, and what could not be recomputed or compared though it was asked for."""

    output: Path
    kind: Literal["model", "adapter", "findings"]
    files: int = 0
    nbytes: int = 0
    matrices: int = 0
    tensors: int = 0
    compared: int = 0
    unmet: str = ""
    recomputed: list[RecomputedRecord] = field(default_factory=list)
    not_recomputed: list[SkippedRecord] = field(default_factory=list)
    not_compared: list[SkippedRecord] = field(default_factory=list)
    differences: list[DifferenceRecord] = field(default_factory=list)

    def differ(self, file: Path, expected: str, found: str, tensor: str | None = None) -> None:
        """Note a difference, which becomes one line."""
        line = f"{file}: {'' if tensor is None else f'tensor {tensor!r}: '}expected {expected}, found {found}"
        told = DifferenceRecord(file=str(file), tensor=tensor, expected=expected, found=found, message=line)
        self.differences.append(told)

    def result(self, inputs: _Inputs | None) -> Verification:
        """Return the object to print."""
        totals: TotalsRecord = {
            "files": self.files, "bytes": self.nbytes, "matrices": self.matrices, "recomputed": len(self.recomputed),
            "not_recomputed": len(self.not_recomputed), "tensors": self.tensors, "compared": self.compared,
            "not_compared": self.matrices - len(self.recomputed) + self.tensors - self.compared, "differences": len(self.differences),
        }  # fmt: skip
        result: Verification = {
            "schema": SCHEMA, "output": str(self.output), "kind": self.kind, "verified": not (self.differences or self.unmet),
            "totals": totals, "recomputed": self.recomputed, "not_recomputed": self.not_recomputed,
            "not_compared": self.not_compared, "differences": self.differences,
        }  # fmt: skip
        return result if inputs is None else {**result, "inputs": inputs}


Array = NDArray[np.float64]

BLOCK_VALUES, PIECE_BYTES = 4 << 20, 16 << 20
"""Values of a matrix, and raw bytes of a tensor, to handle at a time."""

FP8, LARGEST_FP8 = "F8_E4M3", 448.0
ELEMENTS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", FP8: "u1"}
"""Dtypes that are decoded, in the format's spelling, and numpy's dtype of their elements."""

SIGNIFICANT_BITS = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8, FP8: 4}
LEAST_EXPONENT = {"F64": -1022, "F32": -126, "F16": -14, "BF16": -126, FP8: -6}
"""Exponent of the smallest normal numbers; below it values are evenly spaced."""

STACKED = re.compile(r"(.+)\[(\d+)\]")
"""Name of one matrix of a stack: the stack's name and the index."""

_BLOCK = re.compile(r'"(?:weight_block_size|block_structure)"\s*:\s*["\[]\s*([1-9]\d*)\s*[,x]\s*([1-9]\d*)')


class Stored(NamedTuple):
    """A tensor as stored: dtype in the format's spelling, shape, file, and the range of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int


class TensorFiles:
    """Tensors of safetensors files by name, read through memory maps.

    Attributes
    ----------
    stored
        Every tensor; if two have the same name, the last one.
    metadata
        The last file's metadata.

    Raises
    ------
    FormatError
        If the safetensors library refuses a file.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self.stored: dict[str, Stored] = {}
        self.metadata: dict[str, str] = {}
        self._maps: dict[Path, NDArray[np.uint8]] = {}
        for path in paths:
            try:
                with safe_open(path, "numpy") as file:
                    self.metadata = dict(file.metadata() or {})
            except (OSError, SafetensorError) as e:
                raise FormatError(
                    f"{path}: expected a safetensors file, found one that the library refuses: {e}"
                ) from e
            self._maps[path] = data = np.memmap(path, np.uint8, "r")
            end = 8 + int.from_bytes(data[:8].tobytes(), "little")
            for name, tensor in json.loads(data[8:end].tobytes()).items():
                if name != "__metadata__":
                    start, stop = (end + at for at in tensor["data_offsets"])
                    self.stored[name] = Stored(tensor["dtype"], tuple(tensor["shape"]), path, start, stop)

    def raw(self, name: str) -> NDArray[np.uint8]:
        """Return the bytes of a tensor."""
        _, _, path, start, stop = self.stored[name]
        return self._maps[path][start:stop]

    def values(self, name: str, index: Any = ...) -> Array:
        """Read a part of a tensor as float64.

        Raises
        ------
        NotRecomputed
            If there is no such tensor, or its dtype is not decoded here.
        """
        if name not in self.stored:
            raise NotRecomputed("it is not a tensor by itself, but part of one or built from several")
        dtype, shape = self.stored[name][:2]
        if dtype not in ELEMENTS:
            raise NotRecomputed(f"it is stored as {dtype}, which is not decoded here")
        part: Any = self.raw(name).view(ELEMENTS[dtype]).reshape(shape or (1,))[index]
        if dtype == "BF16":
            part = (part.astype("<u4") << 16).view("<f4")
        return np.asarray(_E4M3[part] if dtype == FP8 else part.astype(np.float64))


_CODES = np.arange(127)
_E4M3 = np.where(_CODES < 8, _CODES / 8, 1 + _CODES % 8 / 8) * 2.0 ** (np.maximum(_CODES // 8, 1) - 7)
_E4M3 = np.concatenate([_E4M3, [np.nan], -_E4M3, [np.nan]])
"""The values of FP8's codes: sign, 4 bits of exponent (bias 7), 3 of mantissa; all ones are NaN."""


def same_bytes(files: TensorFiles, name: str, others: TensorFiles, other: str) -> bool:
    """Test whether two tensors exist and have the same dtype, shape and bytes."""
    if name not in files.stored or other not in others.stored or files.stored[name][:2] != others.stored[other][:2]:
        return False
    one, two = files.raw(name), others.raw(other)
    pieces = (slice(i, i + PIECE_BYTES) for i in range(0, len(one), PIECE_BYTES))
    return all(np.array_equal(one[piece], two[piece]) for piece in pieces)


@dataclass(frozen=True)
class Matrix:
    """Weight read as a float64 (out, in) matrix, a few rows at a time; a convolution's kernel is flattened into its input.

    Attributes
    ----------
    files, name
        Its files, and its name in them, with ``[N]`` for one matrix of a stack.
    shape
        (out, in).
    transposed
        Whether it is stored as (in, out).
    replaced
        Values of rows, as stored, that replace its own.
    added
        Values that are added to it, of its stored shape.
    """

    files: TensorFiles
    name: str
    shape: tuple[int, int] = (0, 0)
    transposed: bool = False
    replaced: Mapping[int, Array] = field(default_factory=dict)
    added: Array | None = None

    @property
    def stored_name(self) -> str:
        """Return the name of the tensor that stores it: the stack for an expert's matrix, else its own."""
        return STACKED.sub(r"\1", self.name)

    @property
    def dtype(self) -> str:
        """Return the stored dtype; empty if it is not stored as one tensor."""
        stored = self.files.stored.get(self.stored_name)
        return "" if stored is None else stored.dtype

    @cached_property
    def stored_shape(self) -> tuple[int, int]:
        """Return the rows and columns as stored, without a stack's; (0, 0) if it is not stored as one tensor."""
        shape = self.files.stored[self.stored_name].shape or (1,) if self.dtype else (0, 0, 0)
        rows, *columns = shape[bool(STACKED.fullmatch(self.name)) :]
        return rows, math.prod(columns)

    def rows(self, i: int, j: int) -> Array:
        """Read rows i to j."""
        stack, (height, width) = STACKED.fullmatch(self.name), self.stored_shape
        part = (slice(None), slice(i, j)) if self.transposed else (slice(i, j),)
        values = self.files.values(self.stored_name, part if stack is None else (int(stack[2]), *part))
        values = values.reshape((height, j - i) if self.transposed else (j - i, width))
        if self.dtype == FP8:
            values = values * self.scales(i, j)
        for row, value in self.replaced.items():
            if self.transposed:
                values[row] = value[i:j]
            elif i <= row < j:
                values[row - i] = value
        if self.added is not None:
            values = values + self.added.reshape(-1, width)[i:j]
        return np.ascontiguousarray(values.T) if self.transposed else values

    def scales(self, i: int, j: int) -> Array:
        """Return the scales of rows i to j of an FP8 matrix, one for each value."""
        grid, bm, bn = self._scales
        return grid[np.arange(i, j) // bm][:, np.arange(self.shape[1]) // bn]

    @cached_property
    def _scales(self) -> tuple[Array, int, int]:
        """Find the scales, and how many rows and columns share one: try the whole matrix, the config's sizes, 128×128, an even division."""
        beside = next((s for end in ("_scale_inv", "_scale") if (s := self.name + end) in self.files.stored), "")
        grid = self.files.values(beside)
        grid = grid.reshape(len(grid) if grid.ndim else 1, -1)  # ModelOpt's are (rows, 1, columns, 1)
        path = self.files.stored[self.name].path.with_name("config.json")
        stated = _BLOCK.findall(path.read_text("utf-8", "replace")) if path.exists() else []
        (m, n), (p, q) = self.shape, grid.shape
        sizes = [(m, n), *stated, (128, 128), (m // max(1, p), n // max(1, q))]
        for bm, bn in ((int(bm), int(bn)) for bm, bn in sizes):
            if bm and bn and (-(-m // bm), -(-n // bn)) == (p, q) and not self.transposed:
                return grid, bm, bn
        raise NotRecomputed(f"it has shape {[m, n]} and scales of shape {[p, q]}, whose blocks are unknown")


def blocks(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield the ranges of rows to handle at a time."""
    step = max(1, BLOCK_VALUES // max(1, shape[1]))
    return ((i, min(shape[0], i + step)) for i in range(0, shape[0], step))


def whole(shape: tuple[int, int], rows: Callable[[int, int], Array]) -> Array:
    """Compute all rows of a matrix."""
    out = np.empty(shape)
    for i, j in blocks(shape):
        out[i:j] = rows(i, j)
    return out


def half_spacing(values: Array, dtype: str) -> Array:
    """Compute half the distance between neighbouring values of a dtype: the largest error of rounding to nearest."""
    _, exponents = np.frexp(values)  # |value| in [0.5, 1) · 2^exponent
    exponents = np.where(values == 0, LEAST_EXPONENT[dtype], exponents - 1)
    exponents = np.maximum(exponents, LEAST_EXPONENT[dtype]) - SIGNIFICANT_BITS[dtype]
    return np.asarray(np.ldexp(1.0, exponents))
