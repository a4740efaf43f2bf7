"""Project a mitigated delta onto an adapter's rank."""

from __future__ import annotations

from torch import Tensor

from streamer.linalg.low_rank import LowRank


def back_project(delta: LowRank, rank: int, scaling: float) -> tuple[Tensor, Tensor, float]:
    """Compute adapter factors with ``scaling · B @ A ≈ Δ'``, and the relative Frobenius norm that is lost.

    Parameters
    ----------
    delta
        Δ' = L Rᵀ, (m, n).
    rank
        The adapter's rank r. If Δ' has at most r columns, its factors are kept and nothing is lost; otherwise Δ' is
        truncated to the nearest matrix of rank r, and ``√Σ`` goes into both B and A.
    scaling
        LoRA's s, not zero.

    Returns
    -------
    B, A, dropped
        (m, r), (r, n), and ``‖Δ' − s·B·A‖_F / ‖Δ'‖_F``.
    """
    delta = delta.precise()
    if delta.rank <= rank:
        return delta.L / scaling, delta.R.T, 0.0
    root, dropped = delta.scaled(1 / scaling).truncated(rank)
    return root.L, root.R.T, dropped
