"""A matrix with a planted intruder, and the dense formula's answer in float64."""

import numpy as np
import torch
from helpers import planted

from streamer.linalg.operators import Dense, LowRank


def problem(
    m: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Dense, LowRank]:
    W0, (A, B) = planted(m, n, 4, seed, dtype)
    return Dense(W0), LowRank(B.to(dtype), A.T.to(dtype))


def oracle(
    base: Dense, delta: LowRank, k: int = 10
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """U, S, Vh of base + delta, and the similarities of the k leading directions, in float64 by numpy."""
    W0 = base.matrix.double().numpy()
    U0 = np.linalg.svd(W0, full_matrices=False)[0]
    U, S, Vh = np.linalg.svd(W0 + delta.to(torch.float64).dense().numpy(), full_matrices=False)
    return U[:, :k], S[:k], Vh[:k], np.abs(U0.T @ U[:, :k]).max(0)
