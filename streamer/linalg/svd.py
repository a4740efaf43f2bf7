"""Compute leading singular triplets by block Krylov or LAPACK's full SVD; recompute their residuals from the operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from streamer.linalg.golub_kahan import GolubKahan, RitzBasis, block_width
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
        (k,) float64: distance from σ_j to the nearest other singular value, and for m > n also to zero; infinite if there is none.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    residuals: Tensor
    gaps: Tensor

    @property
    def angle_error_estimate(self) -> Tensor:
        """Estimate the angle error, (k,) float64: ``residual_j / gap_j``, at most 1.

        By Wedin (BIT 12, 1972), the sine of the angle between u_j and the true singular vector is at most the residual over the
        distance from σ_j to the *true* rest of the spectrum. Only the computed rest is known, so this is an estimate. Residuals
        below one rounding of σ_1 are noise and count as one rounding.
        """
        floor = torch.finfo(self.S.dtype).eps * float(self.S[0]) if len(self.S) else 0.0
        error = self.residuals.clamp_min(floor) / self.gaps.clamp_min(torch.finfo(torch.float64).tiny)
        return error.clamp_max(1.0)

    @property
    def distance_estimate(self) -> Tensor:
        """Estimate ``‖u_j − u‖`` to the true singular vector, (k,) float64: ``2 sin(θ/2)`` for the angle θ of `angle_error_estimate`.

        A similarity changes by at most this much. A degenerate direction gets 2: nothing is known of it alone.
        """
        sine = self.angle_error_estimate
        return torch.where(sine > DEGENERATE, 2.0, 2 * (sine.asin() / 2).sin())


DEGENERATE = 0.1
"""Angle error above which a single direction is ill-defined, because its neighbours in the cluster fit equally well."""


def dense_triplets(W: Operator, k: int) -> Triplets:
    """Compute the k leading triplets by LAPACK's full SVD, in the operator's precision.

    Parameters
    ----------
    W
        (m, n), 1 ≤ k ≤ min(m, n). The matrix is formed; memory is about three times its size.

    Raises
    ------
    torch.linalg.LinAlgError
        If LAPACK does not converge.
    """
    U, S, Vh = torch.linalg.svd(W.dense(), full_matrices=False)
    U, values, S, Vh = U[:, :k].contiguous(), S.double(), S[:k].clone(), Vh[:k].contiguous()
    padded = torch.nn.functional.pad(values, (1, 1), value=float("inf"))
    if W.shape[0] > W.shape[1]:
        padded[-1] = 0.0  # vectors outside the range of W are neighbours of u_n
    gaps = torch.minimum((padded[:-2] - values).abs(), (values - padded[2:]).abs())[:k]
    return Triplets(U, S, Vh, residuals(W, U, S, Vh), gaps.cpu())


ANGLES = (1e-5, 1e-3)
"""Target angle errors for Krylov triplets; refinement also stops if the residual is down to rounding. Spectra without decay miss the first
target in 16 steps and then get the second; the remaining error widens the certified intervals."""


OVERSAMPLING = 6
"""Fewest random columns in the start block beyond k."""


class KrylovTriplets(NamedTuple):
    """Triplets from `krylov_triplets`, whether they meet `ANGLES`, and their cost.

    Without convergence these are the best found; their residuals and gaps show how good.
    """

    triplets: Triplets
    converged: bool
    steps: int
    products: int


def krylov_triplets(
    W: Operator, k: int, generator: torch.Generator, like: Tensor, max_basis: int, max_steps: int
) -> KrylovTriplets:
    """Compute the k leading triplets by the block Golub–Kahan process from a random block, with thick restarts.

    Parameters
    ----------
    W
        (m, n), scaled so that its norm is near 1.
    k
        1 ≤ k < min(m, n). The block has at least `OVERSAMPLING` more columns, so that a cluster at σ_k does not hide a vector.
    like
        A tensor with the dtype and device of the computation.
    max_basis
        Most columns of the basis, at least k and two blocks; memory is (m + n) times this. A full basis restarts from the leading
        third of its Ritz triplets.
    max_steps
        Most block steps.
    """
    m, n = W.shape
    op = W if n <= m else W.T
    width = min(block_width(k, OVERSAMPLING), m, n)
    process = GolubKahan(op, torch.randn(op.shape[1], width, generator=generator, dtype=torch.float32).to(like))
    look = 4
    while True:
        process.step()
        ended = process.exhausted or process.steps >= max_steps
        full = process.P.shape[1] + process.following.shape[1] > max_basis
        if process.steps < look and not ended and not full:
            continue
        # Decomposing B costs the cube of the basis, so deep in a flat spectrum not every step is checked.
        look = process.steps + (1 if process.steps < 16 else 4)
        ritz = process.ritz()
        good = process.exhausted or _converged(ritz, k, (m, n), ANGLES[process.steps > 16], torch.finfo(like.dtype).eps)
        if good or ended:
            found = _leading(process, ritz, k, W, generator)
            return KrylovTriplets(found, good and min(process.B.shape) >= k, process.steps, process.products + 2 * k)
        if full:
            process.restart(max(k + width, max_basis // 3))


def _gaps(ritz: RitzBasis, k: int, shape: tuple[int, int]) -> Tensor:
    """Estimate a lower bound on the distance from each of k Ritz values to the nearest other singular value, (k,)."""
    m, n = shape
    S = ritz.S
    padded = torch.nn.functional.pad(S, (1, 1), value=float("inf"))
    padded[-1] = 0.0 if len(S) < min(m, n) or m > n else float("inf")
    residual = torch.linalg.vector_norm(ritz.tail, dim=0)
    # The j-th Ritz value lies below the j-th singular value, and after convergence by at most its residual; the next singular value may
    # be that much nearer. Convergence, and that no value was missed, rest on the random columns, as in all Krylov solvers.
    below = S - padded[2:] - torch.nn.functional.pad(residual, (0, 1))[1:]
    return torch.minimum(padded[:-2] - S, below).clamp_min(0)[:k]


def _converged(ritz: RitzBasis, k: int, shape: tuple[int, int], angle: float, eps: float) -> bool:
    """Test whether the first k Ritz triplets are within `angle` of singular triplets, or as near as rounding allows."""
    residual = torch.linalg.vector_norm(ritz.tail, dim=0)[:k]
    return bool((residual <= (angle * _gaps(ritz, k, shape)).clamp_min(8 * eps * float(ritz.S[0]))).all())


def _leading(process: GolubKahan, ritz: RitzBasis, k: int, W: Operator, generator: torch.Generator) -> Triplets:
    """Form the k leading Ritz triplets; fill up missing ones with σ = 0, arbitrary orthonormal vectors and gap 0."""
    missing = max(0, k - min(process.B.shape))
    found = k - missing
    left, right = process.Q @ ritz.X[:, :found].to(process.Q), process.P @ ritz.Y[:, :found].to(process.P)
    left, right = (_completed(basis, missing, generator) for basis in (left, right))
    U, V = (left, right) if process.op is W else (right, left)
    pad = (0, missing)
    S = torch.nn.functional.pad(ritz.S[:found], pad).to(U)
    gaps = torch.nn.functional.pad(_gaps(ritz, found, W.shape), pad)
    return Triplets(U, S, V.T.contiguous(), residuals(W, U, S, V.T), gaps)


def _completed(basis: Tensor, missing: int, generator: torch.Generator) -> Tensor:
    """Append `missing` orthonormal columns to a basis."""
    if not missing:
        return basis
    more = torch.randn(len(basis), missing, generator=generator, dtype=torch.float32).to(basis)
    for _ in range(2):
        more = torch.linalg.qr(more - basis @ (basis.T @ more)).Q
    return torch.cat([basis, more], 1)


def residuals(W: Operator, U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    """Compute ``max(‖W v_j − σ_j u_j‖, ‖Wᵀ u_j − σ_j v_j‖)`` for each j, (k,) float64 on the CPU."""
    # Norms are summed in float64: squares of values near 1e30 overflow in float32.
    right = torch.linalg.vector_norm((W.matmat(Vh.T) - U * S).double(), dim=0)
    left = torch.linalg.vector_norm((W.rmatmat(U) - Vh.T * S).double(), dim=0)
    return torch.maximum(left, right).cpu()
