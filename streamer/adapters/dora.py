"""Compute DoRA's delta: ``W' = m · (W0 + Δ) / ‖W0 + Δ‖``, which scales each row of the (out, in) matrix to its magnitude.

PEFT's convention: m has one entry for each row of the (out, in) matrix. For an embedding this is a column of the stored (vocabulary, dim);
for a convolution it is an output channel, with the norm over all other dimensions. The norm includes the delta, without dropout's scaling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamer.linalg.low_rank import LowRank
from streamer.linalg.operators import BLOCK_BYTES


def dora_delta(W0: Tensor, delta: LowRank, magnitude: Tensor) -> Tensor:
    """Compute ``W' − W0``, (m, n), in W0's dtype; norms are computed in float64.

    Parameters
    ----------
    W0
        The base matrix, (out, in).
    delta
        Δ, the product of the LoRA factors.
    magnitude
        Lengths m of the rows, (m,).
    """
    delta = LowRank(delta.L.to(W0), delta.R.to(W0))
    lengths = magnitude.to(W0.device, torch.float64)
    m, n = W0.shape
    out = torch.empty((m, n), dtype=W0.dtype, device=W0.device)
    rows = max(1, BLOCK_BYTES // max(1, n * 8))
    for i in range(0, m, rows):
        j = min(m, i + rows)
        total = torch.addmm(W0[i:j], delta.L[i:j], delta.R.T).double()
        factor = lengths[i:j] / torch.linalg.vector_norm(total, dim=1)
        out[i:j] = total * factor[:, None] - W0[i:j]
    return out


def dora_bytes(shape: tuple[int, int], itemsize: int) -> int:
    """Estimate the peak memory of `dora_delta` in bytes: W0, the delta, and up to four blocks of rows in float64."""
    m, n = shape
    return 2 * itemsize * m * n + 4 * min(8 * m * n, max(BLOCK_BYTES, 8 * n))
