"""Leading singular triplets, with residuals recomputed from the operator.

So far there is one solver, the dense one: LAPACK's full SVD.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
        (k,) float64: distance from σ_j to the nearest other singular value; infinite where there is none.
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
    gaps = torch.minimum((padded[:-2] - values).abs(), (values - padded[2:]).abs())[:k]
    return Triplets(U, S, Vh, residuals(W, U, S, Vh), gaps.cpu())


def residuals(W: Operator, U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    """``max(‖W v_j − σ_j u_j‖, ‖Wᵀ u_j − σ_j v_j‖)`` for each j, (k,) float64 on the CPU."""
    # The norms in float64: squares of values near 1e30 overflow in float32.
    right = torch.linalg.vector_norm((W.matmat(Vh.T) - U * S).double(), dim=0)
    left = torch.linalg.vector_norm((W.rmatmat(U) - Vh.T * S).double(), dim=0)
    return torch.maximum(left, right).cpu()
