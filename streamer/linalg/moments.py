"""Reduce deltas by second moments of inputs, and find the leading eigenvectors of these moments.

Let ``C ≈ V diag(e) Vᵀ + ρ (I − V Vᵀ)`` (n, n), where V (n, k) are the leading eigenvectors and ρ is the mean of the other eigenvalues:

    Δ' = Δ (I + ν C)⁻ᵖ

Every direction v of the inputs keeps ``(1 + ν e)⁻ᵖ`` of ``Δ v``. For p = 1 this minimises ``‖Δ' − Δ‖² + ν E‖Δ' x‖²``, a soft projection on
the null space of general inputs. A smaller p spares the leading directions, which task inputs share. For factors ``Δ = L Rᵀ`` only R
changes, so the rank stays. ν is chosen so that Δ' keeps a share λ of the delta's energy ``E‖Δ x‖²``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamer.linalg.operators import Delta, Dense, LowRank

POWER = 0.25
"""p. On ten adapters of two bases, at nine tenths of the learning kept, p = 1, 1/2 and 1/4 leave 0.87, 0.85 and 0.84 of the forgetting that
`shrink` leaves (0.98, 0.93 and 0.90 at worst). One ν for all matrices leaves more: 0.91 with p = 1, 1.13 at worst."""

HALVINGS = 100
"""Bisection steps for the logarithm of ν; enough to meet the share to the last bits of float64."""

RANGE = 100.0
"""Search range for ν: the logarithm extends this far on each side of the inverse of the largest eigenvalue."""


@dataclass(frozen=True)
class Spectrum:
    """Approximate spectrum of the second moments C (n, n) of a module's inputs; float64.

    Attributes
    ----------
    values
        The leading eigenvalues e (k,); for one-hot inputs the whole diagonal (n,).
    rest
        Mean ρ of the other eigenvalues.
    vectors
        Eigenvectors V (n, k), orthonormal; None for one-hot inputs.
    """

    values: Tensor
    rest: float = 0.0
    vectors: Tensor | None = None


def reduced(delta: Delta, spectrum: Spectrum, share: float) -> Delta:
    """Compute the Δ' that keeps `share` (in [0, 1]) of Δ's energy on inputs with this spectrum; return Δ itself if it has no energy.

    Returns
    -------
    LowRank or Dense
        Float64 factors with Δ's L and rank; a dense Δ' has Δ's dtype.
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
    """Compute ``‖Δ v‖² e`` for each known direction (k,), and the sum over all others."""
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
    """Compute the factor for each known direction (k,), and the one for all others."""
    if math.isinf(weight):
        return (spectrum.values == 0).double(), float(spectrum.rest == 0)
    return (1 + weight * spectrum.values) ** -POWER, float((1 + weight * spectrum.rest) ** -POWER)


def _weight(spectrum: Spectrum, energies: Tensor, rest: float, share: float) -> float:
    """Find the ν at which `share` of the energy remains; infinity for share 0."""
    if share == 0:
        return math.inf
    whole = float(energies.sum()) + rest
    middle = -math.log(max(float(spectrum.values.max()), spectrum.rest))
    low, high = middle - RANGE, middle + RANGE
    for _ in range(HALVINGS):
        weight = (low + high) / 2
        gains, of_rest = _gains(spectrum, math.exp(weight))
        left = float((energies * gains**2).sum()) + rest * of_rest**2
        low, high = (weight, high) if left > share * whole else (low, weight)
    return math.exp(low)


def _scaled(R: Tensor, spectrum: Spectrum, gains: Tensor, of_rest: float) -> Tensor:
    """Scale the row side of R (n, r) along each direction, in R's dtype."""
    V = spectrum.vectors
    if V is None:
        return R * gains.to(R)[:, None]
    V = V.to(R)
    return (R * of_rest).addmm_(V, (gains - of_rest).to(R)[:, None] * (V.T @ R))


SMALL = 512
"""Largest n for which C is formed and decomposed directly."""

MORE, ROUNDS = 16, 8
"""Extra vectors in the iteration, and products with C. They give eigenvalues to 1e-3 if the last iterated eigenvalue is a third of the last
one wanted."""

ROWS = 512
"""Rows that are converted to float64 at a time."""


def leading_vectors(inputs: Sequence[Tensor], tokens: int, count: int) -> tuple[Tensor, Tensor]:
    """Compute the leading eigenvalues (k,), falling, and eigenvectors (n, k) of ``C = Σ x xᵀ / tokens`` in float64, k = min(count, n).

    Above `SMALL`, uses subspace iteration (Halko, Martinsson and Tropp, SIAM Review 2011) from the same random vectors in every run.

    Parameters
    ----------
    inputs
        Inputs x, (t, n) each, in float32.
    tokens
        Number of tokens, which may exceed the number of inputs: an expert receives only some of them.
    """
    n, device = inputs[0].shape[1], inputs[0].device

    def products(V: Tensor) -> Tensor:
        out = torch.zeros_like(V)
        for rows in (rows.to(V.dtype) for x in inputs for rows in torch.split(x, ROWS)):
            out.addmm_(rows.T, rows @ V)
        return out.div_(tokens)

    if n <= SMALL:
        basis = torch.eye(n, dtype=torch.float64).to(device)
    else:
        V = torch.randn(n, min(n, count + MORE), generator=torch.Generator().manual_seed(0)).to(device)
        for _ in range(ROUNDS):
            V = products(torch.linalg.qr(V)[0])
        basis = torch.linalg.qr(V.double())[0]
    core = basis.T @ products(basis)
    values, rotation = torch.linalg.eigh((core + core.T) / 2)
    return values.flip(0)[:count].clamp_min(0), basis @ rotation.flip(1)[:, :count]
