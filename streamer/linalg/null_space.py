"""Take away what a delta answers to general inputs, by the leading eigenvectors of their second moments.

With ``C ≈ V diag(e) Vᵀ + ρ (I − V Vᵀ)`` (n, n), of whose eigenvectors V (n, k) the leading ones are known, and on the rest the mean ρ,

    Δ' = Δ (I + ν C)⁻ᵖ

Every direction of inputs keeps ``(1 + ν e)⁻ᵖ`` of Δ. With p = 1 that is the argument of ``min ‖Δ' − Δ‖² + ν E‖Δ' x‖²``, a soft projection
on the null space of general inputs; a smaller p spares the leading directions, which the task's inputs have as well. Of factors
``Δ = L Rᵀ`` only R changes, so that the rank stays. ν follows from the share λ of the delta's energy ``E‖Δ x‖²`` that stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from streamer.linalg.low_rank import LowRank
from streamer.linalg.operators import Delta, Dense

POWER = 0.25
"""p. On ten adapters of two bases, at nine tenths of the learning kept, 1, 1/2 and 1/4 leave 0.87, 0.85 and 0.84 of what a shrink does, and
at worst 0.98, 0.93 and 0.90. The same ν for all matrices leaves more: with p = 1 0.91, at worst 1.13."""

STEPS = 100
"""Bisections of the logarithm of ν: the share is met to the last bits of float64."""

RANGE = 100.0
"""Where ν is searched for, a logarithm: e^±100 over the mean eigenvalue."""


@dataclass(frozen=True)
class Spectrum:
    """What is known of the second moments C (n, n) of a module's inputs; float64.

    Attributes
    ----------
    values
        The leading eigenvalues e (k,); of one-hot inputs the whole diagonal (n,).
    rest
        Mean eigenvalue ρ of all others.
    vectors
        Eigenvectors V (n, k), orthonormal; None of one-hot inputs.
    """

    values: Tensor
    rest: float = 0.0
    vectors: Tensor | None = None


def leading(V: Tensor, C_V: Tensor) -> tuple[Tensor, Tensor]:
    """Compute eigenvalues (k,), falling, and eigenvectors (n, k) of a symmetric C within the span of V, which is orthonormal."""
    core = V.T @ C_V
    values, rotation = torch.linalg.eigh((core + core.T) / 2)
    return values.flip(0).clamp_min(0), V @ rotation.flip(1)


def reduced(delta: Delta, spectrum: Spectrum, share: float) -> Delta:
    """Compute Δ' whose energy on inputs of this spectrum is a share, in [0, 1], of that of Δ; Δ itself if it has none.

    Returns
    -------
    LowRank or Dense
        Factors of Δ's rank in float64, L being that of Δ; a dense Δ' has the dtype of Δ.
    """
    energies, rest = _energies(delta, spectrum)
    if share == 1 or not float(energies.sum()) + rest > 0:
        return delta
    gains, of_rest = _gains(spectrum, _weight(spectrum, energies, rest, share))
    if isinstance(delta, LowRank):
        return LowRank(delta.L.double(), _scaled(delta.R.double(), spectrum, gains, of_rest))
    assert isinstance(delta, Dense)
    return Dense(_scaled(delta.dense().T, spectrum, gains, of_rest).T)


def _energies(delta: Delta, spectrum: Spectrum) -> tuple[Tensor, float]:
    """Compute ``‖Δ v‖² e`` of each known direction (k,), and of all others together."""
    V = spectrum.vectors
    if isinstance(delta, LowRank):
        core, right = torch.linalg.qr(delta.L.double())[1], delta.R.double()
        known = core @ (right.T if V is None else right.T @ V)
        whole = torch.linalg.matrix_norm(core @ right.T)
    else:
        assert isinstance(delta, Dense)
        known = delta.dense() if V is None else delta.matmat(V.to(delta.like)).double()
        whole = torch.tensor(delta.norm())
    squares = torch.linalg.vector_norm(known, dim=0, dtype=torch.float64) ** 2
    return squares * spectrum.values, spectrum.rest * max(0.0, float(whole**2 - squares.sum()))


def _gains(spectrum: Spectrum, weight: float) -> tuple[Tensor, float]:
    """Compute what is left of each known direction (k,), and of all others."""
    if math.isinf(weight):
        return (spectrum.values == 0).double(), float(spectrum.rest == 0)
    return (1 + weight * spectrum.values) ** -POWER, float((1 + weight * spectrum.rest) ** -POWER)


def _weight(spectrum: Spectrum, energies: Tensor, rest: float, share: float) -> float:
    """Find ν by the share that stays; infinity for 0."""
    if share == 0:
        return math.inf
    whole = float(energies.sum()) + rest
    middle = -math.log(max(float(spectrum.values.max()), spectrum.rest))
    low, high = middle - RANGE, middle + RANGE
    for _ in range(STEPS):
        weight = (low + high) / 2
        gains, of_rest = _gains(spectrum, math.exp(weight))
        left = float((energies * gains**2).sum()) + rest * of_rest**2
        low, high = (weight, high) if left > share * whole else (low, weight)
    return math.exp(low)


def _scaled(R: Tensor, spectrum: Spectrum, gains: Tensor, of_rest: float) -> Tensor:
    """Scale the rows' side of R (n, r) along each direction, in the dtype of R."""
    V = spectrum.vectors
    if V is None:
        return R * gains.to(R)[:, None]
    V = V.to(R)
    return (R * of_rest).addmm_(V, (gains - of_rest).to(R)[:, None] * (V.T @ R))
