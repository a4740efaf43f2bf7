"""Matrices known by their products: `Dense`, `RowBlocks`, `low_rank.LowRank` and the `Sum` of a base and a delta.

An operator of shape (m, n) offers ``matmat(X)`` for ``M @ X`` and ``rmatmat(Y)`` for ``M.T @ Y``. A `Delta`, what an adapter adds to a
weight, is `LowRank` where it has factors and `Dense` where it has none: whoever has one calls its methods, and both have the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from streamer.linalg.low_rank import LowRank
from streamer.linalg.skinny_products import skinny_product


class Operator(Protocol):
    """A real matrix that is known by its products."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""

    def matmat(self, X: Tensor) -> Tensor:
        """``M @ X``, (n, c) to (m, c)."""

    def rmatmat(self, Y: Tensor) -> Tensor:
        """``M.T @ Y``, (m, c) to (n, c)."""

    def dense(self) -> Tensor:
        """Form the matrix, (m, n)."""

    @property
    def T(self) -> Operator:
        """Transpose, sharing memory."""


@dataclass(frozen=True)
class Dense:
    """``scale · matrix``: a matrix in memory, (m, n).

    The scale, a power of two, is applied to the factor of each product and costs no copy of the matrix.
    """

    matrix: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def like(self) -> Tensor:
        """Make an empty tensor of the dtype and device of the products."""
        return self.matrix.new_empty(0)

    def matmat(self, X: Tensor) -> Tensor:
        """``M @ X``."""
        return skinny_product(self.matrix, X * self.scale)

    def rmatmat(self, Y: Tensor) -> Tensor:
        """``M.T @ Y``."""
        return skinny_product(self.matrix.T, Y * self.scale)

    @property
    def T(self) -> Dense:
        """Transpose, as a view."""
        return replace(self, matrix=self.matrix.T)

    def dense(self) -> Tensor:
        """Form the matrix, a copy only where it is scaled."""
        return self.matrix if self.scale == 1 else self.matrix * self.scale

    def scaled(self, factor: float) -> Dense:
        """``factor · M``, sharing memory."""
        return replace(self, scale=self.scale * factor)

    def pieces(self) -> Iterator[Tensor]:
        """Iterate over all values, unscaled, in pieces of any shape."""
        yield self.matrix

    def rows(self) -> Iterator[Tensor] | None:
        """Iterate over the rows in order, unscaled, a few at a time."""
        return iter(torch.split(self.matrix, 1024))

    # As a delta: the methods of `LowRank` by these names.

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> Dense:
        """Form the matrix in another dtype, on another device."""
        return Dense(self.dense().to(device, dtype))

    def precise(self) -> Dense:
        """Return the delta as it is: a copy in float64 would be the largest thing in memory."""
        return self

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """List the matrix by its name in messages."""
        return [("the delta", self.matrix)]

    def is_zero(self) -> bool:
        """Test whether all entries are zero."""
        return not self.matrix.any()

    def largest_estimate(self) -> float:
        """``max |Δ_ij|``, exactly; a copy of the matrix, as ``abs`` would make, is avoided."""
        low, high = torch.aminmax(self.matrix)
        return max(-float(low), float(high)) * abs(self.scale)

    def norm(self) -> float:
        """Compute the Frobenius norm ``‖Δ‖_F``, its squares summed in float64."""
        squares = sum(float(torch.linalg.vector_norm(rows.double())) ** 2 for rows in torch.split(self.matrix, 256))
        return float(squares**0.5) * abs(self.scale)

    def projected_norm(self, U: Tensor) -> float:
        """``‖Uᵀ Δ‖_F`` for U (m, q) with orthonormal columns, q ≥ 1."""
        return float(torch.linalg.matrix_norm((U.T.to(self.matrix) @ self.dense()).double()))

    def row_slice(self, i: int, j: int) -> Dense:
        """Select rows i to j, as a view."""
        return replace(self, matrix=self.matrix[i:j])

    def add_rows(self, values: Tensor, i: int, j: int) -> None:
        """Add rows i to j of Δ to `values` (j − i, n), in place and in its dtype."""
        values.add_(self.matrix[i:j], alpha=self.scale)

    def plus_projection(self, U: Tensor, factor: float) -> Dense:
        """``Δ + factor · U Uᵀ Δ`` for U (m, q); one matrix more than Δ, the product being added as it is formed."""
        matrix = self.dense()
        U = U.to(matrix)
        return Dense(torch.addmm(matrix, U, U.T @ matrix, alpha=factor))

    def plus_triplets(self, U: Tensor, S: Tensor, Vh: Tensor, factor: float) -> Dense:
        """``Δ + factor · U diag(S) Vh`` for U (m, q), S (q,), Vh (q, n); one matrix more than Δ."""
        matrix = self.dense()
        U, S, Vh = (t.to(matrix) for t in (U, S, Vh))
        return Dense(torch.addmm(matrix, U * S, Vh, alpha=factor))

    def removal_error(self, U: Tensor, S: Tensor, Vh: Tensor, rank: int | None) -> float:
        """Return 0: a dense delta is not projected onto a rank, so nothing is lost."""
        return 0.0

    def nearest(self, rank: int, leading: Leading) -> LowRank:
        """Find the nearest matrix of that rank, in float64, from the leading triplets as `leading` finds them."""
        return LowRank.from_triplets(*leading(self, rank), rank)

    def distance(self, other: LowRank) -> float:
        """``‖Δ − L Rᵀ‖_F`` in float64."""
        rows = zip(torch.split(self.dense(), 256), torch.split(other.L, 256), strict=True)
        parts = (torch.addmm(D.double(), L, other.R.T, alpha=-1) for D, L in rows)
        return math.sqrt(sum(float(torch.linalg.vector_norm(part)) ** 2 for part in parts))


@dataclass(frozen=True)
class RowBlocks:
    """``scale · M`` where M (m, n) is read a few rows at a time for each product, so that memory does not hold it.

    Attributes
    ----------
    stored
        Shape of the matrix that is read.
    read
        ``read(i, j)`` gives rows i to j in any floating-point dtype.
    like
        An empty tensor of the dtype and device of the products.
    transposed
        Whether M is the transpose of what is read.
    """

    stored: tuple[int, int]
    read: Callable[[int, int], Tensor]
    like: Tensor
    transposed: bool = False
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        rows, columns = self.stored
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def T(self) -> RowBlocks:
        """Transpose, reading the same rows."""
        return replace(self, transposed=not self.transposed)

    def matmat(self, X: Tensor) -> Tensor:
        """``M @ X``."""
        return self._down(X * self.scale) if self.transposed else self._across(X * self.scale)

    def rmatmat(self, Y: Tensor) -> Tensor:
        """``M.T @ Y``."""
        return self._across(Y * self.scale) if self.transposed else self._down(Y * self.scale)

    def dense(self) -> Tensor:
        """Form the matrix, (m, n)."""
        out = self.like.new_empty(self.stored)
        for i, block in self._blocks():
            torch.mul(block, self.scale, out=out[i : i + len(block)])
        return out.T if self.transposed else out

    def scaled(self, factor: float) -> RowBlocks:
        """``factor · M``."""
        return replace(self, scale=self.scale * factor)

    def pieces(self) -> Iterator[Tensor]:
        """Iterate over all values, unscaled, in pieces of any shape."""
        return (block for _, block in self._blocks())

    def rows(self) -> Iterator[Tensor] | None:
        """Iterate over the rows in order, unscaled, a few at a time; None for a transpose, whose rows would need all of it."""
        return None if self.transposed else self.pieces()

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        m, n = self.stored
        rows = min(m, max(1, BLOCK_BYTES // (n * self.like.element_size())))
        buffer = self.like.new_empty((rows, n))  # one for all: fresh ones are zeroed by the system first
        for i in range(0, m, rows):
            j = min(i + rows, m)
            yield i, buffer[: j - i].copy_(self.read(i, j))

    def _across(self, X: Tensor) -> Tensor:
        out = X.new_empty((self.stored[0], X.shape[1]))
        for i, block in self._blocks():
            out[i : i + len(block)] = skinny_product(block, X)
        return out

    def _down(self, Y: Tensor) -> Tensor:
        out = Y.new_zeros((self.stored[1], Y.shape[1]))
        for i, block in self._blocks():
            out += skinny_product(block.T, Y[i : i + len(block)])
        return out


Matrix = Dense | RowBlocks
"""A weight matrix, in memory or on disk."""

Delta = LowRank | Dense
"""Δ (m, n), what an adapter adds to a weight."""

Leading = Callable[[Dense, int], tuple[Tensor, Tensor, Tensor]]
"""Finds the leading singular triplets of a matrix, so many at least if it has them: U (m, p), S (p,), Vh (p, n), float64."""

BLOCK_BYTES = 16 << 20
"""Bytes of rows that `RowBlocks` reads at a time: still in the cache for the product after the upcast; measured in docs/benchmarks.md."""


@dataclass(frozen=True)
class Sum:
    """``W0 + Δ``, both (m, n)."""

    base: Operator
    delta: Delta

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.base.shape

    @property
    def T(self) -> Sum:
        """Transpose both terms."""
        return Sum(self.base.T, self.delta.T)

    def matmat(self, X: Tensor) -> Tensor:
        """``W0 @ X + Δ @ X``."""
        return self.base.matmat(X) + self.delta.matmat(X)

    def rmatmat(self, Y: Tensor) -> Tensor:
        """``W0.T @ Y + Δ.T @ Y``."""
        return self.base.rmatmat(Y) + self.delta.rmatmat(Y)

    def dense(self) -> Tensor:
        """Form the sum, in memory of its own."""
        out = self.base.dense().clone()
        self.delta.add_rows(out, 0, len(out))
        return out


def all_finite(t: Tensor) -> bool:
    """Test whether a tensor holds finite values only, in one pass and without a mask of its size."""
    if t.numel() == 0:
        return True
    low, high = torch.aminmax(t)  # both are NaN if any value is
    return math.isfinite(float(low)) and math.isfinite(float(high))
