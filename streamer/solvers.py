"""Solvers: base and delta → the leading triplets of their sum, and an interval for each similarity.

`SOLVERS` is the seam: a new solver is a new entry. ``certified`` multiplies and never decomposes; what it cannot settle within a
cost limit goes to ``dense``, and the answer says so. ``auto`` takes the cheaper one (`cheaper`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from streamer.linalg.operators import Dense, LowRank, Sum
from streamer.linalg.overlaps import OverlapProcess, dense_overlaps
from streamer.linalg.svd import DEGENERATE, Triplets, dense_triplets, krylov_triplets


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

MatrixOrFactors = TypeVar("MatrixOrFactors", Dense, LowRank)
Solver = Callable[[Dense, LowRank, int, float, torch.Generator], Spectrum]


def solve_dense(base: Dense, delta: LowRank, k: int, epsilon: float, generator: torch.Generator) -> Spectrum:
    """LAPACK's full SVD of the sum and of the base."""
    scale, base_scale = _scales(base, delta)
    triplets = dense_triplets(Sum([_scaled(base, scale), _scaled(delta, scale)]), k)
    bounds, similarity = dense_overlaps(_scaled(base, base_scale), triplets.U, generator)
    error = triplets.angle_error_estimate
    low, high = (bounds.low - error).clamp_min(0), (bounds.high + error).clamp_max(1)
    return Spectrum(_unscaled(triplets, scale), similarity, low, high, "dense")


def solve_certified(base: Dense, delta: LowRank, k: int, epsilon: float, generator: torch.Generator) -> Spectrum:
    """Block Krylov for the triplets, then bounds on the overlaps until each lies on one side of ε; else the dense solver.

    A matrix with a direction that is degenerate goes to the dense solver at once: no bound on its overlaps would settle it.
    """
    scale, base_scale = _scales(base, delta)
    if base_scale == 0 or k + 6 >= min(base.shape):
        return replace(solve_dense(base, delta, k, epsilon, generator), escalated=True)
    limit = max(round(BASIS_SHARE * min(base.shape)), min(BASIS_LEAST, *base.shape))
    small_base = _scaled(base, scale)
    found = krylov_triplets(Sum([small_base, _scaled(delta, scale)]), k, generator, base.matrix, limit)
    steps, products = found.steps, found.products
    if found.triplets is not None and float(found.triplets.angle_error_estimate.max()) <= DEGENERATE:
        triplets, error = found.triplets, found.triplets.angle_error_estimate
        small_base = small_base if scale == base_scale else _scaled(base, base_scale)
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
            if process.exhausted or process.hopeless or process.process.P.shape[1] > limit:
                steps, products = steps + bounds.steps, products + bounds.products
                break
            look += 2 if look < 16 else look // 4
    return replace(solve_dense(base, delta, k, epsilon, generator), escalated=True, steps=steps, products=products)


def _scales(base: Dense, delta: LowRank) -> tuple[float, float]:
    """Powers of two that bring the entries of the sum, and of the base alone, to where squares neither overflow nor vanish.

    They are 1 as a rule. A base far smaller than the delta needs its own: its singular vectors are judged alone. For a zero
    base the second is 0.
    """
    # No copy of the matrix, as abs() would make.
    largest = max(map(abs, torch.stack(torch.aminmax(base.matrix)).tolist()))
    total = largest + float(delta.L.abs().max()) * float(delta.R.abs().max())
    return _power(total, base.matrix.dtype) or 1.0, _power(largest, base.matrix.dtype)


def _power(largest: float, dtype: torch.dtype) -> float:
    """The power of two near ``1/largest``, or 1 where that is near enough to 1; 0 for 0."""
    if largest == 0:
        return 0.0
    if 1e-6 < largest < 1e6:
        return 1.0
    # The power itself must not overflow, as it would for subnormals.
    limit = math.floor(math.log2(torch.finfo(dtype).max)) - 8
    return 2.0 ** max(-limit, min(limit, -round(math.log2(min(largest, 1e308)))))


def _scaled(M: MatrixOrFactors, scale: float) -> MatrixOrFactors:
    if scale in (0, 1):
        return M
    return M.scaled(scale) if isinstance(M, LowRank) else Dense(M.matrix * scale)


def _unscaled(t: Triplets, scale: float) -> Triplets:
    return t if scale == 1 else replace(t, S=t.S / scale, residuals=t.residuals / scale, gaps=t.gaps / scale)


def cheaper(shape: tuple[int, int], k: int) -> str:
    """The solver that costs less.

    Measured by `tools/bench_detect.py` (power spectrum, k = 10, one thread): dense costs 0.6 times as much as certified at 448x448,
    0.9 at 576x576, 1.3 at 640x640, 1.8 at 768x768, 1.0 at 2048x512, 1.5 at 2560x640, 5 at 640x2560.
    """
    return "certified" if min(shape) >= 640 and k <= min(shape) // 40 else "dense"


SOLVERS: dict[str, Solver] = {"certified": solve_certified, "dense": solve_dense}
"""Solvers by name: base, delta, k, ε, source of randomness → `Spectrum`."""
