"""Read parameters under the variant of the group that runs; the inputs of watched matrices are sites."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamer.linalg.operators import LowRank, linear
from streamer.streaming.lazy import LazyTensor, Reader
from streamer.streaming.run_time import RunTimeTensor, WeightSource
from streamer.streaming.sites import Site, Watch
from streamer.streaming.turn import Turn
from streamer.streaming.values import Changes, Values


@dataclass(eq=False)
class ParameterReader(Reader):
    """Reads one parameter.

    A product with a matrix is split into one with the base's weight, which is read a few rows at a time, and one with each delta's
    factors. Any other operation uses the values with deltas added.

    Attributes
    ----------
    turn
        Says which group runs.
    position
        Number of the parameter in the model.
    head
        Whether the parameter belongs to the module that computes the logits, one block of the vocabulary at a time.
    rounded
        Whether the base's weight, and the inputs and results of its products, are rounded to bfloat16.
    """

    turn: Turn
    values: Values
    tensor: RunTimeTensor
    position: int
    head: bool
    rounded: bool

    def __post_init__(self) -> None:
        self.name = self.tensor.name
        self.shape = self.tensor.shape
        self.device = self.values.device

    @property
    def variant(self) -> int:
        """Return the number of the variant that runs."""
        return self.turn.group.variant

    @property
    def sources(self) -> tuple[WeightSource, ...]:
        """Return the parameter's sources under the variant that runs."""
        return self.values.sources(self.tensor, self.variant)

    @property
    def rows(self) -> tuple[int, int]:
        """Return the range of rows in use: all, or for the head the current block of the vocabulary."""
        return (self.turn.rows if self.head else None) or (0, self.shape[0])

    def note_whole(self) -> None:
        """Note that the parameter is used as a whole, where no site can be."""
        if self.turn.fitted is not None:
            self.values.otherwise_used.update(self.turn.fitted.names(self.tensor))

    def read(self) -> Tensor:
        """Read all values, including deltas."""
        self.turn.stop()
        self.note_whole()
        i, j = self.rows
        source = self.sources[0]
        if self.values.row_access(self.tensor) and not self.values.changes(
            source.slices[0], self.variant
        ):
            blocks = [rows for *_, rows in self.values.blocks(source, self.variant, i, j)]
            return torch.cat(blocks).view(j - i, *self.shape[1:])
        return self.values.whole(self.tensor, self.variant)[i:j]

    def matrix(self, index: int) -> Tensor | None:
        """Return a stand-in for one expert's matrix. The whole stack then counts as used, since the text decides which experts run."""
        if not self.tensor.stacked:
            return None
        if self.values.adapted(self.variant):
            self.values.applied |= self.tensor.weights
            self.values.read |= self.tensor.weights
        return LazyTensor.of(ExpertReader(self, index))

    def gather(self, ids: Tensor) -> Tensor | None:
        """Look up rows; a look-up is the site of one-hot inputs."""
        if not self.values.row_access(self.tensor):
            return None
        self.turn.stop()
        if self.turn.fitted is not None:
            all_ids = _of_all_sequences(ids, *self.turn.group.ids.shape).flatten()
            for matrix, size in self.turn.fitted.tables(self.tensor):
                self.turn.pause(Site((True, 0, self.position), (matrix,), all_ids, size))
        changes = [
            change for _, change in self.values.changes(self.sources[0].slices[0], self.variant)
        ]
        products = [change for change in changes if isinstance(change, LowRank)]
        if len(products) < len(changes):
            return self.values.whole(self.tensor, self.variant)[ids]
        unique, rows, at = self.values.looked_up(self.tensor, self.variant, ids)
        for change in products:
            rows += change.L[unique] @ change.R.T
        return rows[at]

    def product(self, x: Tensor, transposed: bool) -> Tensor:
        """Compute ``x Wᵀ``, or ``x W`` if `transposed`."""
        return self.multiply(x, None, transposed, self.rows)

    def multiply(
        self, x: Tensor, index: int | None, transposed: bool, rows: tuple[int, int]
    ) -> Tensor:
        """Compute ``x Mᵀ`` (``x M`` if `transposed`); the operand on a watched matrix's input side is a site.

        Parameters
        ----------
        index
            Number of the matrix in a stack; None for a tensor that is a matrix.
        rows
            Rows of the source's matrix that M consists of; all are used if its transpose is stored.
        """
        source = self.sources[index or 0]
        X = x.reshape(-1, x.shape[-1])
        if self.turn.fitted is not None:
            self._reach(self.turn.fitted, X, index, transposed)
        self.turn.stop()
        changes = [self.values.changes(slice_, self.variant) for slice_ in source.slices]
        if all(isinstance(change, LowRank) for _, change in itertools.chain(*changes)):
            out = self._split_product(X, source, changes, transposed, rows)
        else:
            whole = self.values.cache.get(
                (self.name, index, self.variant), lambda: self.values.matrix(source, self.variant)
            )
            W = whole[slice(*rows)]
            out = X @ (W if transposed else W.T)
        return out.view(*x.shape[:-1], -1)

    def _reach(self, watch: Watch, X: Tensor, index: int | None, transposed: bool) -> None:
        """Pause at the sites of a product's operand."""
        # The adapted model's sources name the targets; in the base alone a head may be tied to an embedding.
        adapted = self.tensor.adapted[index or 0]
        crossed = transposed != adapted.transposed
        order = index is None, index or 0, self.position
        matrices = [tuple(watch.matrices(self.tensor, s, crossed)) for s in adapted.slices]
        if not crossed:
            if any(matrices):
                self.turn.pause(Site(order, tuple(itertools.chain(*matrices)), X))
            return
        at = 0
        for slice_, matrices_of_slice in zip(adapted.slices, matrices, strict=True):
            size = self.values.weight_of(slice_, self.variant).matrix[0]
            if matrices_of_slice:
                self.turn.pause(Site(order, matrices_of_slice, X[:, at : at + size]))
            at += size

    def _split_product(
        self,
        X: Tensor,
        source: WeightSource,
        changes: Sequence[Changes],
        transposed: bool,
        rows: tuple[int, int],
    ) -> Tensor:
        """Compute ``X Mᵀ``, or ``X M`` if `transposed`, with the base's weight and with each delta's factors."""
        shapes = [self.values.weight_of(s, self.variant).matrix for s in source.slices]
        starts = [*itertools.accumulate((m for m, _ in shapes), initial=0)]
        if source.transposed:
            transposed = not transposed
            rows = 0, starts[-1]
        first, last = rows
        out = self._base_product(X, source, transposed, rows, shapes[0][1])
        for slice_changes, (at, end) in zip(changes, itertools.pairwise(starts), strict=True):
            i = max(first, at)
            j = min(last, end)
            for _, change in slice_changes if i < j else ():
                part = change.row_slice(i - at, j - at)
                assert isinstance(part, LowRank)
                columns = slice(i - first, j - first)
                if transposed:
                    out.addmm_(X[:, columns] @ part.L, part.R.T)
                else:
                    out[:, columns].addmm_(X @ part.R, part.L.T)
        return out

    def _base_product(
        self, X: Tensor, source: WeightSource, transposed: bool, rows: tuple[int, int], columns: int
    ) -> Tensor:
        """Compute ``X Mᵀ`` (t, m) for X (t, n), or if `transposed` ``X M`` (t, n) for X (t, m), without deltas."""
        m = rows[1] - rows[0]
        dtype = torch.bfloat16 if self.rounded else torch.float32
        x = X.to(dtype)
        out = None
        for i, j, values in self.values.blocks(source, self.variant, *rows, dtype):
            if transposed:
                part = x[:, i:j] @ values
                out = part.float() if out is None else out.add_(part)
            elif j - i == m:
                out = linear(x, values).float()
            else:
                if out is None:
                    out = X.new_empty((len(X), m))
                out[:, i:j] = linear(x, values)
        return X.new_zeros((len(X), columns if transposed else m)) if out is None else out


def _of_all_sequences(ids: Tensor, count: int, length: int) -> Tensor:
    """Repeat looked-up ids for each sequence if one look-up serves all: of positions, (1, length), or of pairs, (length, length)."""
    shared = ids.shape[:1] == (1,) or length in ids.shape
    return ids.expand(count, *ids.shape) if shared and ids.shape[:2] != (count, length) else ids


@dataclass(eq=False)
class ExpertReader(Reader):
    """Reads one matrix of a stack."""

    stack: ParameterReader
    index: int

    def __post_init__(self) -> None:
        self.name = f"{self.stack.name}[{self.index}]"
        self.shape = self.stack.shape[1:]
        self.device = self.stack.device

    def read(self) -> Tensor:
        """Read all values, including deltas."""
        self.stack.note_whole()
        return self.stack.values.matrix(self.stack.sources[self.index], self.stack.variant)

    def product(self, x: Tensor, transposed: bool) -> Tensor:
        """Compute ``x Wᵀ``, or ``x W`` if `transposed`."""
        return self.stack.multiply(x, self.index, transposed, (0, self.shape[0]))
