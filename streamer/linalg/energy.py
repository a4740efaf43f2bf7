"""Energy of a matrix, its squared singular values, and the rank that keeps a share of it."""

from __future__ import annotations

import torch
from torch import Tensor

from streamer.linalg.low_rank import LowRank
from streamer.linalg.operators import Delta

BLOCK = 1024
ROUNDING = 1e-12
"""Part of the whole energy that sums of squares in float64 leave open."""


def energies(delta: Delta) -> Tensor:
    """Compute the squared singular values of a matrix, falling, in float64: from its factors, or as eigenvalues of ``M Mᵀ``.

    Memory is three squares of the shorter side, in float64, for a dense matrix, and that of its factors else.
    """
    if isinstance(delta, LowRank):
        return delta.svd()[1].square()
    matrix = delta.dense()
    matrix = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    gram = matrix.new_zeros((len(matrix), len(matrix)), dtype=torch.float64)
    for i in range(0, matrix.shape[1], BLOCK):
        block = matrix[:, i : i + BLOCK].double()
        gram.addmm_(block, block.T)
    values: Tensor = torch.linalg.eigvalsh(gram).flip(0).clamp_(min=0)
    return values


def energies_bytes(shape: tuple[int, int]) -> int:
    """Estimate the memory for `energies` of a dense matrix, beside the matrix."""
    p = min(shape)
    return 8 * (3 * p * p + p * min(BLOCK, max(shape)))


def least_rank(energy: Tensor, share: float) -> int:
    """Return the least k, at least 1, for which the k largest energies sum to this share of all.

    >>> least_rank(torch.tensor([8.0, 1.0, 1.0]), 0.8), least_rank(torch.tensor([8.0, 1.0, 1.0]), 0.81)
    (1, 2)
    """
    sums = energy.cumsum(0)
    return min(len(sums), int(torch.searchsorted(sums, share * sums[-1] * (1 - ROUNDING))) + 1)
