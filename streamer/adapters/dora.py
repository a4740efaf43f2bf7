"""DoRA: ``W' = m · (W0 + Δ) / ‖W0 + Δ‖``, each row of the (out, in) matrix at the length that its magnitude gives.

PEFT's convention: m has one entry a row of the (out, in) matrix, for an embedding one a column of the stored (vocabulary, dim), for a
convolution one an output channel, its norm over all other dimensions. The norm includes the delta, unscaled by any dropout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamer.linalg.low_rank import LowRank
from streamer.linalg.operators import BLOCK_BYTES


def dora_delta(base: Tensor, delta: LowRank, magnitude: Tensor) -> Tensor:
    """``W' − W0``, (m, n), in the dtype of W0; norms are taken in float64.

    Parameters
    ----------
    base
        W0 as (out, in).
    delta
        Δ, LoRA's own.
    magnitude
        (m,).
    """
    delta = LowRank(delta.L.to(base), delta.R.to(base))
    lengths = magnitude.to(base.device, torch.float64)
    m, n = base.shape
    out = torch.empty((m, n), dtype=base.dtype, device=base.device)
    rows = max(1, BLOCK_BYTES // max(1, n * 8))
    for i in range(0, m, rows):
        j = min(m, i + rows)
        total = torch.addmm(base[i:j], delta.L[i:j], delta.R.T).double()
        factor = lengths[i:j] / torch.linalg.vector_norm(total, dim=1)
        out[i:j] = total * factor[:, None] - base[i:j]
    return out


def dora_bytes(shape: tuple[int, int], itemsize: int) -> int:
    """Peak memory of `dora_delta`: W0, the delta, and rows in float64, four times by turns."""
    m, n = shape
    return 2 * itemsize * m * n + 4 * min(8 * m * n, max(BLOCK_BYTES, 8 * n))
