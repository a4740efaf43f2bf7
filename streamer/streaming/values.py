"""Read the values of a loaded model's tensors under each variant: the base's own, or with the adapter's edits and mitigated deltas."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamer.detection.findings import Findings
from streamer.errors import UsageError
from streamer.linalg.allocation import CPU
from streamer.linalg.low_rank import LowRank
from streamer.linalg.operators import Delta
from streamer.output.back_projection import back_project
from streamer.plan.plan import Plan
from streamer.plan.targets import Target, TensorSlice
from streamer.streaming.lazy import BLOCK_BYTES
from streamer.streaming.run_time import RunTimeTensor, WeightSource
from streamer.streaming.variants import Variant
from streamer.weights.base import Weight
from streamer.weights.logical import WeightView
from streamer.weights.plain import Plain


@dataclass(frozen=True)
class VariantSet:
    """Variants of one adapted model, and what their deltas are computed from.

    Attributes
    ----------
    findings
        Findings on all matrices; None if no variant needs them.
    projected
        Whether deltas are projected onto the adapter's rank, as `mitigate` writes them, instead of kept complete, as `merge` does.
    rounds_products
        Whether products of the base's weights with activations use factors rounded to bfloat16.
    device
        Device on which the model runs; everything read from files is copied to it here.
    """

    plan: Plan
    variants: tuple[Variant, ...]
    findings: Findings | None
    projected: bool = False
    rounds_products: bool = False
    device: torch.device = CPU

    def __post_init__(self) -> None:
        if self.rounds_products and self.device != CPU:
            raise UsageError(f"bf16 products run only on the CPU; with --device {self.device}, use --dtype float32")


class Values:
    """Float32 values of the tensors that form a loaded model, by the variant's number.

    Attributes
    ----------
    applied
        Names of the weights whose deltas were used.
    read
        Names of the weights that were read with the adapter's edits.
    """

    def __init__(self, job: VariantSet) -> None:
        self.job, self.plan, self.device = job, job.plan, job.device
        self.base: WeightView = replace(job.plan.weights, replacements={}, derived={})
        self.applied: set[str] = set()
        self.read: set[str] = set()
        self._last: tuple[str, Delta] | None = None

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
        edits = self.plan.edits
        names = {*edits.sources, *edits.shifts, *edits.rows}
        return bool(names & tensor.weights) or tensor.base != tensor.adapted

    def targets(self, tensor: RunTimeTensor) -> list[tuple[Target, TensorSlice]]:
        """List the targets in a tensor, each with its slice."""
        return [pair for weight in sorted(tensor.weights) for pair in self.plan.by_weight.get(weight, ())]

    def low_rank_target(self, tensor: RunTimeTensor) -> Target | None:
        """Return the target that covers the whole tensor, if its delta is given as factors."""
        pairs = self.targets(tensor)
        if len(pairs) != 1 or tensor.stacked or tensor.adapted[0].transposed or len(tensor.adapted[0].slices) > 1:
            return None
        (target, slice_), low_rank = pairs[0], pairs[0][0].module.low_rank
        return target if low_rank and slice_.index is None and slice_.rows is None and len(tensor.shape) == 2 else None

    def deltas(self, target: Target) -> Iterator[LowRank | None]:
        """Yield the factors of each variant's Δ' in float32, oriented as the weight is stored: (rows, columns); None for the base."""
        self.applied.update(slice_.weight for slice_ in target.slices)
        for variant in range(len(self.job.variants)):
            if not self.adapted(variant):
                yield None
                continue
            delta = self._delta(target, variant)
            assert isinstance(delta, LowRank)
            yield (delta.T if target.transposed else delta).to(torch.float32, self.device)

    def _delta(self, target: Target, variant: int) -> Delta:
        """Compute Δ' (out, in) of one variant; Δ is kept for the next variants."""
        if self._last is None or self._last[0] != target.tensor:
            self._last = target.tensor, self.plan.finite_delta(target)
        method, findings = self.job.variants[variant].mitigation, self.job.findings
        assert method is not None
        needed = findings if method.needs_detection else None
        found = None if needed is None else needed.by_tensor[target.tensor].detection
        after = method.mitigated(self._last[1], found, target.tensor)
        factors = target.module.factors
        if self.job.projected and factors is not None and isinstance(after, LowRank) and factors.scaling:
            B, A, _ = back_project(after, factors.rank, factors.scaling)
            return LowRank(B * factors.scaling, A.T)
        return after

    def whole(self, tensor: RunTimeTensor, variant: int, with_delta: bool) -> Tensor:
        """Read a tensor, or all matrices of a stack.

        Parameters
        ----------
        with_delta
            Whether to add deltas.
        """
        sources = self.sources(tensor, variant)
        if not tensor.stacked:
            return self.matrix(sources[0], variant, with_delta)
        return torch.stack([self.matrix(source, variant, with_delta) for source in sources])

    def matrix(self, source: WeightSource, variant: int, with_delta: bool) -> Tensor:
        """Read the tensor or the single matrix of a source."""
        pieces = [self._piece(piece, variant, with_delta) for piece in source.slices]
        values = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return values.T if source.transposed else values

    def weight_of(self, slice_: TensorSlice, variant: int) -> Weight:
        """Return a weight, or one matrix of it."""
        weight = self.weight(slice_.weight, variant)
        return weight if slice_.index is None else weight.slice(slice_.index)

    def blocks(self, source: WeightSource, variant: int, first: int, last: int) -> Iterator[tuple[int, int, Tensor]]:
        """Read rows of a source's matrix as stored, a few at a time, without deltas; yields (from, to, values).

        Parameters
        ----------
        first, last
            Range of rows to read; the yielded positions count from `first`.
        """
        at = -first
        for slice_ in source.slices:
            weight = self.weight_of(slice_, variant).at_hand()
            m, n = weight.matrix
            step = max(1, BLOCK_BYTES // (4 * max(1, n)))
            for i in range(max(0, -at), min(m, last - first - at), step):
                j = min(i + step, m, last - first - at)
                values = _float32(weight.rows(i, j), self.device)
                if slice_.index is None:
                    self._edit(slice_.weight, variant, values, i)
                yield at + i, at + j, values
            at += m

    def piece(self, slice_: TensorSlice, variant: int) -> Tensor:
        """Read a weight, or one matrix of it, without deltas."""
        values = self.weight_of(slice_, variant).whole(self.device).to(torch.float32)
        if slice_.index is None:
            self._edit(slice_.weight, variant, values, 0)
        return values

    def rows(self, tensor: RunTimeTensor, variant: int, i: int, j: int) -> Tensor:
        """Read rows i to j of a plain matrix or vector, without deltas; see `row_access`."""
        return self._rows(tensor, variant, i, j, self.device)

    def looked_up(self, tensor: RunTimeTensor, variant: int, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read the looked-up rows of a plain matrix, without deltas; returns their numbers, the rows, and each id's place among them."""
        unique, at = torch.unique(ids.to(CPU), return_inverse=True)  # files are read by these numbers
        rows = torch.cat([self._rows(tensor, variant, i, i + 1, CPU) for i in unique.tolist()])  # to copy at once
        return unique.to(self.device), rows.to(self.device), at.to(self.device)

    def row_access(self, tensor: RunTimeTensor) -> bool:
        """Test whether a few rows can be read by themselves: the tensor is a vector or matrix that one weight stores unchanged."""
        sources = (*tensor.base, *tensor.adapted)
        return len(tensor.shape) <= 2 and all(
            len(s.slices) == 1 and s.slices[0].index is None and not s.transposed for s in sources
        )

    def _piece(self, slice_: TensorSlice, variant: int, with_delta: bool) -> Tensor:
        values = self.piece(slice_, variant)
        for target, part in self.plan.by_weight.get(slice_.weight, ()) if with_delta and self.adapted(variant) else ():
            if slice_.index in (None, part.index):
                into = values if part.index is None or slice_.index is not None else values[part.index]
                self._add(target, part, variant, into)
        return values

    def _add(self, target: Target, part: TensorSlice, variant: int, values: Tensor) -> None:
        """Add a target's delta, or some of its rows, to the values that it changes."""
        delta = self._delta(target, variant)
        delta = delta if part.rows is None else delta.row_slice(*part.rows)
        change = (delta.T if target.transposed else delta).to(torch.float32, self.device)
        matrix = values.view(len(values), -1)
        change.add_rows(matrix, 0, len(matrix))
        self.applied.add(part.weight)

    def _edit(self, name: str, variant: int, values: Tensor, start: int) -> None:
        """Apply the adapter's edits to rows of a weight starting at `start`: biases are added, rows are replaced."""
        edits = self.plan.edits
        if not self.adapted(variant):
            return
        if name in edits.shifts:
            shift, scaling = edits.shifts[name]
            values.add_(
                Plain.of(shift).rows(start, start + len(values)).to(values).reshape(values.shape), alpha=scaling
            )
        if name in edits.rows:
            stored, indices = edits.rows[name]
            tokens = Plain.of(stored)
            for at, row in enumerate(indices):
                if start <= row < start + len(values):
                    values[row - start] = tokens.rows(at, at + 1)[0].to(values)

    def _rows(self, tensor: RunTimeTensor, variant: int, i: int, j: int, device: torch.device) -> Tensor:
        ((slice_,),) = (source.slices for source in self.sources(tensor, variant))
        values = _float32(self.weight(slice_.weight, variant).at_hand().rows(i, j), device)
        self._edit(slice_.weight, variant, values, i)
        return values.reshape(j - i, *tensor.shape[1:])

    def unused(self) -> list[str]:
        """List the weights whose change by the adapter no pass has used so far."""
        edits = self.plan.edits
        edited = {*edits.sources, *edits.shifts, *edits.rows}
        return sorted({*self.plan.by_weight} - self.applied | edited - self.read)


def _float32(stored: Tensor, device: torch.device) -> Tensor:
    """Copy values to a device in their stored dtype, which moves the fewest bytes, and convert them to float32 there."""
    return stored.to(device).to(torch.float32, copy=True)


def same_values(values: Values, tensors: Sequence[RunTimeTensor], additive: bool) -> list[range]:
    """Group consecutive variants under which tensors have the same values.

    Parameters
    ----------
    additive
        Whether deltas are added to the products instead of the tensors.
    """
    count = len(values.job.variants)
    if count == 1:
        return [range(1)]
    if not additive and any(values.targets(tensor) for tensor in tensors):
        return [range(v, v + 1) for v in range(count)]
    if not any(values.edited(tensor) for tensor in tensors):
        return [range(count)]
    starts = [v for v in range(count) if v == 0 or values.adapted(v) != values.adapted(v - 1)]
    return [range(i, j) for i, j in itertools.pairwise([*starts, count])]
