"""Make the tensors of a merged model: each kind of recipe yields the bytes a few rows at a time.

A recipe yields bytes in the output's dtype; it computes in the computing dtype and rounds once.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from streamer.errors import NumericError
from streamer.linalg.operators import Delta, all_finite
from streamer.plan.targets import Target
from streamer.storage.buffers import BufferRing, Piece
from streamer.weights.base import DECODED_BYTES, StoredTensor, Weight
from streamer.weights.dtypes import Encoding, as_bytes, encode
from streamer.weights.quantization.fp8 import FP8

BLOCK_BYTES = 4 << 20
"""Rows of this many float32 bytes are merged at a time, so that memory does not depend on the matrix; measured in docs/benchmarks.md."""

DECODED = 8
"""Most copies of rows in float32 while a few rows are decoded, including the result: quantized values and scales expand to int32."""

Mitigated = Callable[[Target], tuple[Delta, Delta]]
"""Returns Δ and Δ' of one matrix; Δ' is Δ itself if nothing changes."""

Kept = Callable[[Target, int, int], None]
"""Receives, for a matrix, the number of its merged values, and the number of those that rounding left with the base's bytes."""


class Recipe(ABC):
    """Way to make one tensor of a merged model."""

    __slots__ = ()

    @abstractmethod
    def pieces(self, mitigated: Mitigated, kept: Kept | None = None) -> Iterator[Piece]:
        """Yield its bytes in order, in pieces that the caller releases.

        Parameters
        ----------
        kept
            Called at the end of each matrix that is added whole and whose Δ' is not zero; None counts nothing.
        """


@dataclass(frozen=True, slots=True)
class CopyBytes(Recipe):
    """Copies the stored bytes of a tensor of any dtype."""

    stored: StoredTensor

    def pieces(self, mitigated: Mitigated, kept: Kept | None = None) -> Iterator[Piece]:
        """Yield the file's own bytes."""
        return self.stored.file.chunks(self.stored.info)


@dataclass(frozen=True)
class Rows(Recipe):
    """Makes a weight's tensor by rows, without a delta."""

    weight: Weight


class Cast(Rows):
    """Rounds a weight's values once to the written dtype: the adapter's own values, or decoded ones. They must be finite."""

    def pieces(self, mitigated: Mitigated, kept: Kept | None = None) -> Iterator[Piece]:
        """Yield the rows in the written dtype."""
        for _, _, raw, values, out, piece in _rows(self.weight):
            self.cast(raw, values, out)
            yield piece

    def cast(self, raw: Tensor, values: Tensor, out: Tensor) -> None:
        """Round rows, given as stored and in the computing dtype."""
        if not all_finite(raw):
            raise NumericError(
                f"{self.weight.where}: the values for {self.weight.name!r} hold NaN or Inf; check the file"
            )
        encode(values, _encoding(self.weight), raw, self.weight.name, out)


@dataclass(frozen=True)
class AddDelta(Recipe):
    """Makes ``W0 + Δ'``; a zero delta leaves W0's bytes, because adding it would turn −0 into +0.

    `tuned` is the stored ``W0 + Δ``, whose bytes are the result if Δ' is Δ.
    """

    weight: Weight
    target: Target
    tuned: StoredTensor | None = None

    def pieces(self, mitigated: Mitigated, kept: Kept | None = None) -> Iterator[Piece]:
        """Yield the rows of the sum."""
        delta, after = mitigated(self.target)
        if after is delta and self.tuned is not None:
            yield from self.tuned.file.chunks(self.tuned.info)
            return
        change = (after.T if self.target.transposed else after).to(self.weight.compute)
        nothing = change.is_zero()
        encoding, count = _encoding(self.weight), 0
        for i, j, raw, values, out, piece in _rows(self.weight):
            if nothing and raw.dtype == encoding.dtype:
                out.copy_(raw)
            else:
                change.add_rows(values, i, j)
                encode(values, encoding, raw, self.weight.name, out)
                if kept is not None and raw.dtype == out.dtype:
                    count += _equal_count(raw, out)
            yield piece
        if kept is not None and not nothing and self.tuned is None and not self.weight.quantized:
            kept(self.target, math.prod(self.weight.shape), count)


@dataclass(frozen=True)
class Requantize(Recipe):
    """Makes one of the tensors that store ``W0 + Δ'`` quantized, with new scales; a zero delta leaves W0's bytes."""

    weight: FP8
    target: Target
    role: str

    def pieces(self, mitigated: Mitigated, kept: Kept | None = None) -> Iterator[Piece]:
        """Yield the quantized values or their scales. Each pass computes the sum again, so that it is never in memory whole."""
        (_, delta), weight = mitigated(self.target), self.weight.at_hand()
        change = (delta.T if self.target.transposed else delta).to(weight.compute)
        stored = weight.tensors[self.role]
        if change.is_zero():
            yield from stored.file.chunks(stored.info)
            return

        def merged(i: int, j: int) -> Tensor:
            values = weight.decode(i, j)
            change.add_rows(values, i, j)
            return values

        for values in weight.requantized(self.role, merged, weight.new_scales(merged)):
            yield Piece(as_bytes(values))


@dataclass(frozen=True)
class RowSlice(Recipe):
    """Makes a tensor that holds some rows of a matrix, by a recipe with these rows of the delta."""

    recipe: AddDelta | Requantize
    rows: tuple[int, int]

    def pieces(self, mitigated: Mitigated, kept: Kept | None = None) -> Iterator[Piece]:
        """Yield the recipe's pieces; for part of a matrix, values that rounding leaves unchanged are not counted."""

        def sliced(target: Target) -> tuple[Delta, Delta]:
            delta, after = mitigated(target)
            return delta.row_slice(*self.rows), after.row_slice(*self.rows)

        return self.recipe.pieces(sliced)


@dataclass(frozen=True)
class Stack(Recipe):
    """Makes a tensor that holds several matrices one after the other, all made in the same way."""

    recipes: tuple[Recipe, ...]

    def pieces(self, mitigated: Mitigated, kept: Kept | None = None) -> Iterator[Piece]:
        """Yield the pieces of each recipe, one after the other."""
        return itertools.chain.from_iterable(recipe.pieces(mitigated, kept) for recipe in self.recipes)


@dataclass(frozen=True)
class AddBias(Rows):
    """Adds `scaling` times a tensor of the same shape to a weight: LoRA's bias to a layer's bias."""

    shift: Weight
    scaling: float

    def pieces(self, mitigated: Mitigated, kept: Kept | None = None) -> Iterator[Piece]:
        """Yield the rows of the sum."""
        for i, j, raw, values, out, piece in _rows(self.weight):
            values.add_(self.shift.rows(i, j).to(values.dtype), alpha=self.scaling)
            encode(values, _encoding(self.weight), raw, self.weight.name, out)
            yield piece


@dataclass(frozen=True)
class ReplaceRows(Cast):
    """Replaces some rows of a weight: an embedding gets trained tokens. All other rows keep their bytes, or are decoded."""

    tokens: Weight
    indices: tuple[int, ...]

    def pieces(self, mitigated: Mitigated, kept: Kept | None = None) -> Iterator[Piece]:
        """Yield the rows, with the trained ones rounded once."""
        trained = {row: at for at, row in enumerate(self.indices)}
        for i, j, raw, values, out, piece in _rows(self.weight):
            if self.weight.quantized:
                self.cast(raw, values, out)
            else:
                out.copy_(raw)
            for row in (r for r in self.indices if i <= r < j):
                at = trained[row]
                new = self.tokens.rows(at, at + 1).to(values.dtype)
                out[row - i] = encode(new, _encoding(self.weight), torch.zeros_like(new), self.tokens.name)[0]
            yield piece


def rows_bytes(weight: Weight) -> int:
    """Estimate the memory to make a weight a few rows at a time: rows read or decoded, added, and rounded into alternating buffers."""
    m, n = weight.matrix
    row = max(1, n * weight.compute.itemsize)
    block = max(row, min(m * row, max(BLOCK_BYTES, DECODED_BYTES)))
    return (3 + (DECODED if weight.quantized else 1)) * block + weight.load_bytes


def _equal_count(a: Tensor, b: Tensor) -> int:
    """Count the values with equal bytes; numpy compares integers faster than torch compares floats."""
    kind = f"i{a.itemsize}"
    return int(np.count_nonzero(np.frombuffer(as_bytes(a), kind) == np.frombuffer(as_bytes(b), kind)))


def _encoding(weight: Weight) -> Encoding:
    assert weight.encoding is not None, f"{weight.name} is not written back"
    return weight.encoding


def _rows(weight: Weight) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor, Piece]]:
    """Iterate over a weight a few rows at a time.

    Yields
    ------
    First row, end row, stored values, values in the computing dtype for the computation, values in the written dtype for the result, and
    the result's bytes. All memory is reused, the bytes once they are released: the system zeroes new memory first, which costs as much
    as a sum.
    """
    encoding = _encoding(weight)
    m, n = weight.matrix
    rows = max(1, BLOCK_BYTES // max(1, n * weight.compute.itemsize))
    values = torch.empty((min(rows, m), n), dtype=weight.compute)
    ring = BufferRing(min(rows, m) * n * encoding.dtype.itemsize)
    for i, j, raw in weight.blocks(rows):
        piece = ring.lease((j - i) * n * encoding.dtype.itemsize)
        out = torch.from_numpy(np.frombuffer(piece.view, np.uint8)).view(encoding.dtype).view(j - i, n)
        yield i, j, raw, values[: j - i].copy_(raw), out, piece
