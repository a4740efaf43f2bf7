"""Represent low-rank matrices by their factors, ``L @ R.T``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """``L @ R.T`` with L (m, r) and R (n, r).

    It occupies (m + n)·r values. `dense` forms the product; `add_rows` forms a few rows at a time.
    """

    L: Tensor
    R: Tensor

    @classmethod
    def from_triplets(cls, U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> LowRank:
        """Truncate ``U diag(S) Vh`` at `rank`: factors ``U √S`` and ``V √S`` with exactly `rank` columns, padded with zeros.

        Parameters
        ----------
        U, S, Vh
            (m, p), (p,), (p, n); S in falling order.
        """
        root = S[:rank].sqrt()
        pad = (0, rank - len(root))
        return cls(torch.nn.functional.pad(U[:, :rank] * root, pad), torch.nn.functional.pad(Vh[:rank].T * root, pad))

    @property
    def shape(self) -> tuple[int, int]:
        """Return (m, n)."""
        return self.L.shape[0], self.R.shape[0]

    @property
    def rank(self) -> int:
        """Return the number of columns of L and R, an upper bound on the rank."""
        return self.L.shape[1]

    @property
    def T(self) -> LowRank:
        """Transpose; the factors are shared."""
        return LowRank(self.R, self.L)

    def matmat(self, X: Tensor) -> Tensor:
        """Compute ``L @ (R.T @ X)``."""
        return self.L @ (self.R.T @ X)

    def rmatmat(self, Y: Tensor) -> Tensor:
        """Compute ``R @ (L.T @ Y)``."""
        return self.R @ (self.L.T @ Y)

    def dense(self) -> Tensor:
        """Form ``L @ R.T``, (m, n)."""
        return self.L @ self.R.T

    def __add__(self, other: LowRank) -> LowRank:
        """Add two matrices by concatenating their factors; the rank becomes ``r1 + r2``."""
        return LowRank(torch.cat([self.L, other.L], 1), torch.cat([self.R, other.R], 1))

    def scaled(self, factor: float) -> LowRank:
        """Compute ``factor · L @ R.T``."""
        return LowRank(self.L * factor, self.R)

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> LowRank:
        """Cast both factors to another dtype and device."""
        return LowRank(self.L.to(device, dtype), self.R.to(device, dtype))

    def precise(self) -> LowRank:
        """Cast both factors to float64."""
        return self.to(torch.float64)

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """List the factors under an adapter's names for them."""
        return [("lora_B", self.L), ("lora_A", self.R)]

    def is_zero(self) -> bool:
        """Test whether either factor is zero."""
        return not (self.L.any() and self.R.any())

    def largest_estimate(self) -> float:
        """Compute ``max |L| · max |R|``; the largest entry is at most r times this."""
        return float(self.L.abs().max()) * float(self.R.abs().max()) if self.rank else 0.0

    def norm(self) -> float:
        """Compute the Frobenius norm ``‖L Rᵀ‖_F`` in float64, from the triangles of two thin QRs.

        The trace formula ``tr(LᵀL RᵀR)`` would square the condition number and lose half the digits if terms cancel.
        """
        return float(torch.linalg.matrix_norm(self._core()[1]))

    def projected_norm(self, U: Tensor) -> float:
        """Compute ``‖Uᵀ L Rᵀ‖_F`` for U (m, q) with orthonormal columns."""
        return LowRank(U.T.to(self.L) @ self.L, self.R).norm()

    def row_slice(self, i: int, j: int) -> LowRank:
        """Select rows i to j; R is shared."""
        return LowRank(self.L[i:j], self.R)

    def add_rows(self, values: Tensor, i: int, j: int) -> None:
        """Add rows i to j to `values` (j − i, n), in place and in its dtype."""
        values.addmm_(self.L[i:j], self.R.T)

    def plus_projection(self, U: Tensor, factor: float) -> LowRank:
        """Compute ``(I + factor · U Uᵀ) L Rᵀ`` for U (m, q), with unchanged rank and dtype.

        U is orthonormal only to working precision: L's component along each column is scaled as measured.
        """
        U = U.to(self.L)
        return LowRank(self.L + factor * (U @ (U.T @ self.L)), self.R)

    def plus_triplets(self, U: Tensor, S: Tensor, Vh: Tensor, factor: float) -> LowRank:
        """Compute ``L Rᵀ + factor · U diag(S) Vh`` for U (m, q), S (q,), Vh (q, n): rank r + q, dtype of L."""
        U, S, Vh = (t.to(self.L) for t in (U, S, Vh))
        return self + LowRank(factor * U * S, Vh.T)

    def removal_error(self, U: Tensor, S: Tensor, Vh: Tensor, rank: int | None) -> float:
        """Compute the relative norm lost when ``L Rᵀ − U diag(S) Vh`` is truncated to `rank` (default r)."""
        return self.precise().plus_triplets(U, S, Vh, -1).truncated(rank or self.rank)[1]

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Decompose ``L Rᵀ = U diag(S) Vh`` in float64: U (m, p), S (p,), Vh (p, n), p = min(r, m, n).

        Uses thin QRs of both factors and the SVD of the small core ``R_L R_Rᵀ``; costs O((m + n)·r²).
        """
        (QL, QR), core = self._core()
        U, S, Vh = torch.linalg.svd(core, full_matrices=False)
        return QL @ U, S, Vh @ QR.T

    def truncated(self, rank: int) -> tuple[LowRank, float]:
        """Truncate to the nearest matrix of rank `rank` and measure what is lost.

        Returns
        -------
        LowRank, float
            The factors as in `from_triplets`, and ``‖M − M_rank‖_F / ‖M‖_F`` (0 for a zero matrix). By Eckart–Young no matrix of that
            rank is nearer.
        """
        U, S, Vh = self.svd()
        total = float(torch.linalg.vector_norm(S))
        dropped = float(torch.linalg.vector_norm(S[rank:])) / total if total > 0 else 0.0
        return LowRank.from_triplets(U, S, Vh, rank), dropped

    def nearest(self, rank: int, leading: object) -> LowRank:
        """Find the nearest matrix of that rank in float64, from the factors; `leading` is unused."""
        return self.precise().truncated(rank)[0]

    def distance(self, other: LowRank) -> float:
        """Compute ``‖L Rᵀ − L' R'ᵀ‖_F`` in float64."""
        return (self.precise() + other.scaled(-1)).norm()

    def _core(self) -> tuple[tuple[Tensor, Tensor], Tensor]:
        QL, RL = torch.linalg.qr(self.L.double())
        QR, RR = torch.linalg.qr(self.R.double())
        return (QL, QR), RL @ RR.T
