"""Read tensors with the safetensors library, as float64 rows of (out, in) matrices."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamer.verification.result import NotRecomputed

Array = NDArray[np.float64]

BLOCK_BYTES = 32 << 20
"""Bytes of float64 rows to compare at a time."""

PIECE_BYTES = 1 << 20
"""Raw bytes to compare at a time."""

FLOATS = ("F64", "F32", "F16", "BF16")
FP8 = "F8_E4M3"


class Stored(NamedTuple):
    """A tensor as stored: dtype in the format's spelling, and shape."""

    dtype: str
    shape: tuple[int, ...]


class TensorFiles:
    """Safetensors files opened with the library, with tensors found by name.

    Parameters
    ----------
    paths
        The files; if two have the same name, the last one is used.
    framework
        ``numpy`` reads headers without loading torch; ``pt`` reads values of every floating-point dtype.

    Raises
    ------
    safetensors.SafetensorError
        If the library cannot read a header.
    """

    def __init__(self, paths: Iterable[Path], framework: str = "numpy") -> None:
        from safetensors import safe_open

        self._open = contextlib.ExitStack()
        self.metadata: dict[Path, dict[str, str]] = {}
        self.names: dict[Path, list[str]] = {}
        self._of: dict[str, Any] = {}
        with contextlib.ExitStack() as opening:
            for path in paths:
                file = opening.enter_context(safe_open(path, framework=framework))
                self.metadata[path] = dict(file.metadata() or {})
                self.names[path] = list(file.keys())
                self._of |= dict.fromkeys(self.names[path], file)
            self._open = opening.pop_all()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._open.close()

    def __contains__(self, name: object) -> bool:
        return name in self._of

    @property
    def all_names(self) -> frozenset[str]:
        """Return the names of all tensors."""
        return frozenset(self._of)

    def stored(self, name: str) -> Stored:
        """Return dtype and shape of a tensor."""
        view = self._of[name].get_slice(name)
        return Stored(str(view.get_dtype()), tuple(view.get_shape()))

    def whole(self, name: str) -> Array:
        """Read a small tensor as float64 in its own shape."""
        return _float64(self._of[name].get_tensor(name))

    def values(self, name: str) -> NDArray[Any]:
        """Read a small tensor in its stored dtype, which numpy must have."""
        return np.asarray(self._of[name].get_tensor(name))

    @cached_property
    def _places(self) -> dict[str, tuple[Path, int, int]]:
        """Map each tensor's name to its file, first byte and number of bytes."""
        found = {}
        for path in self.names:
            with path.open("rb") as f:
                length = int.from_bytes(f.read(8), "little")
                tensors = json.loads(f.read(length))
            for name in self.names[path]:
                start, stop = tensors[name]["data_offsets"]
                found[name] = path, 8 + length + start, stop - start
        return found

    @cached_property
    def config(self) -> str:
        """Read the model's config beside the files; empty if there is none."""
        path = next(iter(self.names)).with_name("config.json")
        return path.read_text("utf-8", "replace") if path.exists() else ""

    def nbytes(self, name: str) -> int:
        """Return the number of bytes of a tensor."""
        return self._places[name][2]

    def pieces(self, name: str) -> Iterator[bytes]:
        """Read the bytes of a tensor of any dtype, `PIECE_BYTES` at a time."""
        path, start, left = self._places[name]
        with path.open("rb") as f:
            f.seek(start)
            while left and (piece := f.read(min(left, PIECE_BYTES))):
                left -= len(piece)
                yield piece

    def rows(self, name: str, i: int, j: int) -> Array:
        """Read rows i to j of a tensor as a float64 matrix, with a convolution's kernel flattened into its input."""
        return _float64(self._of[name].get_slice(name)[i:j]).reshape(j - i, -1)

    def some(self, name: str, i: int, j: int) -> Array:
        """Read entries i to j along the first dimension as float64; a scalar is read whole."""
        view = self._of[name].get_slice(name)
        return _float64(view[i:j]) if view.get_shape() else self.whole(name)

    def columns(self, name: str, i: int, j: int) -> Array:
        """Read columns i to j of a two-dimensional tensor as float64."""
        return _float64(self._of[name].get_slice(name)[:, i:j])


def same_bytes(files: TensorFiles, name: str, others: TensorFiles, other: str) -> bool:
    """Test whether two tensors have the same dtype, shape and bytes."""
    if files.stored(name) != others.stored(other):
        return False
    return all(a == b for a, b in zip_longest(files.pieces(name), others.pieces(other)))


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield the row ranges of a tensor to read at a time; a scalar has one row."""
    rows, step = (shape or (1,))[0], max(1, BLOCK_BYTES // (8 * max(1, math.prod(shape[1:]))))
    return ((i, min(rows, i + step)) for i in range(0, rows, step))


def _float64(tensor: Any) -> Array:
    import torch

    values: Array = tensor.to(torch.float64).numpy()
    return values


@dataclass(frozen=True)
class Matrix:
    """Weight read as a float64 (out, in) matrix, a few rows at a time.

    Attributes
    ----------
    files, name
        Its files, and its name in them.
    shape
        (out, in).
    transposed
        Whether it is stored as (in, out).
    dtype
        Stored dtype, in the format's spelling.
    quant_scale
        Scale of FP8 values, (1, 1), (out, 1) or one for each (out, in) block; None for other dtypes.
    block
        Rows and columns that share a scale.
    """

    files: TensorFiles
    name: str
    shape: tuple[int, int]
    transposed: bool
    dtype: str
    quant_scale: Array | None = None
    block: tuple[int, int] = (1, 1)

    def rows(self, i: int, j: int) -> Array:
        """Read rows i to j of the (out, in) matrix, float64."""
        if self.transposed:
            return np.ascontiguousarray(self.files.columns(self.name, i, j).T)
        values = self.files.rows(self.name, i, j)
        return values if self.quant_scale is None else values * self.quant_scales(i, j)

    def quant_scales(self, i: int, j: int) -> Array:
        """Return the scales of rows i to j, one for each value."""
        assert self.quant_scale is not None
        (bm, bn), n = self.block, self.shape[1]
        return self.quant_scale[np.arange(i, j) // bm][:, np.arange(n) // bn]

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield the row ranges to read at a time."""
        return row_blocks(self.shape)

    def whole(self) -> Array:
        """Read all of the (out, in) matrix, float64."""
        out = np.empty(self.shape)
        for i, j in self.blocks():
            out[i:j] = self.rows(i, j)
        return out


def open_matrix(files: TensorFiles, name: str, shape: tuple[int, int], transposed: bool) -> Matrix:
    """Find a weight that is stored as floating-point values, or as FP8 values with a scale.

    Raises
    ------
    NotRecomputed
        If it has another encoding.
    """
    dtype, stored = files.stored(name)
    if dtype in FLOATS:
        return Matrix(files, name, shape, transposed, dtype)
    beside = next((s for s in (f"{name}_scale_inv", f"{name}_scale") if s in files), None)
    scales = Stored("", ()) if beside is None else files.stored(beside)
    if (
        dtype != FP8
        or len(stored) != 2
        or transposed
        or beside is None
        or scales.dtype not in FLOATS
        or 0 in scales.shape
    ):
        raise NotRecomputed(f"it is stored as {dtype}, which is not decoded here")
    grid = files.whole(beside)
    grid = grid.reshape(len(grid) if grid.ndim else 1, -1)  # ModelOpt's are (rows, 1, columns, 1)
    return Matrix(files, name, shape, transposed, dtype, grid, _block(files.config, stored, grid.shape))


def _block(config: str, shape: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, int]:
    """Find how many rows and columns share a scale: try the whole matrix, the config's sizes, 128×128, an even division."""
    stated = re.findall(r'"(?:weight_block_size|block_structure)"\s*:\s*["\[]\s*([1-9]\d*)\s*[,x]\s*([1-9]\d*)', config)
    even = [tuple(size // max(1, count) for size, count in zip(shape, grid, strict=True))]
    for bm, bn in [shape, *((int(m), int(n)) for m, n in stated), (128, 128), *even]:
        if 0 not in (bm, bn) and (-(-shape[0] // bm), -(-shape[1] // bn)) == grid:
            return bm, bn
    raise NotRecomputed(f"it has shape {[*shape]} and scales of shape {[*grid]}, whose blocks are unknown")
