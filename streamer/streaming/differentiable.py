"""Read a parameter so that gradients flow to its other factor and to the coefficients of its deltas.

A product with a matrix is split into a product with the base's weight, which is read again for the backward pass, and one with each delta's
factors. Any other operation uses the values with deltas added, which autograd keeps until the backward pass. A low-rank delta has one
coefficient for each direction, ``U diag(c) Uᵀ Δ``; a dense delta has a single one, ``c Δ``.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from streamer.linalg.low_rank import LowRank
from streamer.plan.plan import Plan
from streamer.plan.targets import Target, TensorSlice
from streamer.streaming.installed import RowBatch
from streamer.streaming.lazy import LazyTensor, Multiplier
from streamer.streaming.products import Blocks, StreamedMatrix
from streamer.streaming.run_time import RunTimeTensor, WeightSource
from streamer.streaming.spool import Spool, Spooled
from streamer.streaming.values import Values


@dataclass(frozen=True)
class FactoredChange:
    """``L Rᵀ`` (m, n) with L (m, r) depending on the coefficients and a constant R (n, r)."""

    delta: LowRank

    def dense(self) -> Tensor:
        """Form the matrix."""
        return self.delta.dense()

    def add_product(self, out: Tensor, x: Tensor, transposed: bool, rows: tuple[int, int]) -> Tensor:
        """Compute ``out + x Mᵀ`` (or ``out + x M`` if `transposed`), where M are these rows of the matrix; all arguments are matrices."""
        part = self.delta.row_slice(*rows)
        return torch.addmm(out, x @ part.L, part.R.T) if transposed else torch.addmm(out, x @ part.R, part.L.T)

    def rows(self, ids: Tensor) -> Tensor:
        """Form the given rows."""
        return self.delta.L[ids] @ self.delta.R.T


@dataclass(frozen=True)
class DenseChange:
    """``c Δ`` (m, n) with a single coefficient; Δ is formed for each product."""

    coefficient: Tensor | float
    shape: tuple[int, int]
    matrix: Callable[[], Tensor]

    def dense(self) -> Tensor:
        """Form the matrix."""
        return self.coefficient * self.matrix()

    def add_product(self, out: Tensor, x: Tensor, transposed: bool, rows: tuple[int, int]) -> Tensor:
        """Compute ``out + x Mᵀ`` (or ``out + x M`` if `transposed`), where M are these rows of the matrix; all arguments are matrices."""
        i, j = rows
        streamed = StreamedMatrix((j - i, self.shape[1]), lambda: iter([(0, j - i, self.matrix()[i:j])]))
        return out + self.coefficient * streamed.product(x, transposed)

    def rows(self, ids: Tensor) -> Tensor:
        """Form the given rows."""
        return self.coefficient * self.matrix()[ids]


Change = FactoredChange | DenseChange
"""Change that a variant adds to rows of a weight."""


class CoefficientDeltas:
    """Deltas of an adapter, with coefficients.

    Parameters
    ----------
    directory
        Directory in which singular directions are spooled; each is computed once.
    device
        See `Job`.

    Attributes
    ----------
    coefficients
        For each target (p,), tensors that may require gradients; None for unchanged deltas.
    """

    def __init__(self, plan: Plan, directory: Path | None, device: torch.device) -> None:
        self.plan, self.spool, self.device = plan, Spool(directory), device
        self.coefficients: Mapping[str, Tensor] | None = None
        self._places: dict[str, Spooled] = {}

    def change(self, target: Target, part: TensorSlice) -> Change:
        """Form the change that a target makes to a slice of a weight, in float32 and oriented as the weight is stored."""
        c = None if self.coefficients is None else self.coefficients[target.tensor]
        if target.module.low_rank:
            delta = self._factors(target, c)
            delta = delta if part.rows is None else delta.row_slice(*part.rows)
            return FactoredChange(delta.T if target.transposed else delta)

        def matrix() -> Tensor:
            dense = self.plan.finite_delta(target)
            dense = dense if part.rows is None else dense.row_slice(*part.rows)
            return (dense.T if target.transposed else dense).to(torch.float32, self.device).dense()

        rows, columns = target.module.shape
        i, j = part.rows or (0, rows)
        shape = (columns, j - i) if target.transposed else (j - i, columns)
        return DenseChange(1.0 if c is None else c[0].to(torch.float32), shape, matrix)

    def _factors(self, target: Target, c: Tensor | None) -> LowRank:
        if c is None:
            delta = self.plan.finite_delta(target)
            assert isinstance(delta, LowRank)
            return delta.to(torch.float32, self.device)
        place = self._places.get(target.tensor)
        if place is None:
            delta = self.plan.finite_delta(target)
            assert isinstance(delta, LowRank)
            U, S, Vh = delta.svd()
            place = self.spool.write([U.to(torch.float32), (Vh.T * S).to(torch.float32)])
            self._places[target.tensor] = place
        U, R = (factor.to(self.device) for factor in self.spool.read(place))
        return LowRank(U * c.to(torch.float32), R)


@dataclass
class Setting:
    """State of a running model: its variant, and what its parameters are read with.

    Attributes
    ----------
    values
        Values of the base and of the adapted model, as variants 0 and 1.
    variant
        The variant that runs.
    """

    values: Values
    deltas: CoefficientDeltas
    batch: RowBatch
    variant: int = 1

    @contextlib.contextmanager
    def reference(self, variant: int) -> Iterator[None]:
        """Run the base, or the adapted model without coefficients, inside the context."""
        before = self.variant, self.deltas.coefficients
        self.variant, self.deltas.coefficients = variant, None
        try:
            yield
        finally:
            self.variant, self.deltas.coefficients = before

    def changes(self, slice_: TensorSlice) -> list[tuple[TensorSlice, Change]]:
        """List the changes to a weight, or to one matrix of it, in the order of targets."""
        if not self.values.adapted(self.variant):
            return []
        self.values.applied.add(slice_.weight)
        pairs = self.values.plan.by_weight.get(slice_.weight, ())
        return [(part, self.deltas.change(t, part)) for t, part in pairs if slice_.index in (None, part.index)]


class DifferentiableReader(Multiplier):
    """Reads one parameter of a model.

    Parameters
    ----------
    head
        Whether the parameter belongs to the module that computes the logits, one block of the vocabulary at a time.
    rounded
        Whether products with the base's weight use factors rounded to bfloat16.
    """

    def __init__(self, setting: Setting, tensor: RunTimeTensor, *, head: bool = False, rounded: bool = False) -> None:
        self.setting, self.tensor, self.head, self.rounded = setting, tensor, head, rounded
        self.name, self.shape, self.device = tensor.name, tensor.shape, setting.values.device

    @property
    def sources(self) -> tuple[WeightSource, ...]:
        """Return the parameter's sources for the current variant."""
        return self.setting.values.sources(self.tensor, self.setting.variant)

    def row_range(self) -> tuple[int, int]:
        """Return all rows, or for the head the current block of the vocabulary."""
        return (self.setting.batch.vocabulary if self.head else None) or (0, self.shape[0])

    def read(self) -> Tensor:
        """Read all values, including deltas."""
        self.setting.batch.on_read(self.tensor)
        i, j = self.row_range()
        if self.tensor.stacked:
            return torch.stack([self.values_of(source) for source in self.sources])
        values = self.values_of(self.sources[0])
        return values if (i, j) == (0, self.shape[0]) else values[i:j]

    def values_of(self, source: WeightSource) -> Tensor:
        """Read the tensor or the single matrix of a source, including deltas."""
        pieces = [self._piece(slice_) for slice_ in source.slices]
        values = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return values.T if source.transposed else values

    def _piece(self, slice_: TensorSlice) -> Tensor:
        values = self.setting.values.piece(slice_, self.setting.variant)
        for part, change in self.setting.changes(slice_):
            added = change.dense()
            if part.index is not None and slice_.index is None:
                index = torch.tensor([part.index], device=self.device)
                values = values.index_add(0, index, added.view(1, *values.shape[1:]))
            else:
                values = values + added.view(values.shape)
        return values

    def matrix(self, index: int) -> Tensor | None:
        """Return a stand-in for one expert's matrix. The whole stack then counts as used, since the text decides which experts run."""
        if not self.tensor.stacked:
            return None
        if self.setting.values.adapted(self.setting.variant):
            self.setting.values.applied |= self.tensor.weights
            self.setting.values.read |= self.tensor.weights
        return LazyTensor.of(_Expert(self, index))

    def gather(self, ids: Tensor) -> Tensor | None:
        """Look up rows."""
        values, variant = self.setting.values, self.setting.variant
        if not values.row_access(self.tensor):
            return None
        self.setting.batch.on_read(self.tensor)
        unique, rows, at = values.looked_up(self.tensor, variant, ids)
        for _, change in self.setting.changes(self.sources[0].slices[0]):
            rows = rows + change.rows(unique)
        # Not `rows[at]`: its backward pass adds up gradients in an order that depends on the threads.
        return functional.embedding(at, rows)

    def product(self, x: Tensor, transposed: bool) -> Tensor:
        """Compute ``x Wᵀ``, or ``x W`` if `transposed`."""
        return self.multiply(x, self.sources[0], transposed, self.row_range())

    def multiply(self, x: Tensor, source: WeightSource, transposed: bool, rows: tuple[int, int]) -> Tensor:
        """Compute ``x Mᵀ`` (``x M`` if `transposed`) for these rows of a source's matrix, or all rows if its transpose is stored."""
        setting, slices = self.setting, source.slices
        shapes = [setting.values.weight_of(slice_, setting.variant).matrix for slice_ in slices]
        starts = [*itertools.accumulate((m for m, _ in shapes), initial=0)]
        if source.transposed:
            transposed, rows = not transposed, (0, starts[-1])
        first, last = rows
        streamed = StreamedMatrix((last - first, shapes[0][1]), lambda: self._blocks(source, rows), self.rounded)
        X = x.reshape(-1, x.shape[-1])
        out = streamed.product(X, transposed)
        for at, end, slice_ in zip(starts, starts[1:], slices, strict=False):
            i, j = max(first, at), min(last, end)
            for _, change in setting.changes(slice_) if i < j else ():
                slice_rows = i - at, j - at
                if transposed:
                    out = change.add_product(out, X[:, i - first : j - first], True, slice_rows)
                elif (i, j) == rows:
                    out = change.add_product(out, X, False, slice_rows)
                else:
                    a, b, c = torch.split(out, [i - first, j - i, last - j], 1)
                    out = torch.cat([a, change.add_product(b, X, False, slice_rows), c], 1)
        return out.view(*x.shape[:-1], -1)

    def _blocks(self, source: WeightSource, rows: tuple[int, int]) -> Blocks:
        self.setting.batch.on_read(self.tensor)
        return self.setting.values.blocks(source, self.setting.variant, *rows)


class _Expert(Multiplier):
    """Reads one matrix of a stack."""

    def __init__(self, stack: DifferentiableReader, index: int) -> None:
        self.stack, self.index = stack, index
        self.name, self.shape, self.device = f"{stack.name}[{index}]", stack.shape[1:], stack.device

    def read(self) -> Tensor:
        """Read all values, including deltas."""
        return self.stack.values_of(self.stack.sources[self.index])

    def product(self, x: Tensor, transposed: bool) -> Tensor:
        """Compute ``x Wᵀ``, or ``x W`` if `transposed`."""
        return self.stack.multiply(x, self.stack.sources[self.index], transposed, (0, self.shape[0]))
