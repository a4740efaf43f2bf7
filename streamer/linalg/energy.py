"""Compute a matrix's energies (squared singular values) and the rank that keeps a share of them."""

from __future__ import annotations

import torch
from torch import Tensor

from streamer.linalg.low_rank import LowRank
from streamer.linalg.operators import Delta

BLOCK = 1024
ROUNDING = 1e-12
"""Share of the total energy by which sums of squares in float64 may be off."""


def energies(delta: Delta) -> Tensor:
    """Compute the squared singular values, falling, in float64: from the factors, or as the eigenvalues of ``M Mᵀ``.

    A dense matrix needs memory for three float64 squares of its shorter side; factors need as much as they occupy.
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
    """Estimate the memory in bytes of `energies` for a dense matrix, without the matrix itself."""
    p = min(shape)
    return 8 * (3 * p * p + p * min(BLOCK, max(shape)))


def least_rank(energy: Tensor, share: float) -> int:
    """Return the least k ≥ 1 whose k largest energies sum to at least `share` of the total.

    >>> least_rank(torch.tensor([8.0, 1.0, 1.0]), 0.8), least_rank(torch.tensor([8.0, 1.0, 1.0]), 0.81)
    (1, 2)
    """
    sums = energy.cumsum(0)
    return min(len(sums), int(torch.searchsorted(sums, share * sums[-1] * (1 - ROUNDING))) + 1)
