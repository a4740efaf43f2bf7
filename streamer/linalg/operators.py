"""Matrices that are multiplied, not formed: `Dense`, `LowRank`, `Sum`.

An operator of shape (m, n) offers ``matmat(X)`` for ``M @ X`` and ``rmatmat(Y)`` for ``M.T @ Y``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
    """A matrix in memory, (m, n)."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def matmat(self, X: Tensor) -> Tensor:
        """``M @ X``."""
        return (self.matrix @ _padded(X))[:, : X.shape[1]]

    def rmatmat(self, Y: Tensor) -> Tensor:
        """``M.T @ Y``."""
        return (self.matrix.T @ _padded(Y))[:, : Y.shape[1]]

    @property
    def T(self) -> Dense:
        """The transpose, a view."""
        return Dense(self.matrix.T)

    def dense(self) -> Tensor:
        """The matrix itself, not a copy."""
        return self.matrix


def _padded(X: Tensor) -> Tensor:
    """Zero columns up to a multiple of 16.

    A product with 4 to 14 columns took 3 to 6 times as long as one with 16 (4096x4096 float32, `W.T @ Y`, 2 cores).
    """
    return torch.nn.functional.pad(X, (0, -X.shape[1] % 16))


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
