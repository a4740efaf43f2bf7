"""Make the tensors of outputs: for each a recipe, which yields its bytes and returns what it did.

A recipe makes a few rows at a time; it computes in the computing dtype, and rounds once to the dtype of the output.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from streamer.errors import NumericError
from streamer.linalg.operators import Delta, all_finite
from streamer.linalg.rounding import Feedback, round_rows
from streamer.methods.files import MappedInput
from streamer.output.mitigation import Mitigation
from streamer.output.record import MitigatedMatrix
from streamer.plan.targets import Target
from streamer.storage.atomic_file import BufferRing, Piece
from streamer.weights.base import StoredTensor, Weight, as_bytes, encode
from streamer.weights.codes import FP8, NOT_FINITE, Recodable

MERGED_BYTES = 4 << 20
"""Rows of this many float32 bytes are merged at a time, so that memory does not depend on the matrix; measured in docs/benchmarks.md."""

DECODED = 8
"""Most copies of rows in float32 while a few rows are decoded, including the result: quantized values and scales expand to int32."""

RECODED_BYTES = 32 << 20
"""Rows of this many float32 bytes are coded at a time: a column takes as long for a few rows as for many."""

RECODED = 12
"""Most copies of these rows in float32: stored, merged, rounded and transposed values, scales and codes."""

FEEDBACK = 48
"""Bytes for each value of an input's vectors while they are prepared, in float64 and float32."""

Pieces = Generator[Piece, None, list[MitigatedMatrix]]
"""Yields a tensor's bytes in order, in pieces that the caller releases; returns the metrics of the matrices mitigated for it."""

Rounding = Generator[Piece, None, dict[str, Any]]
"""Yields the same; returns keys of `MitigatedMatrix`: what rounding did to the matrix."""


class Recipe(ABC):
    """Way to make one tensor of an output."""

    __slots__ = ()

    @abstractmethod
    def make(self, mitigation: Mitigation, measures: bool = True) -> Pieces:
        """Make the tensor.

        Parameters
        ----------
        measures
            Whether metrics are wanted. A matrix that several tensors hold has them in the first alone.
        """


@dataclass(frozen=True, slots=True)
class CopyBytes(Recipe):
    """Copies the stored bytes of a tensor of any dtype."""

    stored: StoredTensor

    def make(self, mitigation: Mitigation, measures: bool = True) -> Pieces:
        """Yield the file's own bytes."""
        yield from self.stored.chunks()
        return []


@dataclass(frozen=True)
class WeightRows(Recipe):
    """Makes a weight's tensor by rows, without a delta."""

    weight: Weight

    def make(self, mitigation: Mitigation, measures: bool = True) -> Pieces:
        """Yield the rows."""
        for block in blocks(self.weight):
            self.fill(block)
            yield block.piece
        return []

    @abstractmethod
    def fill(self, block: Block) -> None:
        """Make the rows of a block in the written dtype."""


class Cast(WeightRows):
    """Rounds a weight's values once to the written dtype: the adapter's own values, or decoded ones. They must be finite."""

    def fill(self, block: Block) -> None:
        """Round rows."""
        block.round(self.weight)


@dataclass(frozen=True)
class AddBias(WeightRows):
    """Adds `scaling` times a tensor of the same shape to a weight: LoRA's bias to a layer's bias."""

    shift: Weight
    scaling: float

    def fill(self, block: Block) -> None:
        """Add rows."""
        shift = self.shift.rows(block.start, block.end)
        block.values.add_(shift.to(block.values.dtype), alpha=self.scaling)
        block.round(self.weight)


@dataclass(frozen=True)
class ReplaceRows(Cast):
    """Replaces some rows of a weight: an embedding gets trained tokens. All other rows keep their bytes, or are decoded."""

    tokens: Weight
    indices: tuple[int, ...]

    def fill(self, block: Block) -> None:
        """Make rows, with the trained ones rounded once."""
        if self.weight.quantized or block.stored.dtype != block.out.dtype:
            super().fill(block)
        else:
            block.out.copy_(block.stored)
        for at, row in enumerate(self.indices):
            if block.start <= row < block.end:
                new = self.tokens.rows(at, at + 1).to(block.values.dtype)
                rounded = encode(new, written_dtype(self.weight), self.tokens.name)
                block.out[row - block.start] = rounded[0]


@dataclass(frozen=True)
class Change(Recipe):
    """Makes a tensor that holds ``W0 + Δ'``, or some rows of it; a zero delta leaves W0's bytes.

    Attributes
    ----------
    rows
        First and end row of the part of Δ' that belongs to the weight; None if all of it does.
    """

    weight: Weight
    target: Target
    rows: tuple[int, int] | None = None

    def make(self, mitigation: Mitigation, measures: bool = True) -> Pieces:
        """Mitigate the matrix, and yield the sum."""
        made = mitigation.of(self.target)
        change = made.after if self.rows is None else made.after.row_slice(*self.rows)
        is_same = made.after is made.delta and self.rows is None
        rounding = yield from self.add(change, is_same, measures and self.rows is None)
        if not measures or not self.is_first:
            return []
        return [cast(MitigatedMatrix, {**made.metrics(), **rounding})]

    @property
    def is_first(self) -> bool:
        """Test whether no other tensor of the output counts the matrix."""
        return self.rows is None or self.rows[0] == 0

    @abstractmethod
    def add(self, change: Delta, is_same: bool, counts: bool) -> Rounding:
        """Yield the bytes of the weight with a delta added, and return what rounding did to it, if `counts`.

        Parameters
        ----------
        change
            The rows of Δ', (out, in).
        is_same
            Whether they are all of Δ, unchanged.
        """


@dataclass(frozen=True)
class AddDelta(Change):
    """Rounds the sum to the written dtype; adding a zero delta would turn −0 into +0.

    Attributes
    ----------
    tuned
        The stored ``W0 + Δ``, whose bytes are the result if Δ' is Δ.
    merges
        Whether values that rounding leaves unchanged are counted, as in a merge.
    """

    tuned: StoredTensor | None = None
    merges: bool = True

    def add(self, change: Delta, is_same: bool, counts: bool) -> Rounding:
        """Yield the rows of the sum."""
        if is_same and self.tuned is not None:
            yield from self.tuned.chunks()
            return {}
        change = (change.T if self.target.transposed else change).to(self.weight.compute)
        if change.is_zero():
            for block in blocks(self.weight):
                block.round(self.weight)
                yield block.piece
            return {}
        counts = counts and self.merges
        unchanged = 0
        for block in blocks(self.weight):
            change.add_rows(block.values, block.start, block.end)
            block.round(self.weight)
            if counts:
                unchanged += block.unchanged()
            yield block.piece
        if not counts or self.tuned is not None or self.weight.quantized:
            return {}
        return {"values": math.prod(self.weight.shape), "rounded_away": unchanged}


@dataclass(frozen=True)
class Requantize(Change):
    """Makes one of the tensors that store the sum quantized, with new scales.

    Attributes
    ----------
    role
        Which of them: ``weight`` or ``quant_scale``.
    """

    weight: FP8
    role: str = "weight"

    @property
    def is_first(self) -> bool:
        """Test whether these are the first rows' values; the scales do not count the matrix again."""
        return self.role == "weight" and super().is_first

    def add(self, change: Delta, is_same: bool, counts: bool) -> Rounding:
        """Yield the quantized values or their scales. Each pass computes the sum again, so that it is never in memory whole."""
        weight = self.weight.at_hand()
        change = (change.T if self.target.transposed else change).to(weight.compute)
        if change.is_zero():
            yield from weight.tensors[self.role].chunks()
            return {}

        def merged(i: int, j: int) -> Tensor:
            values = weight.decode(i, j)
            change.add_rows(values, i, j)
            return values

        for values in weight.requantized(self.role, merged, weight.new_scales(merged)):
            yield Piece(as_bytes(values))
        return {}


@dataclass(frozen=True)
class Recode(Change):
    """Makes the codes of the sum with the base's own scales, by the inputs of a map."""

    weight: Recodable
    entry: MappedInput = field(kw_only=True)

    def add(self, change: Delta, is_same: bool, counts: bool) -> Rounding:
        """Yield the codes, and return what is left of the response to the map's inputs."""
        weight = self.weight.at_hand()
        if change.is_zero():
            yield from weight.tensors["weight"].chunks()
            return {}
        change = change.to(weight.compute)
        feedback = _feedback(self.entry)
        m, n = weight.shape[::-1] if weight.turned else weight.shape
        wanted = got = error = 0.0
        step = max(2, RECODED_BYTES // (8 * n) * 2)  # two rows of four bits always fill their bytes
        for i in range(0, m, step):
            j = min(m, i + step)
            before = weight.coded_rows(i, j)
            values = before.clone()
            change.add_rows(values, i, j)
            if not all_finite(values):
                raise NumericError(f"tensor {weight.name!r}: {NOT_FINITE}")
            indices, rounded = round_rows(values, weight.grid(i, j), feedback)
            update = values.sub_(before)
            made = rounded - before
            wanted += feedback.energy(update, update)
            got += feedback.energy(update, made)
            error += feedback.energy(made.sub_(update), made)
            yield Piece(as_bytes(weight.packed(indices)))
        if not math.isfinite(error):
            raise NumericError(
                f"{weight.where}: the map has no finite inputs of {self.target.tensor!r}; make it again with `streamer map`"
            )
        if not counts or not wanted:
            return {}
        return {"survives": got / wanted, "rounding_error": math.sqrt(error / wanted)}


@lru_cache(maxsize=1)  # matrices with the same inputs, such as gate and up, often follow each other
def _feedback(entry: MappedInput) -> Feedback:
    return Feedback.of(entry.spectrum)


@dataclass(frozen=True)
class StackedParts(Recipe):
    """Makes a tensor that holds several matrices one after the other."""

    recipes: tuple[Recipe, ...]

    def make(self, mitigation: Mitigation, measures: bool = True) -> Pieces:
        """Yield the pieces of each recipe, one after the other."""
        metrics = []
        for recipe in self.recipes:
            metrics += yield from recipe.make(mitigation, measures)
        return metrics


New = dict[str, Tensor | None]
"""New values of tensors by name; None for a tensor that does not change."""


@dataclass(frozen=True)
class OneOf(Recipe):
    """Makes one of the tensors that hold the factors of some matrices: the first that is asked for makes them all.

    Attributes
    ----------
    name
        Its name among them.
    make_all
        Makes them, and the metrics of the matrices.
    made
        Those that are yet to be written; their recipes share it.
    stored
        The original, whose bytes stay if it does not change.
    """

    name: str
    make_all: Callable[[Mitigation], tuple[New, list[MitigatedMatrix]]]
    made: New
    stored: StoredTensor | None = None

    def make(self, mitigation: Mitigation, measures: bool = True) -> Pieces:
        """Yield the bytes."""
        metrics: list[MitigatedMatrix] = []
        if self.name not in self.made:
            made, metrics = self.make_all(mitigation)
            self.made.update(made)
        new = self.made.pop(self.name)
        if new is not None:
            yield Piece(as_bytes(new))
        elif self.stored is not None:
            yield from self.stored.chunks()
        return metrics


def written_dtype(weight: Weight) -> torch.dtype:
    """Return the dtype in which a weight is written."""
    assert weight.written is not None, f"{weight.name} is not written back"
    return weight.written


@dataclass(slots=True)
class Block:
    """Rows of a weight, and room for the result.

    Attributes
    ----------
    start, end
        First and end row.
    stored, values
        The rows in the stored dtype, and in the computing dtype for the computation.
    out, piece
        The result in the written dtype, and its bytes.
    """

    start: int
    end: int
    stored: Tensor
    values: Tensor
    out: Tensor
    piece: Piece

    def round(self, weight: Weight) -> None:
        """Round the values once into the result; refuse a file whose stored rows hold NaN or Inf."""
        try:
            encode(self.values, self.out.dtype, weight.name, self.out)
        except NumericError:
            if all_finite(self.stored):
                raise
            what = f"the values for {weight.name!r} hold NaN or Inf"
            raise NumericError(f"{weight.where}: {what}; check the file") from None

    def unchanged(self) -> int:
        """Count the values whose result has the stored bits."""
        bits = f"i{self.out.itemsize}"  # numpy compares integers faster than torch compares floats
        stored = np.frombuffer(as_bytes(self.stored.to(self.out.dtype)), bits)
        return int(np.count_nonzero(stored == np.frombuffer(as_bytes(self.out), bits)))


def blocks(weight: Weight) -> Iterator[Block]:
    """Iterate over a weight a few rows at a time.

    All memory is reused, the bytes once they are released: the system zeroes new memory first, which costs as much as a sum.
    """
    dtype = written_dtype(weight)
    m, n = weight.matrix
    rows = max(1, min(m, MERGED_BYTES // max(1, n * weight.compute.itemsize)))
    values = torch.empty((rows, n), dtype=weight.compute)
    ring = BufferRing(rows * n * dtype.itemsize)
    for i, j, stored in weight.blocks(rows):
        piece = ring.lease((j - i) * n * dtype.itemsize)
        out = torch.from_numpy(np.frombuffer(piece.view, np.uint8)).view(dtype).view(j - i, n)
        yield Block(i, j, stored, values[: j - i].copy_(stored), out, piece)


def rows_bytes(weight: Weight) -> int:
    """Estimate the memory to make a weight a few rows at a time: rows read or decoded, added, and rounded into alternating buffers."""
    m, n = weight.matrix
    row = max(1, n * weight.compute.itemsize)
    # As many bytes as a quantized weight decodes at a time.
    block = max(row, min(m * row, MERGED_BYTES))
    return (3 + (DECODED if weight.quantized else 1)) * block + weight.load_bytes
