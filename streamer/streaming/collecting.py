"""Read a parameter of a model, and pass on the inputs that it multiplies.

A product with a matrix is split into a product with the base's weight, which is read a few rows at a time, and one with each delta's
factors. Any other operation uses the values with deltas added.

Collect the inputs of matrices while a model runs, and pass on their moments when they are complete.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from streamer.errors import NumericError, UnsupportedError
from streamer.linalg.moments import Moments
from streamer.linalg.operators import LowRank
from streamer.linalg.torch_state import bfloat16_products
from streamer.plan.plan import Plan
from streamer.plan.targets import Target, TensorSlice
from streamer.storage.files import give_freed_memory_back
from streamer.streaming.installed import RowBatch
from streamer.streaming.run_time import GENERAL_AS, TASK_AS, RunTimeTensor, Taken, WeightSource
from streamer.streaming.spool import Inputs, Spool, Written
from streamer.streaming.values import LazyTensor, Multiplier, Values


class Matrix(Protocol):
    """Matrix whose inputs are collected: an adapter's target, or a matrix of the base."""

    @property
    def tensor(self) -> str:
        """Return a unique name."""


M = TypeVar("M", bound=Matrix)

Complete = Callable[[list[M], Mapping[int, Moments]], None]
"""Receives matrices that share their inputs, and the moments of these inputs by stream: means over each text's tokens. The moments may be
read only until it returns."""

Take = Callable[[Any, Tensor], None]
"""Receives inputs (t, n) of a matrix."""


@dataclass
class Collected(Generic[M]):
    """Inputs being collected, by stream and by the first matrix that has them; `whole` lists matrices that were read whole.

    Attributes
    ----------
    rounds
        For each time that inputs were passed on, the groups of matrices that share inputs from all tokens.
    instead
        Receives the inputs instead of this object.
    taken
        List of inputs for another process; if there is one, inputs are only listed there.
    """

    spool: Spool
    strict: bool
    stream: int = GENERAL_AS
    rounds: list[list[list[M]]] = field(default_factory=list)
    instead: Take | None = None
    taken: list[Taken] | None = None
    inputs: dict[str, dict[int, Inputs]] = field(default_factory=dict)
    matrices: dict[str, list[M]] = field(default_factory=dict)
    complete: set[str] = field(default_factory=set)
    whole: set[str] = field(default_factory=set)
    repeated: set[str] = field(default_factory=set)
    _first: dict[str, str] = field(default_factory=dict)
    _latest: list[tuple[Tensor, str]] = field(default_factory=list)

    def take(self, matrix: M, x: Tensor) -> None:
        """Add inputs (t, n) of a matrix, unless another matrix has just brought the same inputs."""
        if self.instead is not None:
            self.instead(matrix, x)
            return
        if len(x) == 0:  # an expert to which no token is routed
            return
        first = next((name for seen, name in self._latest if _same(seen, x)), None)
        if first is None:
            self._latest.append((x, matrix.tensor))
            self.add(Taken(matrix, matrix.tensor, x))
        else:
            self.add(Taken(matrix, first, None))

    def take_ids(self, matrix: M, ids: Tensor, size: int) -> None:
        """Add one-hot inputs of `size` possible values."""
        if self.instead is None:
            self.add(Taken(matrix, matrix.tensor, ids, size))

    def add(self, one: Taken, written: Written | None = None) -> None:
        """Add inputs, or list them for another process; `written` are inputs that are already in the spool."""
        if self.taken is not None:
            # The layer may overwrite them later.
            self.taken.append(replace(one, x=None if one.x is None else one.x.clone()))
            return
        if one.size is not None and one.x is not None:
            self._of(one.first).count(one.x, one.size)
        elif one.x is not None:
            written = Written.to(self.spool, one.x)
        if written is not None:
            self._of(one.first).add(written)
        self._join(one.matrix, one.first)

    def forget_inputs(self) -> None:
        """Forget which inputs were seen last; they serve to recognise modules that share inputs."""
        self._latest.clear()

    def hand_on(self, complete: Complete[M], tokens: Mapping[int, int], path: object) -> None:
        """Pass on the moments of all collected inputs, and drop the inputs."""
        self.rounds.append([])
        for first in list(self.inputs):
            give_freed_memory_back()  # from layers and earlier inputs
            own, matrices = self.inputs.pop(first), self.matrices.pop(first)
            if not all(math.isfinite(inputs.squares) for inputs in own.values()):
                raise NumericError(f"{path}: the inputs of {matrices[0].tensor!r} are NaN or Inf on the texts")
            if own.keys() == tokens.keys() and all(inputs.squares for inputs in own.values()):
                complete(matrices, {stream: inputs.moments(tokens[stream]) for stream, inputs in own.items()})
                self.complete.update(matrix.tensor for matrix in matrices)
                if all(inputs.rows == tokens[stream] for stream, inputs in own.items()):
                    self.rounds[-1].append(matrices)
        self.spool.clear()

    def _of(self, name: str) -> Inputs:
        return self.inputs.setdefault(name, {}).setdefault(self.stream, Inputs(self.spool))

    def _join(self, matrix: M, first: str) -> None:
        tensor = matrix.tensor
        if tensor in self.complete or self._first.setdefault(tensor, first) != first:
            if self.strict:
                raise UnsupportedError(
                    f"{tensor!r}: its module runs in several layers, or shares its inputs only in some runs, which fit does not support; "
                    "use `mitigate --method shrink`"
                )
            self.repeated.add(tensor)
        known = self.matrices.setdefault(first, [])
        if all(one.tensor != tensor for one in known):
            known.append(matrix)


def _same(one: Tensor, other: Tensor) -> bool:
    """Test whether two tensors are the same memory, unchanged; the first is still referenced, so its memory is not reused."""
    return (
        one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
        and one._version == other._version
    )  # fmt: skip


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
