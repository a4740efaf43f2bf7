"""What a tensor of a merged model is made of: one recipe a way, each giving the bytes a few rows at a time.

A recipe gives bytes of the dtype that the output has; what is computed is computed in the computing dtype and rounded once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from streamer.errors import NumericError
from streamer.linalg.operators import Delta, all_finite
from streamer.plan.targets import Target
from streamer.storage.atomic_file import Buffer
from streamer.storage.page_cache import QUEUE
from streamer.weights.base import StoredTensor, Weight
from streamer.weights.dtypes import Encoding, as_bytes, encode
from streamer.weights.quantization.fp8 import FP8

BLOCK_BYTES = 4 << 20
"""Rows of this many float32 bytes are merged at a time, so that memory does not depend on the matrix.

CPU seconds for 4 GB of a width of 4096, one thread, three rounds on a busy machine: 2 MB 2.3 to 2.4; 4 MB 2.1 to 3.2; 8 MB 2.2 to
3.7; 0.5 MB 3.2 to 3.7. From 2 MB on the noise is larger than any difference; below, the calls' own cost shows.
"""


Mitigated = Callable[[Target], tuple[Delta, Delta]]
"""Gives Δ and Δ' of one matrix; Δ' is Δ itself where nothing changes."""


class Recipe(Protocol):
    """How one tensor of a merged model is made."""

    def pieces(self, mitigated: Mitigated) -> Iterator[Buffer]:
        """Its bytes, in order; each stays as it is until `QUEUE` more were given."""


@dataclass(frozen=True, slots=True)
class CopyBytes:
    """The bytes of a tensor as they stand, of any dtype."""

    part: StoredTensor

    def pieces(self, mitigated: Mitigated) -> Iterator[Buffer]:
        """The file's own bytes."""
        return self.part.file.chunks(self.part.info)


@dataclass(frozen=True)
class Cast:
    """The values of a weight, rounded once to the dtype that is written: the adapter's own, or what codes mean. They must be finite."""

    weight: Weight

    def pieces(self, mitigated: Mitigated) -> Iterator[Buffer]:
        """Rows in the written dtype."""
        for _, _, raw, values, out in _rows(self.weight):
            if not all_finite(raw):
                raise NumericError(
                    f"{self.weight.where}: the values for {self.weight.name!r} hold NaN or Inf; check the file"
                )
            yield as_bytes(encode(values, _encoding(self.weight), raw, self.weight.name, out))


@dataclass(frozen=True)
class AddDelta:
    """``W0 + Δ'``; a delta of zero leaves W0's own bytes: adding it would turn −0 into +0.

    `tuned` is ``W0 + Δ`` as it stands in a file, whose bytes are the result where Δ' is Δ.
    """

    weight: Weight
    target: Target
    tuned: StoredTensor | None = None

    def pieces(self, mitigated: Mitigated) -> Iterator[Buffer]:
        """Rows of the sum."""
        delta, after = mitigated(self.target)
        if after is delta and self.tuned is not None:
            yield from self.tuned.file.chunks(self.tuned.info)
            return
        change = (after.T if self.target.transposed else after).to(self.weight.compute)
        nothing = change.is_zero()
        encoding = _encoding(self.weight)
        for i, j, raw, values, out in _rows(self.weight):
            if nothing and raw.dtype == encoding.dtype:
                yield as_bytes(raw)
            else:
                change.add_rows(values, i, j)
                yield as_bytes(encode(values, encoding, raw, self.weight.name, out))


@dataclass(frozen=True)
class Requantize:
    """One of the tensors that the codes of ``W0 + Δ'`` stand in, scales chosen anew; a delta of zero leaves W0's own bytes."""

    weight: FP8
    target: Target
    role: str

    def pieces(self, mitigated: Mitigated) -> Iterator[Buffer]:
        """Codes, or their scales. The sum is made again for each pass: it is never in memory whole."""
        (_, delta), weight = mitigated(self.target), self.weight.at_hand()
        change = (delta.T if self.target.transposed else delta).to(weight.compute)
        part = weight.tensors[self.role]
        if change.is_zero():
            yield from part.file.chunks(part.info)
            return

        def merged(i: int, j: int) -> Tensor:
            values = weight.decode(i, j)
            change.add_rows(values, i, j)
            return values

        for piece in weight.requantized(self.role, merged, weight.new_scales(merged)):
            yield as_bytes(piece)


@dataclass(frozen=True)
class RowSlice:
    """A tensor that holds some rows of a matrix: what the recipe makes of these rows of the delta."""

    recipe: AddDelta | Requantize
    rows: tuple[int, int]

    def pieces(self, mitigated: Mitigated) -> Iterator[Buffer]:
        """The recipe's."""

        def share(target: Target) -> tuple[Delta, Delta]:
            delta, after = mitigated(target)
            return delta.row_slice(*self.rows), after.row_slice(*self.rows)

        return self.recipe.pieces(share)


@dataclass(frozen=True)
class Stack:
    """A tensor that holds one matrix after the other."""

    recipes: tuple[Recipe, ...]

    def pieces(self, mitigated: Mitigated) -> Iterator[Buffer]:
        """Those of each."""
        return itertools.chain.from_iterable(recipe.pieces(mitigated) for recipe in self.recipes)


def repeats(recipe: Recipe) -> bool:
    """Whether another tensor's recipe asks for the same delta, so that it counts there: codes' scales, and all shares but the first."""
    if isinstance(recipe, Stack):
        return repeats(recipe.recipes[0])
    if isinstance(recipe, RowSlice):
        return recipe.rows[0] > 0 or repeats(recipe.recipe)
    return isinstance(recipe, Requantize) and recipe.role != "weight"


@dataclass(frozen=True)
class AddBias:
    """A weight plus `scale` times a tensor of its shape: a bias with LoRA's own."""

    weight: Weight
    shift: Weight
    scale: float

    def pieces(self, mitigated: Mitigated) -> Iterator[Buffer]:
        """Rows of the sum."""
        for i, j, raw, values, out in _rows(self.weight):
            values.add_(self.shift.rows(i, j).to(values.dtype), alpha=self.scale)
            yield as_bytes(encode(values, _encoding(self.weight), raw, self.weight.name, out))


@dataclass(frozen=True)
class ReplaceRows:
    """A weight with some of its rows exchanged: an embedding with trained tokens. All other rows keep their bytes."""

    weight: Weight
    tokens: Weight
    indices: tuple[int, ...]

    def pieces(self, mitigated: Mitigated) -> Iterator[Buffer]:
        """Rows, the trained ones rounded once."""
        place = {row: at for at, row in enumerate(self.indices)}
        for i, j, raw, values, out in _rows(self.weight):
            out.copy_(raw)
            for row in (r for r in self.indices if i <= r < j):
                at = place[row]
                new = self.tokens.rows(at, at + 1).to(values.dtype)
                out[row - i] = encode(new, _encoding(self.weight), torch.zeros_like(new), self.tokens.name)[0]
            yield as_bytes(out)


def _encoding(weight: Weight) -> Encoding:
    assert weight.encoding is not None, f"{weight.name} is not written back"
    return weight.encoding


def _rows(weight: Weight) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
    """A few rows at a time: from, to, as stored, in the computing dtype to compute in, and a buffer of the written dtype.

    The buffers are the same for all, the last one by turns: fresh ones are zeroed by the system first, which costs as much as a sum.
    """
    encoding = _encoding(weight)
    m, n = weight.matrix
    rows = max(1, BLOCK_BYTES // max(1, n * weight.compute.itemsize))
    values = torch.empty((min(rows, m), n), dtype=weight.compute)
    rounded = itertools.cycle([torch.empty((min(rows, m), n), dtype=encoding.dtype) for _ in range(QUEUE + 1)])
    for i, j, raw in weight.blocks(rows):
        yield i, j, raw, values[: j - i].copy_(raw), next(rounded)[: j - i]
