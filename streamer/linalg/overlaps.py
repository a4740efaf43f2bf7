"""How far given unit vectors overlap with the left singular vectors of a matrix.

So far there is one way, the dense one: LAPACK's full SVD of the base.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamer.linalg.operators import Dense


def dense_overlaps(base: Dense, U: Tensor) -> Tensor:
    """``sim_j = max_i |⟨u_j, u⁰_i⟩|`` over all left vectors of the thin SVD of the base.

    Parameters
    ----------
    base
        (m, n).
    U
        (m, k), unit columns.

    Returns
    -------
    Tensor
        (k,) float64 on the CPU, each in [0, 1]. Shuttleworth et al. (arXiv 2410.21228), Algorithm 1.
    """
    U0: Tensor = torch.linalg.svd(base.matrix, full_matrices=False).U
    return (U0.T @ U).abs().amax(dim=0).clamp_max(1.0).double().cpu()
