"""Read the values of a loaded model's tensors under each variant, when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from streamer.linalg.operators import Delta, LowRank
from streamer.linalg.torch_state import CPU
from streamer.output.factors import back_project
from streamer.plan.name_matching import (
    TensorSlice,
)
from streamer.plan.targets import Target
from streamer.streaming.run_time import RunTimeTensor, WeightSource
from streamer.streaming.variants import VariantSet
from streamer.weights.base import Plain, Weight
from streamer.weights.logical import WeightView

READ_BYTES = 64 << 20
"""Bytes of a matrix's rows that are read and multiplied at a time."""


Shared = TypeVar("Shared", Tensor, Delta)

Changes = list[tuple[TensorSlice, Delta]]
"""Changes to a weight, or to one matrix of it, each with the slice that it changes, in the order of targets."""

ROOM = 384 << 20
"""Bytes of float32 values of one layer that stay in memory for the next group of sequences; the others are converted again for each."""


class LayerCache:
    """Values that groups of sequences share while they run one layer, as many as there is room for."""

    def __init__(self, room: int = ROOM) -> None:
        self.room = room
        self._nbytes = 0
        self._values: dict[Any, Any] = {}

    def get(self, key: Any, read: Callable[[], Shared]) -> Shared:
        """Return the values of a key; read them if they are not here."""
        if key in self._values:
            return cast(Shared, self._values[key])
        values = read()
        if isinstance(values, Tensor):
            nbytes = values.nbytes
        else:
            nbytes = sum(t.nbytes for _, t in values.named_tensors())
        if self._nbytes + nbytes <= self.room:
            self._values[key] = values
            self._nbytes += nbytes
        return values

    def clear(self) -> None:
        """Drop all values: another layer begins."""
        self._values.clear()
        self._nbytes = 0


class Values:
    """Float32 values of the tensors that form a loaded model, by the variant's number.

    Attributes
    ----------
    applied
        Names of the weights whose deltas were used.
    read
        Names of the weights that were read with the adapter's edits.
    otherwise_used
        Names of watched matrices that a group of a fit used in another way than a product or a look-up.
    """

    def __init__(self, job: VariantSet) -> None:
        self.job = job
        self.plan = job.plan
        self.device = job.device
        self.base: WeightView = replace(job.plan.weights, replacements={}, derived={})
        self.applied: set[str] = set()
        self.read: set[str] = set()
        self.otherwise_used: set[str] = set()
        self.cache = LayerCache()

    def adapted(self, variant: int) -> bool:
        """Test whether a variant uses the adapter; only the base does not."""
        return self.job.variants[variant].mitigation is not None

    def weight(self, name: str, variant: int) -> Weight:
        """Return the weight to which a variant's deltas are added."""
        adapted = self.adapted(variant)
        if adapted:
            self.read.add(name)
        return (self.plan.weights if adapted else self.base)[name]

    def sources(self, tensor: RunTimeTensor, variant: int) -> tuple[WeightSource, ...]:
        """Return the sources of a tensor under a variant."""
        return tensor.adapted if self.adapted(variant) else tensor.base

    def edited(self, tensor: RunTimeTensor) -> bool:
        """Test whether the adapter changes a tensor other than by deltas; such changes affect all variants but the base."""
        return bool(self.edits & tensor.weights) or tensor.base != tensor.adapted

    def dense(self, tensor: RunTimeTensor) -> bool:
        """Test whether the adapter changes a tensor by deltas, and not by one whose factors cover the whole tensor."""
        pairs = tensor.targets(self.plan)
        source = tensor.adapted[0]
        if (
            len(pairs) != 1
            or tensor.stacked
            or source.transposed
            or len(source.slices) > 1
            or len(tensor.shape) != 2
        ):
            return bool(pairs)
        ((target, slice_),) = pairs
        return not target.module.low_rank or slice_.index is not None or slice_.rows is not None

    def change(self, target: Target, part: TensorSlice, variant: int) -> Delta:
        """Compute the change Δ' that a variant's adapter makes to a slice of a weight, in float32 and oriented as the weight is stored."""
        self.applied.add(part.weight)
        key = target.tensor, variant
        delta = self.cache.get(
            key, lambda: self._delta(target, variant).to(torch.float32, self.device)
        )
        delta = delta if part.rows is None else delta.row_slice(*part.rows)
        return delta.T if target.transposed else delta

    def changes(self, slice_: TensorSlice, variant: int) -> Changes:
        """List a variant's changes to a weight, or to one matrix of it."""
        pairs = self.plan.by_weight.get(slice_.weight, ()) if self.adapted(variant) else ()
        return [
            (part, self.change(t, part, variant))
            for t, part in pairs
            if slice_.index in (None, part.index)
        ]

    def _delta(self, target: Target, variant: int) -> Delta:
        """Compute Δ' (out, in) of one variant."""
        method = self.job.variants[variant].mitigation
        assert method is not None
        findings = self.job.findings if method.needs_detection else None
        detection = None if findings is None else findings.by_tensor[target.tensor].detection
        delta = self.cache.get(target.tensor, lambda: self.plan.finite_delta(target))
        after = method.mitigated(delta, detection, target.tensor)
        factors = target.module.factors
        if (
            self.job.projected
            and factors is not None
            and isinstance(after, LowRank)
            and factors.scaling
        ):
            B, A, _ = back_project(after, factors.rank, factors.scaling)
            return LowRank(B * factors.scaling, A.T)
        return after

    def whole(self, tensor: RunTimeTensor, variant: int) -> Tensor:
        """Read a tensor, or all matrices of a stack, with deltas."""
        matrices = [self.matrix(source, variant) for source in self.sources(tensor, variant)]
        return torch.stack(matrices) if tensor.stacked else matrices[0]

    def matrix(self, source: WeightSource, variant: int) -> Tensor:
        """Read the tensor or the single matrix of a source, with deltas."""
        pieces = [self._piece(piece, variant) for piece in source.slices]
        values = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return values.T if source.transposed else values

    def weight_of(self, slice_: TensorSlice, variant: int) -> Weight:
        """Return a weight, or one matrix of it."""
        weight = self.weight(slice_.weight, variant)
        return weight if slice_.index is None else weight.slice(slice_.index)

    def blocks(
        self,
        source: WeightSource,
        variant: int,
        first: int,
        last: int,
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Read rows of a source's matrix as stored, a few at a time, without deltas; yields (from, to, values).

        Parameters
        ----------
        first, last
            Range of rows to read; the yielded positions count from `first`.
        dtype
            Dtype to which the values are rounded.
        """
        at = -first
        for slice_ in source.slices:
            weight = self.weight_of(slice_, variant).at_hand()
            m, n = weight.matrix
            step = max(1, READ_BYTES // (4 * max(1, n)))
            for i in range(max(0, -at), min(m, last - first - at), step):
                j = min(i + step, m, last - first - at)

                def read(
                    weight: Weight = weight, slice_: TensorSlice = slice_, i: int = i, j: int = j
                ) -> Tensor:
                    # They cross to the device as stored, in the fewest bytes.
                    values = weight.rows(i, j).to(self.device).to(dtype, copy=True)
                    if slice_.index is None:
                        self._edit(slice_.weight, variant, values, i)
                    return values

                adapted = self.adapted(variant) and slice_.weight in self.edits
                yield at + i, at + j, self.cache.get((slice_, i, j, adapted, dtype), read)
            at += m

    def looked_up(
        self, tensor: RunTimeTensor, variant: int, ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read the looked-up rows of a plain matrix, without deltas; returns their numbers, the rows, and each id's place among them."""
        # On the CPU: files are read by these numbers.
        unique, at = torch.unique(ids.to(CPU), return_inverse=True)
        ((slice_,),) = (source.slices for source in self.sources(tensor, variant))
        weight = self.weight(slice_.weight, variant).at_hand()
        wanted = unique.tolist()
        if isinstance(weight, Plain) and not weight.load_bytes:
            rows = weight.rows(0, weight.matrix[0])[unique]  # mapped: only their pages are read
        else:
            rows = torch.cat([weight.rows(i, i + 1) for i in wanted])
        rows = rows.to(torch.float32, copy=True).reshape(-1, *tensor.shape[1:])
        if slice_.weight in self.edits:
            for row, i in zip(rows, wanted, strict=True):
                self._edit(slice_.weight, variant, row[None], i)
        return unique.to(self.device), rows.to(self.device), at.to(self.device)

    def row_access(self, tensor: RunTimeTensor) -> bool:
        """Test whether a few rows can be read by themselves: the tensor is a vector or matrix that one weight stores unchanged."""
        sources = (*tensor.base, *tensor.adapted)
        unchanged = (
            len(s.slices) == 1 and s.slices[0].index is None and not s.transposed for s in sources
        )
        return len(tensor.shape) <= 2 and all(unchanged)

    def _piece(self, slice_: TensorSlice, variant: int) -> Tensor:
        values = self.weight_of(slice_, variant).whole(self.device).to(torch.float32)
        if slice_.index is None:
            self._edit(slice_.weight, variant, values, 0)
        for part, change in self.changes(slice_, variant):
            into = values if part.index is None or slice_.index is not None else values[part.index]
            matrix = into.view(len(into), -1)
            change.add_rows(matrix, 0, len(matrix))
        return values

    def _edit(self, name: str, variant: int, values: Tensor, start: int) -> None:
        """Apply the adapter's edits to rows of a weight starting at `start`: biases are added, rows are replaced."""
        edits = self.plan.edits
        if not self.adapted(variant):
            return
        if name in edits.shifts:
            shift, scaling = edits.shifts[name]
            rows = Plain.of(shift).rows(start, start + len(values)).to(values)
            values.add_(rows.reshape(values.shape), alpha=scaling)
        if name in edits.rows:
            stored, indices = edits.rows[name]
            tokens = Plain.of(stored)
            for at, row in enumerate(indices):
                if start <= row < start + len(values):
                    values[row - start] = tokens.rows(at, at + 1)[0].to(values)

    @cached_property
    def edits(self) -> set[str]:
        """Return the names of the weights that the adapter changes other than by deltas."""
        edits = self.plan.edits
        return {*edits.sources, *edits.shifts, *edits.rows}
