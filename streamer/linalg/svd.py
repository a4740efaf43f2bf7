"""Leading singular triplets by block Krylov or by LAPACK's full SVD, with residuals recomputed from the operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from streamer.linalg.krylov import GolubKahan
from streamer.linalg.operators import Operator


@dataclass(frozen=True)
class Triplets:
    """``W v_j ≈ σ_j u_j`` and ``Wᵀ u_j ≈ σ_j v_j`` for the k largest singular values of W (m, n).

    Attributes
    ----------
    U, S, Vh
        (m, k), (k,), (k, n); S in falling order.
    residuals
        (k,) float64: ``max(‖W v − σ u‖, ‖Wᵀ u − σ v‖)``, recomputed from the operator after the solve.
    gaps
        (k,) float64: distance from σ_j to the nearest other singular value, for m > n to zero as well; infinite where there is
        none.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    residuals: Tensor
    gaps: Tensor

    @property
    def angle_error_estimate(self) -> Tensor:
        """(k,) float64: ``residual_j / gap_j``, at most 1.

        Wedin (BIT 12, 1972): the sine of the angle between u_j and the true singular vector is at most the residual over
        the distance of σ_j to the *true* rest of the spectrum; here the distance is to the computed one, so it is an
        estimate. The residual is floored at one rounding of σ_1, below which it is noise.
        """
        floor = torch.finfo(self.S.dtype).eps * float(self.S[0]) if len(self.S) else 0.0
        error = self.residuals.clamp_min(floor) / self.gaps.clamp_min(torch.finfo(torch.float64).tiny)
        return error.clamp_max(1.0)


def dense_triplets(W: Operator, k: int) -> Triplets:
    """The k leading triplets by LAPACK's full SVD, in the operator's own precision.

    Parameters
    ----------
    W
        (m, n), 1 ≤ k ≤ min(m, n). It is formed; memory is about three times its size.

    Raises
    ------
    torch.linalg.LinAlgError
        If LAPACK does not converge.
    """
    U, S, Vh = torch.linalg.svd(W.dense(), full_matrices=False)
    U, values, S, Vh = U[:, :k].contiguous(), S.double(), S[:k].clone(), Vh[:k].contiguous()
    padded = torch.nn.functional.pad(values, (1, 1), value=float("inf"))
    if W.shape[0] > W.shape[1]:
        padded[-1] = 0.0  # u_n has neighbours outside the range of W
    gaps = torch.minimum((padded[:-2] - values).abs(), (values - padded[2:]).abs())[:k]
    return Triplets(U, S, Vh, residuals(W, U, S, Vh), gaps.cpu())


DEGENERATE = 0.1
"""An angle error above this makes a single direction ill-defined: its neighbours in the cluster do as well."""

ANGLES = (1e-5, 1e-3)
"""Krylov triplets are refined until the angle error is below this, or the residual is down to rounding. Spectra without decay, which
do not get there in 16 steps, are given the second: what is certified is widened by the error that is left."""


class KrylovTriplets(NamedTuple):
    """The triplets, or None where the basis grew to its limit first; and what they cost."""

    triplets: Triplets | None
    steps: int
    products: int


def krylov_triplets(W: Operator, k: int, generator: torch.Generator, like: Tensor, max_basis: int) -> KrylovTriplets:
    """The k leading triplets by the block Golub–Kahan process from a random block.

    Parameters
    ----------
    W
        (m, n), scaled so that its norm is near 1.
    k
        1 ≤ k < min(m, n). The block has at least 6 more columns, so that clusters at σ_k do not hide a vector.
    like
        A tensor of the dtype and device to compute with.
    max_basis
        Columns of the basis at most; memory is (m + n) times that.
    """
    m, n = W.shape
    op = W if n <= m else W.T
    width = min(-(-(k + 6) // 16) * 16, m, n)
    process = GolubKahan(op, torch.randn(op.shape[1], width, generator=generator, dtype=torch.float32).to(like))
    floor = 8 * torch.finfo(like.dtype).eps
    look = 4
    while not process.exhausted and process.P.shape[1] < max_basis:
        process.step()
        if process.steps < look and not process.exhausted:
            continue
        # The decomposition of B grows with the cube of the basis: far into a flat spectrum it is not taken at each step.
        look += 1 if look < 16 else look // 4
        X, S, Y, tail = process.ritz()
        padded = torch.nn.functional.pad(S, (1, 1), value=float("inf"))
        padded[-1] = 0.0 if len(S) < min(m, n) or m > n else float("inf")
        residual = torch.linalg.vector_norm(tail, dim=0)
        # A Ritz value lies below its singular value, by its residual at most: so much nearer may the next one be.
        below = S - padded[2:] - torch.nn.functional.pad(residual, (0, 1))[1:]
        gaps = torch.minimum(padded[:-2] - S, below).clamp_min(0)[:k]
        residual = residual[:k]
        angle = ANGLES[process.steps > 16]
        if process.exhausted or bool((residual <= (angle * gaps).clamp_min(floor * float(S[0]))).all()):
            if len(S) < k or X.shape[1] < k:
                break
            left, right = process.Q @ X[:, :k].to(like), process.P @ Y[:, :k].to(like)
            U, V = (left, right) if n <= m else (right, left)
            values = S[:k].to(like)
            found = Triplets(U, values, V.T.contiguous(), residuals(W, U, values, V.T), gaps)
            return KrylovTriplets(found, process.steps, process.products + 2 * k)
    return KrylovTriplets(None, process.steps, process.products)


def residuals(W: Operator, U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    """``max(‖W v_j − σ_j u_j‖, ‖Wᵀ u_j − σ_j v_j‖)`` for each j, (k,) float64 on the CPU."""
    # The norms in float64: squares of values near 1e30 overflow in float32.
    right = torch.linalg.vector_norm((W.matmat(Vh.T) - U * S).double(), dim=0)
    left = torch.linalg.vector_norm((W.rmatmat(U) - Vh.T * S).double(), dim=0)
    return torch.maximum(left, right).cpu()
