"""Matrices that are multiplied, not formed: `Dense`, `RowBlocks`, `LowRank`, `Sum`.

An operator of shape (m, n) offers ``matmat(X)`` for ``M @ X`` and ``rmatmat(Y)`` for ``M.T @ Y``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


class Operator(Protocol):
    """A real matrix known by its products."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""

    def matmat(self, X: Tensor) -> Tensor:
        """``M @ X``, (n, c) to (m, c)."""

    def rmatmat(self, Y: Tensor) -> Tensor:
        """``M.T @ Y``, (m, c) to (n, c)."""

    def dense(self) -> Tensor:
        """The matrix itself, (m, n)."""

    @property
    def T(self) -> Operator:
        """The transpose, sharing memory."""


@dataclass(frozen=True)
class Dense:
    """``scale · matrix``, a matrix in memory, (m, n).

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
        """A tensor, empty, of the dtype and device of the products."""
        return self.matrix.new_empty(0)

    def matmat(self, X: Tensor) -> Tensor:
        """``M @ X``."""
        return skinny_product(self.matrix, X * self.scale)

    def rmatmat(self, Y: Tensor) -> Tensor:
        """``M.T @ Y``."""
        return skinny_product(self.matrix.T, Y * self.scale)

    @property
    def T(self) -> Dense:
        """The transpose, a view."""
        return replace(self, matrix=self.matrix.T)

    def dense(self) -> Tensor:
        """The matrix itself, a copy only where it is scaled."""
        return self.matrix if self.scale == 1 else self.matrix * self.scale

    def scaled(self, factor: float) -> Dense:
        """``factor · M``, sharing memory."""
        return replace(self, scale=self.scale * factor)

    def pieces(self) -> Iterator[Tensor]:
        """All values, unscaled, in pieces of any shape."""
        yield self.matrix

    def rows(self) -> Iterator[Tensor] | None:
        """Rows in order, unscaled, a few at a time."""
        return iter(torch.split(self.matrix, 1024))


@dataclass(frozen=True)
class RowBlocks:
    """``scale · M`` where M (m, n) is read a few rows at a time for each product, and is never in memory whole.

    Attributes
    ----------
    stored
        Shape of what is read.
    read
        ``read(i, j)`` gives rows i to j in any floating-point dtype.
    like
        A tensor, empty, of the dtype and device of the products.
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
        """The transpose."""
        return replace(self, transposed=not self.transposed)

    def matmat(self, X: Tensor) -> Tensor:
        """``M @ X``."""
        return self._down(X * self.scale) if self.transposed else self._across(X * self.scale)

    def rmatmat(self, Y: Tensor) -> Tensor:
        """``M.T @ Y``."""
        return self._across(Y * self.scale) if self.transposed else self._down(Y * self.scale)

    def dense(self) -> Tensor:
        """The matrix itself, formed, (m, n)."""
        out = self.like.new_empty(self.stored)
        for i, block in self._blocks():
            torch.mul(block, self.scale, out=out[i : i + len(block)])
        return out.T if self.transposed else out

    def scaled(self, factor: float) -> RowBlocks:
        """``factor · M``."""
        return replace(self, scale=self.scale * factor)

    def pieces(self) -> Iterator[Tensor]:
        """All values, unscaled, in pieces of any shape."""
        return (block for _, block in self._blocks())

    def rows(self) -> Iterator[Tensor] | None:
        """Rows in order, unscaled, a few at a time; None for a transpose, whose rows cannot be had without all of it."""
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

BLOCK_BYTES = 16 << 20
"""What `RowBlocks` reads at a time, so that the block is still in the cache for the product after its upcast.

Milliseconds of `M @ X` and `M.T @ Y` with 16 columns from bf16, 2 threads, by blocks of 4, 8, 16, 32 and 64 MB: 14336x4096 24+61, 20+36,
19+29, 28+32, 35+42; 4096x14336 41+66, 30+60, 26+61, 28+42, 36+44; 8192x28672 239+289, 195+291, 126+241, 131+255, 141+177. From a float32
copy they are 20+24, 27+28 and 81+119.
"""

PIECES = 8
"""Pieces that a product is cut into.

One product of a 14336x4096 or 4096x14336 float32 matrix with 16 columns took 26 and 22 to 25 ms whole, and 20 in 8 pieces (2 threads,
AMD EPYC, MKL); on an Intel Xeon 15 to 17 either way.
"""


def skinny_product(M: Tensor, X: Tensor) -> Tensor:
    """``M @ X`` for M (m, n), row-major or a transpose, and X (n, c) of few columns.

    X gets zero columns up to a multiple of 16: a product with 4 to 14 columns took 3 to 6 times as long as one with 16 (4096x4096
    float32, `W.T @ Y`, 2 cores). On the CPU a transpose is multiplied from the left (8192x28672 with 16 columns, 2 threads, Xeon:
    80 ms, and 185 ms from the right), and long matrices in `PIECES`.
    """
    c = X.shape[1]
    X = torch.nn.functional.pad(X, (0, -c % 16))
    rows = len(M) // PIECES
    if M.device.type != "cpu":
        return (M @ X)[:, :c]
    if not M.is_contiguous():
        return (X.T @ M.T).T[:, :c]
    if rows < 128:
        return (M @ X)[:, :c]
    pieces, rest = M[: PIECES * rows].view(PIECES, rows, M.shape[1]), M[PIECES * rows :]
    out = torch.bmm(pieces, X.expand(PIECES, *X.shape)).view(PIECES * rows, -1)
    return (torch.cat([out, rest @ X]) if len(rest) else out)[:, :c]


@dataclass(frozen=True)
class LowRank:
    """``L @ R.T`` with L (m, r) and R (n, r).

    Memory is (m + n)·r values; the product is formed only by `dense` and, a few rows at a time, by `rows`.
    """

    L: Tensor
    R: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.L.shape[0], self.R.shape[0]

    @property
    def rank(self) -> int:
        """Columns of L and R: the rank, at most."""
        return self.L.shape[1]

    @property
    def T(self) -> LowRank:
        """The transpose, sharing the factors."""
        return LowRank(self.R, self.L)

    def matmat(self, X: Tensor) -> Tensor:
        """``L @ (R.T @ X)``."""
        return self.L @ (self.R.T @ X)

    def rmatmat(self, Y: Tensor) -> Tensor:
        """``R @ (L.T @ Y)``."""
        return self.R @ (self.L.T @ Y)

    def dense(self) -> Tensor:
        """``L @ R.T``, (m, n)."""
        return self.L @ self.R.T

    def __add__(self, other: LowRank) -> LowRank:
        """The sum, of rank ``r1 + r2``, by setting the factors side by side."""
        return LowRank(torch.cat([self.L, other.L], 1), torch.cat([self.R, other.R], 1))

    def scaled(self, factor: float) -> LowRank:
        """``factor · L @ R.T``."""
        return LowRank(self.L * factor, self.R)

    def to(self, dtype: torch.dtype) -> LowRank:
        """Both factors in another dtype."""
        return LowRank(self.L.to(dtype), self.R.to(dtype))

    def norm(self) -> float:
        """Frobenius norm ``‖L Rᵀ‖_F``, from the triangles of two thin QRs in float64.

        The trace formula ``tr(LᵀL RᵀR)`` would square the condition: where terms cancel it loses half the digits.
        """
        return float(torch.linalg.matrix_norm(self._core()[1]))

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """``U diag(S) Vh = L Rᵀ`` in float64: U (m, p), S (p,), Vh (p, n), p = min(r, m, n).

        Thin QR of both factors, then the SVD of the small core ``R_L R_Rᵀ``; cost O((m + n)·r²).
        """
        (QL, QR), core = self._core()
        U, S, Vh = torch.linalg.svd(core, full_matrices=False)
        return QL @ U, S, Vh @ QR.T

    def truncated(self, rank: int) -> tuple[LowRank, float]:
        """The nearest matrix of rank `rank`, and the relative Frobenius norm of what is dropped.

        Returns
        -------
        LowRank, float
            Factors ``U √S`` and ``V √S`` with exactly `rank` columns, zero-padded if the matrix has fewer; and
            ``‖M − M_rank‖_F / ‖M‖_F`` (0 for a zero matrix). Eckart–Young: no matrix of that rank is nearer.
        """
        U, S, Vh = self.svd()
        keep = min(rank, len(S))
        total = float(torch.linalg.vector_norm(S))
        dropped = float(torch.linalg.vector_norm(S[keep:])) / total if total > 0 else 0.0
        root = S[:keep].sqrt()
        pad = (0, rank - keep)
        L = torch.nn.functional.pad(U[:, :keep] * root, pad)
        R = torch.nn.functional.pad(Vh[:keep].T * root, pad)
        return LowRank(L, R), dropped

    def _core(self) -> tuple[tuple[Tensor, Tensor], Tensor]:
        QL, RL = torch.linalg.qr(self.L.double())
        QR, RR = torch.linalg.qr(self.R.double())
        return (QL, QR), RL @ RR.T


@dataclass(frozen=True)
class Sum:
    """``M_1 + M_2 + …``, all of one shape."""

    terms: Sequence[Operator]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.terms[0].shape

    @property
    def T(self) -> Sum:
        """The transpose."""
        return Sum([term.T for term in self.terms])

    def matmat(self, X: Tensor) -> Tensor:
        """``Σ M_i @ X``."""
        return _add(t.matmat(X) for t in self.terms)

    def rmatmat(self, Y: Tensor) -> Tensor:
        """``Σ M_i.T @ Y``."""
        return _add(t.rmatmat(Y) for t in self.terms)

    def dense(self) -> Tensor:
        """The sum, formed; one matrix more than the terms."""
        out = self.terms[0].dense().clone()
        for term in self.terms[1:]:
            if isinstance(term, LowRank):
                out.addmm_(term.L, term.R.T)
            else:
                out += term.dense()
        return out


def _add(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)


def all_finite(t: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf, in one pass and without a mask of its size."""
    if t.numel() == 0:
        return True
    low, high = torch.aminmax(t)  # both are NaN if any value is
    return math.isfinite(float(low)) and math.isfinite(float(high))
