"""Read a parameter of a model, and pass on the inputs that it multiplies.

A product with a matrix is split into a product with the base's weight, which is read a few rows at a time, and one with each delta's
factors. Any other operation uses the values with deltas added.
"""

from __future__ import annotations

import contextlib
import itertools
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor

from streamer.linalg.low_rank import LowRank
from streamer.linalg.torch_state import bfloat16_products
from streamer.plan.plan import Plan
from streamer.plan.targets import Target, TensorSlice
from streamer.streaming.collected import Collected, M
from streamer.streaming.installed import RowBatch
from streamer.streaming.lazy import LazyTensor, Multiplier
from streamer.streaming.run_time import RunTimeTensor, WeightSource
from streamer.streaming.streams import TASK_AS
from streamer.streaming.values import Values


@dataclass
class FactorDeltas:
    """An adapter's deltas, or if `rights` are given, deltas with other right factors R' (n, r), by `Target.tensor`."""

    plan: Plan
    device: torch.device
    rights: Mapping[str, Tensor] | None = None

    def change(self, target: Target, part: TensorSlice) -> LowRank:
        """Form the change that a target makes to a slice of a weight, in float32 and oriented as the weight is stored."""
        delta = self.plan.finite_delta(target)
        assert isinstance(delta, LowRank)
        delta = delta.to(torch.float32, self.device)
        if self.rights is not None:
            delta = LowRank(delta.L, self.rights[target.tensor].to(self.device))
        delta = delta if part.rows is None else delta.row_slice(*part.rows)
        return delta.T if target.transposed else delta


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
    deltas: FactorDeltas
    batch: RowBatch
    variant: int = 1

    def changes(self, slice_: TensorSlice) -> list[tuple[TensorSlice, LowRank]]:
        """List the changes to a weight, or to one matrix of it, in the order of targets."""
        if not self.values.adapted(self.variant):
            return []
        self.values.applied.add(slice_.weight)
        pairs = self.values.plan.by_weight.get(slice_.weight, ())
        return [(part, self.deltas.change(t, part)) for t, part in pairs if slice_.index in (None, part.index)]


class CollectingReader(Multiplier, Generic[M]):
    """Reads one parameter of a model, and passes on its inputs.

    Parameters
    ----------
    head
        Whether the parameter belongs to the module that computes the logits, one block of the vocabulary at a time.
    rounded
        Whether products with the base's weight use factors rounded to bfloat16.
    """

    def __init__(
        self, collected: Collected[M], setting: Setting, tensor: RunTimeTensor, *, head: bool, rounded: bool
    ) -> None:
        self._collected = collected
        self.setting, self.tensor, self.head, self.rounded = setting, tensor, head, rounded
        self.name, self.shape, self.device = tensor.name, tensor.shape, setting.values.device

    @abstractmethod
    def matrices(self, slice_: TensorSlice, crossed: bool) -> Iterable[M]:
        """List the matrices in a slice whose inputs are multiplied with its columns, or with its rows if `crossed`."""

    @abstractmethod
    def tables(self) -> Iterable[tuple[M, int]]:
        """List the matrices that are looked up in this parameter by one-hot inputs, each with the number of possible inputs."""

    @abstractmethod
    def names(self) -> Iterable[str]:
        """Name all matrices in this parameter."""

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
        return self.values_of(self.sources[0])[i:j]

    def values_of(self, source: WeightSource) -> Tensor:
        """Read the tensor or the single matrix of a source whole, including deltas, and note that its inputs are not seen."""
        self._collected.whole.update(self.names())
        pieces = [self._piece(slice_) for slice_ in source.slices]
        values = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return values.T if source.transposed else values

    def _piece(self, slice_: TensorSlice) -> Tensor:
        values = self.setting.values.piece(slice_, self.setting.variant)
        for part, change in self.setting.changes(slice_):
            into = values if part.index is None or slice_.index is not None else values[part.index]
            into += change.dense().view(into.shape)
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
        """Look up rows and record the ids as inputs of an embedding."""
        values, variant = self.setting.values, self.setting.variant
        if not values.row_access(self.tensor):
            return None
        self.setting.batch.on_read(self.tensor)
        unique, rows, at = values.looked_up(self.tensor, variant, ids)
        for _, change in self.setting.changes(self.sources[0].slices[0]):
            rows += change.L[unique] @ change.R.T
        batch, own = self.setting.batch, ids
        if ids.shape[:2] != (batch.sequences, batch.length) and (ids.shape[:1] == (1,) or batch.length in ids.shape):
            # One look-up serves all sequences: of positions, (1, length), or of pairs of them, (length, length).
            own = ids.expand(batch.sequences, *ids.shape)
        for matrix, size in self.tables():
            self._collected.take_ids(matrix, own, size)
        return rows[at]

    def product(self, x: Tensor, transposed: bool) -> Tensor:
        """Compute ``x Wᵀ``, or ``x W`` if `transposed`."""
        return self.multiply(x, self.sources[0], transposed, self.row_range())

    def multiply(self, x: Tensor, source: WeightSource, transposed: bool, rows: tuple[int, int]) -> Tensor:
        """Compute ``x Mᵀ`` (``x M`` if `transposed`), and record the operand on a matrix's input side as its inputs.

        Parameters
        ----------
        rows
            Rows of the source's matrix that M consists of; all are used if its transpose is stored.
        """
        setting, slices, X = self.setting, source.slices, x.reshape(-1, x.shape[-1])
        shapes = [setting.values.weight_of(slice_, setting.variant).matrix for slice_ in slices]
        starts = [*itertools.accumulate((m for m, _ in shapes), initial=0)]
        self._record(X, source, transposed)
        if source.transposed:
            transposed, rows = not transposed, (0, starts[-1])
        first, last = rows
        out = self._base_product(X, source, transposed, rows, shapes[0][1])
        for at, end, slice_ in zip(starts, starts[1:], slices, strict=False):
            i, j = max(first, at), min(last, end)
            for _, change in setting.changes(slice_) if i < j else ():
                part = change.row_slice(i - at, j - at)
                if transposed:
                    out.addmm_(X[:, i - first : j - first] @ part.L, part.R.T)
                else:
                    out[:, i - first : j - first].addmm_(X @ part.R, part.L.T)
        return out.view(*x.shape[:-1], -1)

    def _record(self, X: Tensor, source: WeightSource, transposed: bool) -> None:
        # The adapted model's sources name the targets; in the base alone a head may be tied to an embedding.
        adapted, at = self.tensor.adapted[self.sources.index(source)], 0
        crossed = transposed != adapted.transposed
        for slice_ in adapted.slices:
            size = self.setting.values.weight_of(slice_, TASK_AS).matrix[0]
            for matrix in self.matrices(slice_, crossed):
                self._collected.take(matrix, X[:, at : at + size] if crossed else X)
            at += size

    def _base_product(
        self, X: Tensor, source: WeightSource, transposed: bool, rows: tuple[int, int], columns: int
    ) -> Tensor:
        """Compute ``X Mᵀ`` (t, m) for X (t, n), or if `transposed` ``X M`` (t, n) for X (t, m), without deltas."""
        m, out = rows[1] - rows[0], None
        self.setting.batch.on_read(self.tensor)
        with bfloat16_products() if self.rounded else contextlib.nullcontext():
            for i, j, values in self.setting.values.blocks(source, self.setting.variant, *rows):
                if transposed:
                    out = X[:, i:j] @ values if out is None else out.addmm_(X[:, i:j], values)
                elif j - i == m:
                    out = X @ values.T
                else:
                    out = X.new_empty((len(X), m)) if out is None else out
                    out[:, i:j] = X @ values.T
        return X.new_zeros((len(X), columns if transposed else m)) if out is None else out


class _Expert(Multiplier):
    """Reads one matrix of a stack."""

    def __init__(self, stack: CollectingReader[M], index: int) -> None:
        self.stack, self.index = stack, index
        self.name, self.shape, self.device = f"{stack.name}[{index}]", stack.shape[1:], stack.device

    def read(self) -> Tensor:
        """Read all values, including deltas."""
        return self.stack.values_of(self.stack.sources[self.index])

    def product(self, x: Tensor, transposed: bool) -> Tensor:
        """Compute ``x Wᵀ``, or ``x W`` if `transposed`."""
        return self.stack.multiply(x, self.stack.sources[self.index], transposed, (0, self.shape[0]))
