"""Run the block Golub–Kahan process: one growing Krylov space of a matrix, known by its products."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from streamer.linalg.operators import Operator

NOISE = 4
"""Directions of a block are dropped below this many roundings of the norm, times the square root of the basis' columns.

One step puts at most 0.3 of them into a block; those of the steps before are amplified, which the square root allows for (measured in
docs/benchmarks.md).
"""


def block_width(k: int, extra: int) -> int:
    """Round k wanted and at least `extra` further columns up to a multiple of 16, for which products are fast."""
    return -(-(k + extra) // 16) * 16


class RitzBasis(NamedTuple):
    """The singular value decomposition of the projected matrix: ``B = X diag(S) Yᵀ``, all float64 on the CPU.

    Attributes
    ----------
    X, S, Y
        (q, q), (p,), (p, p); S in falling order, padded with zeros where q < p.
    tail
        (b, p): ``Mᵀ (Q x_l) = S_l P y_l + P₊ tail[:, l]``, so that ``‖tail[:, l]‖`` is the residual of Ritz triplet l.
    """

    X: Tensor
    S: Tensor
    Y: Tensor
    tail: Tensor


class GolubKahan:
    """``M P = Q B`` and ``Mᵀ Q = P Bᵀ + P₊ L Eᵀ``, with orthonormal ``[P, P₊]`` and ``Q``, growing by a block a step.

    M is (m, n); P (n, p) and Q (m, q) are the bases, P₊ (n, b) the next block, B (q, p) upper triangular by blocks, and Eᵀ picks
    the last block of rows (after a `restart` all of them). Hence ``MᵀM P = P T + P₊ β Eᵀ`` with ``T = BᵀB``, the block Lanczos
    process on MᵀM. It is carried in this form because T formed from B in float64 loses eps·‖M‖ on singular values, where products
    with MᵀM in float32 would lose eps·‖M‖² (Golub & Kahan 1965; Golub & Van Loan, Matrix Computations, 10.4).

    Every block is orthogonalised against the whole basis twice, and again where it has shrunk, until nothing of the basis is left
    in it; directions in which a block vanishes to rounding are dropped (deflation, see `NOISE`), and count as `deflated`. A block
    that vanishes whole means that the bases span invariant subspaces: `exhausted` is then true, and the Ritz values are singular
    values of M, both to `deflated`.

    Parameters
    ----------
    op
        M. Its values must be of a size whose squares neither overflow nor vanish: scale it first.
    start
        (n, b) start block; ``start = P[:, :b'] @ start_coefficients`` until the first `restart`.

    Attributes
    ----------
    products
        Columns multiplied by M or Mᵀ so far.
    deflated
        Frobenius norm of all that was dropped: its share in the F of ``Mᵀ Q = P Bᵀ + P₊ L Eᵀ + F``.
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
        self.deflated = 0.0  # what the start block lacked is no part of M

    @property
    def exhausted(self) -> bool:
        """Test whether the space is invariant, so that a step would add nothing."""
        return self.following.shape[1] == 0

    def step(self) -> None:
        """Grow by one block: one product with M and one with Mᵀ."""
        block = self.following
        image = self._counted(self.op.matmat(block))
        new, R, C = self._orthonormal(image, self.Q, self.norm)
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

    def restart(self, keep: int) -> None:
        """Shrink the bases to the `keep` leading Ritz triplets, so that memory stays bounded.

        ``M (P y) = (Q x) S`` and ``Mᵀ (Q x) = (P y) S + P₊ tail`` is the invariant again, with B = S and L = the tail, over all rows
        now: nothing is lost but the directions dropped (thick restart; Baglama & Reichel, SIAM J. Sci. Comput. 27, 2005).
        """
        ritz = self.ritz()
        keep = min(keep, *self.B.shape)
        self.P, self.Q = self.P @ ritz.Y[:, :keep].to(self.P), self.Q @ ritz.X[:, :keep].to(self.Q)
        self.B, self.L, self._last = ritz.S[:keep].diag(), ritz.tail[:, :keep], keep

    def _counted(self, image: Tensor) -> Tensor:
        self.products += image.shape[1]
        self.norm = max(self.norm, _norm(image))
        return image

    def _orthonormal(self, block: Tensor, basis: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """``block = basis @ C + new @ R`` with orthonormal `new`, of the rank that `block` has beyond rounding at `scale`."""
        C = torch.zeros((basis.shape[1], block.shape[1]), dtype=torch.float64)
        for _ in range(2):
            c = basis.T @ block
            block = block - basis @ c
            C += c.double().cpu()
        new, triangle = torch.linalg.qr(block)
        R = triangle.double().cpu()
        u, s, vh = torch.linalg.svd(R, full_matrices=False)
        noise = NOISE * self._eps * math.sqrt(max(1, basis.shape[1])) * scale
        keep = min(int((s > noise).sum()), basis.shape[0] - basis.shape[1])
        if keep < len(s):
            self.deflated = math.hypot(self.deflated, float(torch.linalg.vector_norm(s[keep:])))
            new, R = new @ u[:, :keep].to(new), s[:keep, None] * vh[:keep]
        if keep and float(s[keep - 1]) < 0.01 * scale:
            # Normalising a direction that had shrunk has blown its rounding up with it, and may do so again.
            for _ in range(3):
                c = basis.T @ new
                if _norm(c) <= 4 * self._eps * math.sqrt(keep):
                    break
                new, triangle = torch.linalg.qr(new - basis @ c)
                C += c.double().cpu() @ R
                R = triangle.double().cpu() @ R
        return new, R, C

    def ritz(self) -> RitzBasis:
        """Decompose B, and compute the residual of each Ritz triplet."""
        q, p = self.B.shape
        X, S, Yt = torch.linalg.svd(self.B)
        tail = torch.zeros((self.following.shape[1], p), dtype=torch.float64)
        if self._last and self.following.shape[1]:
            tail[:, : len(S)] = self.L @ X[q - self._last :, : len(S)]
        return RitzBasis(X, torch.nn.functional.pad(S, (0, p - len(S))), Yt.T.contiguous(), tail)

    def defect_estimate(self, generator: torch.Generator, probes: int = 16) -> float:
        """Estimate ``(‖M P − Q B‖_F² + ‖Mᵀ Q − P Bᵀ − P₊ L Eᵀ‖_F²)^½``: by how much rounding breaks the invariant.

        For Gaussian z, ``E‖F z‖² = ‖F‖_F²``. Were F of rank one, 16 probes would give less than half of its norm once in 900 draws,
        by the χ² distribution; rounding spreads F over as many directions as the basis has, and the estimate is far closer.
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
    """``basis @ coefficients`` in float64 on the CPU, a few rows at a time: a basis in float64 would be the largest thing in memory."""
    return torch.cat([rows.double().cpu() @ coefficients for rows in torch.split(basis, 4096)])


def _norm(t: Tensor) -> float:
    """Bound the spectral norm from above, cheaply: by Frobenius over a skinny block, at most √b too large."""
    return float(torch.linalg.matrix_norm(t)) if t.numel() else 0.0
