"""Compute with the matrix added to a weight, in float64: a product of factors, DoRA's delta, or a fine-tuned model's difference."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from streamer.verification.result import NotRecomputed
from streamer.verification.spectrum import DENSE_SIDE, ILL_DEFINED
from streamer.verification.tensors import Array, Matrix


class WitnessDelta(Protocol):
    """Matrix Δ (m, n) that is added to W0, available by rows or as a whole."""

    def rows(self, i: int, j: int, W0: Array) -> tuple[Array, Array]:
        """Compute rows i to j of Δ, and a bound on the size of each value's summands; W0 are the base's rows."""

    def left_product(self, U: Array, W0: Matrix) -> Array:
        """Compute ``Uᵀ Δ``, (q, n)."""

    def norm(self, W0: Matrix) -> float:
        """Compute ‖Δ‖_F."""

    def operator(self, W0: Matrix) -> Any:
        """Return ``W0 + Δ`` as scipy's `LinearOperator`; holds W0 in float64."""

    def combined(self, factor: float, left: Array, right: Array, W0: Matrix) -> LowRankDelta:
        """Return ``factor · Δ + left · right`` as factors; left (m, q), right (q, n).

        Raises
        ------
        NotRecomputed
            If this needs the full SVD of a matrix whose short side is over `DENSE_SIDE`.
        """

    def dropped_without(self, U: Array, S: Array, Vh: Array, rank: int) -> float:
        """Compute the relative norm lost by truncating ``Δ − U diag(S) Vh`` to a rank; 0 if Δ has no factors.

        Raises
        ------
        NotRecomputed
            If a tie leaves the truncated matrix undefined.
        """


class Truncated(NamedTuple):
    """Nearest matrix of rank r; the norm lost, relative to the whole; how far the nearest matrix moves if the whole moves by 1."""

    low_rank: LowRankDelta
    dropped: float
    sensitivity: float


@dataclass(frozen=True)
class LowRankDelta:
    """``Δ = L Rᵀ`` with L (m, r) and R (n, r)."""

    L: Array
    R: Array

    def rows(self, i: int, j: int, W0: Array) -> tuple[Array, Array]:
        """See `WitnessDelta`."""
        L = self.L[i:j]
        return L @ self.R.T, np.linalg.norm(L, axis=1)[:, None] * self._lengths

    @cached_property
    def _lengths(self) -> Array:
        lengths: Array = np.linalg.norm(self.R, axis=1)
        return lengths

    def left_product(self, U: Array, W0: Matrix) -> Array:
        """See `WitnessDelta`."""
        return (U.T @ self.L) @ self.R.T

    def norm(self, W0: Matrix | None = None) -> float:
        """See `WitnessDelta`."""
        return float(np.linalg.norm(np.linalg.qr(self.L)[1] @ np.linalg.qr(self.R)[1].T))

    def operator(self, W0: Matrix) -> Any:
        """See `WitnessDelta`."""
        from scipy.sparse.linalg import aslinearoperator

        base, L, R = map(aslinearoperator, (W0.whole(), self.L, self.R.T))
        return base + L @ R

    def combined(self, factor: float, left: Array, right: Array, W0: Matrix | None = None) -> LowRankDelta:
        """See `WitnessDelta`."""
        return LowRankDelta(np.hstack([factor * self.L, left]), np.hstack([self.R, right.T]))

    def dropped_without(self, U: Array, S: Array, Vh: Array, rank: int) -> float:
        """See `WitnessDelta`."""
        return self.combined(1.0, -U * S, Vh).truncated(rank).dropped

    def truncated(self, rank: int) -> Truncated:
        """Truncate to a rank by QR of both factors and SVD of the small core.

        Raises
        ------
        NotRecomputed
            If the smallest singular value kept is about as large as the first one dropped.
        """
        if self.L.shape[1] <= rank:
            return Truncated(self, 0.0, 1.0)
        Q, left = np.linalg.qr(self.L)
        P, right = np.linalg.qr(self.R)
        U, S, Vh = np.linalg.svd(left @ right.T)
        rest = S[rank:] if len(S) > rank else np.zeros(1)
        gap, size = S[rank - 1] - rest[0] if len(S) > rank else S[-1], float(np.linalg.norm(S))
        if size and rest[0] > 1e-12 * S[0] and gap < ILL_DEFINED * 1e-3 * S[0]:
            raise NotRecomputed("its delta has no single nearest matrix of the adapter's rank")
        kept = LowRankDelta((Q @ U)[:, :rank] * S[:rank], P @ Vh[:rank].T)
        sensitivity = 1.0 if rest[0] <= 1e-12 * S[0] else 1 + S[rank - 1] / gap
        return Truncated(kept, float(np.linalg.norm(rest)) / size if size else 0.0, float(sensitivity))


class _DenseDelta(ABC):
    """Computes with a delta that depends on W0, from its rows."""

    @abstractmethod
    def rows(self, i: int, j: int, W0: Array) -> tuple[Array, Array]:
        """See `WitnessDelta`."""

    def left_product(self, U: Array, W0: Matrix) -> Array:
        return sum((U[i:j].T @ self.rows(i, j, W0.rows(i, j))[0] for i, j in W0.blocks()), np.zeros(()))

    def norm(self, W0: Matrix) -> float:
        squares = (float(np.sum(self.rows(i, j, W0.rows(i, j))[0] ** 2)) for i, j in W0.blocks())
        return float(np.sqrt(sum(squares)))

    def operator(self, W0: Matrix) -> Any:
        from scipy.sparse.linalg import aslinearoperator

        W = np.empty(W0.shape)
        for i, j in W0.blocks():
            rows = W0.rows(i, j)
            W[i:j] = rows + self.rows(i, j, rows)[0]
        return aslinearoperator(W)

    def combined(self, factor: float, left: Array, right: Array, W0: Matrix) -> LowRankDelta:
        from scipy.linalg import svd

        if min(W0.shape) > DENSE_SIDE:
            raise NotRecomputed(f"its delta is not a product of factors, and its short side is over {DENSE_SIDE}")
        blocks = [factor * self.rows(i, j, W0.rows(i, j))[0] + left[i:j] @ right for i, j in W0.blocks()]
        U, S, Vh = svd(np.concatenate(blocks), full_matrices=False)
        return LowRankDelta(U * S, Vh.T)

    def dropped_without(self, U: Array, S: Array, Vh: Array, rank: int) -> float:
        return 0.0


@dataclass(frozen=True)
class DoraDelta(_DenseDelta):
    """``Δ = m·(W0 + L Rᵀ)/‖W0 + L Rᵀ‖ − W0`` with m (out,)."""

    low_rank: LowRankDelta
    magnitude: Array

    def rows(self, i: int, j: int, W0: Array) -> tuple[Array, Array]:
        """See `WitnessDelta`."""
        change, bound = self.low_rank.rows(i, j, W0)
        total = W0 + change
        factor = (self.magnitude[i:j] / np.linalg.norm(total, axis=1))[:, None]
        return factor * total - W0, np.abs(W0) + np.abs(factor) * (np.abs(W0) + bound)


@dataclass(frozen=True)
class TunedDelta(_DenseDelta):
    """``Δ = W1 − W0`` of a fine-tuned model."""

    tuned: Matrix

    def rows(self, i: int, j: int, W0: Array) -> tuple[Array, Array]:
        """See `WitnessDelta`."""
        values = self.tuned.rows(i, j)
        return values - W0, np.abs(values) + np.abs(W0)
