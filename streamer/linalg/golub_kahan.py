"""Run the block Golub–Kahan process: grow one Krylov space of a matrix from products with it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from streamer.linalg.operators import Operator

NOISE = 4
"""Drop directions of a block below this many roundings of the norm, times the square root of the number of basis columns.

One step adds at most 0.3 roundings to a block. Later steps amplify earlier errors, which the square root accounts for (measured in
docs/benchmarks.md).
"""


def block_width(k: int, extra: int) -> int:
    """Round k plus at least `extra` columns up to a multiple of 16, because products of such widths are fast."""
    return -(-(k + extra) // 16) * 16


class RitzBasis(NamedTuple):
    """Singular value decomposition of the projected matrix, ``B = X diag(S) Yᵀ``, all float64 on the CPU.

    Attributes
    ----------
    X, S, Y
        (q, q), (p,), (p, p); S falls and is padded with zeros if q < p.
    tail
        (b, p): ``Mᵀ (Q x_l) = S_l P y_l + P₊ tail[:, l]``, so ``‖tail[:, l]‖`` is the residual of Ritz triplet l.
    """

    X: Tensor
    S: Tensor
    Y: Tensor
    tail: Tensor


class GolubKahan:
    """Process that maintains ``M P = Q B`` and ``Mᵀ Q = P Bᵀ + P₊ L Eᵀ`` with orthonormal ``[P, P₊]`` and ``Q``; each step adds a block.

    M is (m, n). P (n, p) and Q (m, q) are the bases, P₊ (n, b) is the next block, B (q, p) is block upper triangular, and Eᵀ selects
    the last block of rows (all rows after a `restart`). Hence ``MᵀM P = P T + P₊ β Eᵀ`` with ``T = BᵀB``: the block Lanczos process
    on MᵀM. Forming T from B in float64 loses only eps·‖M‖ on singular values; products with MᵀM in float32 would lose eps·‖M‖²
    (Golub & Kahan 1965; Golub & Van Loan, Matrix Computations, 10.4).

    Every block is orthogonalised against the whole basis twice, and again if it shrank, until it has no component left in the basis.
    Directions that vanish to rounding are dropped (deflation, see `NOISE`) and added to `deflated`. If a whole block vanishes, the
    bases span invariant subspaces: `exhausted` becomes true, and the Ritz values are singular values of M. Both hold up to
    `deflated`.

    Parameters
    ----------
    op
        M. Scale it first, so that the squares of its values neither overflow nor underflow.
    start
        (n, b) start block; ``start = P[:, :b'] @ start_coefficients`` until the first `restart`.

    Attributes
    ----------
    products
        Columns multiplied by M or Mᵀ so far.
    deflated
        Frobenius norm of everything dropped: its contribution to F in ``Mᵀ Q = P Bᵀ + P₊ L Eᵀ + F``.
    """

    def __init__(self, op: Operator, start: Tensor) -> None:
        m, n = op.shape
        self.op = op
        self.P = start.new_empty((n, 0))
        self.Q = start.new_empty((m, 0))
        self.B = torch.zeros((0, 0), dtype=torch.float64)
        self.L = torch.zeros((0, 0), dtype=torch.float64)
        self.steps = 0
        self.products = 0
        self.norm = 0.0
        self._last = 0
        self.deflated = 0.0
        self._eps = torch.finfo(start.dtype).eps
        self.following, self.start_coefficients, _ = self._orthonormal(start, self.P, _norm(start))
        self.deflated = 0.0  # a rank-deficient start block says nothing about M

    @property
    def exhausted(self) -> bool:
        """Test whether the space is invariant; another step would add nothing."""
        return self.following.shape[1] == 0

    def step(self) -> None:
        """Add one block, at the cost of one product with M and one with Mᵀ."""
        block = self.following
        new, R, C = self._orthonormal(self._counted(self.op.matmat(block)), self.Q, self.norm)
        self.P = torch.cat([self.P, block], 1)
        grown = torch.zeros((self.Q.shape[1] + new.shape[1], self.P.shape[1]), dtype=torch.float64)
        grown[: self.B.shape[0], : self.B.shape[1]] = self.B
        grown[: C.shape[0], self.B.shape[1] :] = C
        grown[C.shape[0] :, self.B.shape[1] :] = R
        self.B, self.Q, self._last = grown, torch.cat([self.Q, new], 1), new.shape[1]
        if self._last == 0:
            self.following, self.L = block[:, :0], torch.zeros((0, 0), dtype=torch.float64)
        else:
            self.following, self.L, _ = self._orthonormal(self._counted(self.op.rmatmat(new)), self.P, self.norm)
        self.steps += 1

    def restart(self, kept: int) -> None:
        """Shrink the bases to the `kept` leading Ritz triplets to bound memory.

        ``M (P y) = (Q x) S`` and ``Mᵀ (Q x) = (P y) S + P₊ tail`` is the same invariant with B = S and L = the tail, now over all rows.
        Only the dropped directions are lost (thick restart; Baglama & Reichel, SIAM J. Sci. Comput. 27, 2005).
        """
        ritz = self.ritz()
        kept = min(kept, *self.B.shape)
        self.P, self.Q = self.P @ ritz.Y[:, :kept].to(self.P), self.Q @ ritz.X[:, :kept].to(self.Q)
        self.B, self.L, self._last = ritz.S[:kept].diag(), ritz.tail[:, :kept], kept

    def _counted(self, image: Tensor) -> Tensor:
        self.products += image.shape[1]
        self.norm = max(self.norm, _norm(image))
        return image

    def _orthonormal(self, block: Tensor, basis: Tensor, size: float) -> tuple[Tensor, Tensor, Tensor]:
        """Factor ``block = basis @ C + new @ R`` with orthonormal `new`, of the rank of `block` beyond rounding at `size`."""
        C = torch.zeros((basis.shape[1], block.shape[1]), dtype=torch.float64)
        for _ in range(2):
            c = basis.T @ block
            block = block - basis @ c
            C += c.double().cpu()
        new, triangle = torch.linalg.qr(block)
        R = triangle.double().cpu()
        u, s, vh = torch.linalg.svd(R, full_matrices=False)
        noise = NOISE * self._eps * math.sqrt(max(1, basis.shape[1])) * size
        kept = min(int((s > noise).sum()), basis.shape[0] - basis.shape[1])
        if kept < len(s):
            self.deflated = math.hypot(self.deflated, float(torch.linalg.vector_norm(s[kept:])))
            new, R = new @ u[:, :kept].to(new), s[:kept, None] * vh[:kept]
        if kept and float(s[kept - 1]) < 0.01 * size:
            # Normalising a small direction amplifies its rounding error, and may do so more than once.
            for _ in range(3):
                c = basis.T @ new
                if _norm(c) <= 4 * self._eps * math.sqrt(kept):
                    break
                new, triangle = torch.linalg.qr(new - basis @ c)
                C += c.double().cpu() @ R
                R = triangle.double().cpu() @ R
        return new, R, C

    def ritz(self) -> RitzBasis:
        """Decompose B and compute the residual of each Ritz triplet."""
        q, p = self.B.shape
        X, S, Yt = torch.linalg.svd(self.B)
        tail = torch.zeros((self.following.shape[1], p), dtype=torch.float64)
        if self._last and self.following.shape[1]:
            tail[:, : len(S)] = self.L @ X[q - self._last :, : len(S)]
        return RitzBasis(X, torch.nn.functional.pad(S, (0, p - len(S))), Yt.T.contiguous(), tail)

    def defect_estimate(self, generator: torch.Generator, probes: int = 16) -> float:
        """Estimate how far rounding breaks the invariant: ``(‖M P − Q B‖_F² + ‖Mᵀ Q − P Bᵀ − P₊ L Eᵀ‖_F²)^½``.

        For Gaussian z, ``E‖F z‖² = ‖F‖_F²``. If F had rank one, 16 probes would give less than half of its norm once in 900 draws (χ²
        distribution). Rounding spreads F over as many directions as the basis has, so the estimate is far closer.
        """
        z = torch.randn(self.B.shape[1], probes, generator=generator, dtype=torch.float64)
        forward = self.op.matmat(self.P @ z.to(self.P)).double().cpu() - _times(self.Q, self.B @ z)
        z = torch.randn(self.B.shape[0], probes, generator=generator, dtype=torch.float64)
        expected = _times(self.P, self.B.T @ z)
        if self._last and self.following.shape[1]:
            expected += _times(self.following, self.L @ z[-self._last :])
        backward = self.op.rmatmat(self.Q @ z.to(self.Q)).double().cpu() - expected
        self.products += 2 * probes
        return float(((forward.square().sum() + backward.square().sum()) / probes).sqrt())


def _times(basis: Tensor, coefficients: Tensor) -> Tensor:
    """Compute ``basis @ coefficients`` in float64 on the CPU, a few rows at a time: a float64 copy of the basis would dominate memory."""
    return torch.cat([rows.double().cpu() @ coefficients for rows in torch.split(basis, 4096)])


def _norm(t: Tensor) -> float:
    """Bound the spectral norm from above by the Frobenius norm, which is at most √b too large for b columns."""
    return float(torch.linalg.matrix_norm(t)) if t.numel() else 0.0
