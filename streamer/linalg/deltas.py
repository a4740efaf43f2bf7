"""What an adapter adds to a weight: in factors where it is of low rank, as a matrix where it is not."""

from __future__ import annotations

import torch
from torch import Tensor

from streamer.linalg.operators import Dense, LowRank

Delta = LowRank | Dense
"""Δ (m, n)."""


def cast(delta: Delta, dtype: torch.dtype, device: torch.device | None = None) -> Delta:
    """The same in another dtype, on another device."""
    if isinstance(delta, LowRank):
        return LowRank(delta.L.to(device, dtype), delta.R.to(device, dtype))
    return Dense(delta.dense().to(device, dtype))


def named_parts(delta: Delta) -> list[tuple[str, list[Tensor]]]:
    """The tensors that it is held in, by what an adapter calls them."""
    if isinstance(delta, LowRank):
        return [("lora_B", [delta.L]), ("lora_A", [delta.R])]
    return [("the delta", [delta.matrix])]


def empty(delta: Delta) -> bool:
    """Whether it is zero; of factors, whether either one is."""
    if isinstance(delta, LowRank):
        return not (delta.L.any() and delta.R.any())
    return not delta.matrix.any()


def largest(delta: Delta) -> float:
    """The largest entry, at most so many times too large as the rank is."""
    if isinstance(delta, LowRank):
        return float(delta.L.abs().max()) * float(delta.R.abs().max()) if delta.rank else 0.0
    low, high = torch.aminmax(delta.matrix)
    return max(-float(low), float(high)) * abs(delta.scale)


def norm(delta: Delta) -> float:
    """``‖Δ‖_F``."""
    if isinstance(delta, LowRank):
        return delta.norm()
    squares = sum(float(torch.linalg.vector_norm(rows.double())) ** 2 for rows in torch.split(delta.matrix, 256))
    return float(squares**0.5) * abs(delta.scale)


def side_norm(delta: Delta, U: Tensor) -> float:
    """``‖Uᵀ Δ‖_F`` for U (m, q) with orthonormal columns."""
    if isinstance(delta, LowRank):
        return LowRank(U.T.to(delta.L) @ delta.L, delta.R).norm()
    return float(torch.linalg.matrix_norm((U.T.to(delta.matrix) @ delta.dense()).double())) if U.shape[1] else 0.0


def add_rows(values: Tensor, delta: Delta, i: int, j: int) -> None:
    """Add rows i to j of Δ to `values` (j − i, n), in place and in its dtype."""
    if isinstance(delta, LowRank):
        values.addmm_(delta.L[i:j], delta.R.T)
    else:
        values.add_(delta.matrix[i:j], alpha=delta.scale)
