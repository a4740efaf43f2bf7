"""Solvers: base and delta → the leading triplets of their sum, and an interval for each similarity.

`SOLVERS` is the seam: a new solver is a new entry. ``certified`` multiplies and never decomposes; what it cannot settle within a
cost limit goes to ``dense``, and the answer says so. ``auto`` takes the cheaper one (`cheaper`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamer.linalg.operators import Dense, LowRank, Sum
from streamer.linalg.overlaps import OverlapProcess, dense_overlaps
from streamer.linalg.svd import Triplets, dense_triplets, krylov_triplets


@dataclass(frozen=True)
class Spectrum:
    """What a solver answers.

    Attributes
    ----------
    triplets
        The k leading ones of base + delta.
    similarity, low, high
        (k,) float64: the best estimate, and an interval that holds for the true singular vectors: it is widened by the angle
        error of the triplets.
    solver
        The solver that ran last.
    escalated
        The certified solver gave up and the dense one answered.
    steps, products
        Block steps of both Krylov processes, and columns multiplied; 0 for the dense solver alone.
    cutoff
        δ: base singular values below ``δ·σ⁰_1`` are not covered by the interval; 0 where all are.
    """

    triplets: Triplets
    similarity: Tensor
    low: Tensor
    high: Tensor
    solver: str
    escalated: bool = False
    steps: int = 0
    products: int = 0
    cutoff: float = 0.0


BASIS_SHARE, BASIS_LEAST = 0.45, 256
"""A Krylov basis grows to this share of the short side, at least to so many columns; then the dense solver costs less."""

Solver = Callable[[Dense, LowRank, int, float, torch.Generator], Spectrum]


def solve_dense(base: Dense, delta: LowRank, k: int, epsilon: float, generator: torch.Generator) -> Spectrum:
    """LAPACK's full SVD of the sum and of the base."""
    triplets = dense_triplets(Sum([base, delta]), k)
    bounds, similarity = dense_overlaps(base, triplets.U, generator)
    error = triplets.angle_error_estimate
    return Spectrum(
        triplets, similarity, (bounds.low - error).clamp_min(0), (bounds.high + error).clamp_max(1), "dense"
    )


def solve_certified(base: Dense, delta: LowRank, k: int, epsilon: float, generator: torch.Generator) -> Spectrum:
    """Block Krylov for the triplets, then bounds on the overlaps until each lies on one side of ε; else the dense solver."""
    scale = _scale(base, delta)
    if scale == 0 or k + 6 >= min(base.shape):
        return replace(solve_dense(base, delta, k, epsilon, generator), escalated=True)
    small_base, small = (base, delta) if scale == 1 else (Dense(base.matrix * scale), delta.scaled(scale))
    limit = max(round(BASIS_SHARE * min(base.shape)), min(BASIS_LEAST, *base.shape))
    found = krylov_triplets(Sum([small_base, small]), k, generator, base.matrix, limit)
    steps, products = found.steps, found.products
    if found.triplets is not None:
        triplets, error = found.triplets, found.triplets.angle_error_estimate
        process = OverlapProcess(small_base, triplets.U, generator)
        look = 4
        while True:
            while process.process.steps < look and not process.exhausted:
                process.step()
            bounds = process.bounds(epsilon)
            low, high = (bounds.low - error).clamp_min(0), (bounds.high + error).clamp_max(1)
            if bool(((low >= epsilon) | (high < epsilon)).all()):
                similarity = torch.where(low >= epsilon, bounds.low, bounds.high)
                return Spectrum(_unscaled(triplets, scale), similarity, low, high, "certified",
                                steps=steps + bounds.steps, products=products + bounds.products, cutoff=bounds.cutoff)  # fmt: skip
            if process.exhausted or process.process.P.shape[1] > limit:
                steps, products = steps + bounds.steps, products + bounds.products
                break
            look += 2 if look < 16 else look // 4
    return replace(solve_dense(base, delta, k, epsilon, generator), escalated=True, steps=steps, products=products)


def _scale(base: Dense, delta: LowRank) -> float:
    """A power of two that brings the sum's entries into a range where squares neither overflow nor vanish; 1 as a rule."""
    largest = max(
        map(abs, torch.stack(torch.aminmax(base.matrix)).tolist())
    )  # no copy of the matrix, as abs() would make
    if not 0 < largest < math.inf:
        return 0.0
    largest += float(delta.L.abs().max()) * float(delta.R.abs().max())
    return 1.0 if 1e-6 < largest < 1e6 else 2.0 ** -round(math.log2(largest))


def _unscaled(t: Triplets, scale: float) -> Triplets:
    return t if scale == 1 else replace(t, S=t.S / scale, residuals=t.residuals / scale, gaps=t.gaps / scale)


def cheaper(shape: tuple[int, int], k: int) -> str:
    """The solver that costs less. Measured by `tools/bench_detect.py`: the two are level near a short side of 640."""
    return "certified" if min(shape) >= 640 and k <= min(shape) // 40 else "dense"


SOLVERS: dict[str, Solver] = {"certified": solve_certified, "dense": solve_dense}
"""Solvers by name: base, delta, k, ε, source of randomness → `Spectrum`."""
