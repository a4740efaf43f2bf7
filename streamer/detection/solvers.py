"""Define the solvers: from base and delta to the leading triplets of their sum, and an interval for each similarity.

A new solver is a new entry in `SOLVERS`. ``certified`` uses only products, no decompositions; matrices that it cannot settle within a cost
limit go to ``dense``, and the result says so. ``auto`` chooses the cheaper one (`cost.cheaper`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamer.detection.cost import bounds_columns, triplets_columns
from streamer.linalg.golub_kahan import block_width
from streamer.linalg.operators import Delta, Matrix, Sum
from streamer.linalg.overlap_bounds import OverlapBounds, OverlapProcess, dense_overlaps
from streamer.linalg.svd import OVERSAMPLING, Triplets, dense_triplets, krylov_triplets


@dataclass(frozen=True)
class SolverResult:
    """Triplets and similarities from a solver; attributes not described here are as in `Detection`.

    Attributes
    ----------
    triplets
        The k leading triplets of base + delta.
    similarity, low, high
        (k,) float64: the best estimate, and an interval that holds for the true singular vectors, widened by the angle error
        of the triplets.
    base_values
        (k,) float64: the largest singular values of the base, never above the true ones; see `OverlapBounds.values`.
    limited
        Whether the intervals are wide because the process stopped early; higher precision would not narrow them.
    """

    triplets: Triplets
    similarity: Tensor
    low: Tensor
    high: Tensor
    base_values: Tensor
    solver: str
    escalated: bool = False
    steps: int = 0
    products: int = 0
    cutoff: float = 0.0
    limited: bool = False


Solver = Callable[[Matrix, Delta, int, float, torch.Generator, bool], SolverResult]


def solve_dense(
    W0: Matrix, delta: Delta, k: int, epsilon: float, generator: torch.Generator, allow_dense: bool = True
) -> SolverResult:
    """Decide by LAPACK's full SVDs of the sum and the base, which are always formed."""
    power, base_power = _powers(W0, delta)
    triplets = dense_triplets(Sum(W0.scaled(power), delta.scaled(power)), k)
    bounds, similarity = dense_overlaps(W0.scaled(base_power), triplets.U, generator)
    distance = triplets.distance_estimate
    low, high = (bounds.low - distance).clamp_min(0), (bounds.high + distance).clamp_max(1)
    return SolverResult(_unscaled(triplets, power), similarity, low, high, bounds.values / (base_power or 1.0), "dense")


def solve_certified(
    W0: Matrix, delta: Delta, k: int, epsilon: float, generator: torch.Generator, allow_dense: bool = True
) -> SolverResult:
    """Decide by block Krylov triplets, then by bounds on the overlaps until each lies on one side of ε; else by the dense solver.

    A matrix with a degenerate direction goes to the dense solver at once: no bound on its overlaps would settle it. If the matrix may not
    be formed, open directions stay open: the interval shows it, and the similarity is its upper end, so that only proven intruders count
    as intruders.
    """
    power, base_power = _powers(W0, delta)
    if k + OVERSAMPLING >= min(W0.shape) or (base_power == 0 and allow_dense):
        return replace(solve_dense(W0, delta, k, epsilon, generator), escalated=True)
    columns = bounds_columns(W0.shape, k, allow_dense)
    W = Sum(W0.scaled(power), delta.scaled(power))
    most = max(16, 2 * columns // block_width(k, OVERSAMPLING))
    found = krylov_triplets(W, k, generator, W0.like, triplets_columns(k), most)
    steps, products, triplets = found.steps, found.products, found.triplets
    distance = triplets.distance_estimate
    if not allow_dense or (found.converged and bool((distance < 2).all())):
        # Any vectors are singular vectors of a zero base.
        unknown, process = torch.zeros_like(distance), None
        bounds = OverlapBounds(unknown, torch.ones_like(distance), 0, 0, 0.0, unknown)
        if base_power:
            process = OverlapProcess(W0.scaled(base_power), triplets.U, generator, distance)
            bounds = _settle(process, epsilon, columns)
        low, high = bounds.low, bounds.high
        steps, products = steps + bounds.steps, products + bounds.products
        settled = bool(((low >= epsilon) | (high < epsilon)).all())
        if not allow_dense or settled:
            similarity = torch.where(low >= epsilon, low, high)
            exact = settled or (found.converged and process is not None and process.settles_without_rounding(epsilon))
            return SolverResult(_unscaled(triplets, power), similarity, low, high, bounds.values / (base_power or 1.0), "certified",
                                steps=steps, products=products, cutoff=bounds.cutoff, limited=not exact)  # fmt: skip
    return replace(solve_dense(W0, delta, k, epsilon, generator), escalated=True, steps=steps, products=products)


def _settle(process: OverlapProcess, epsilon: float, columns: int) -> OverlapBounds:
    """Step until every interval that can settle lies on one side of ε, or the process is hopeless."""
    look, before = 4, (0, 1.0)
    while True:
        while process.process.steps < look and not process.exhausted:
            process.step()
        ended = process.exhausted or process.process.P.shape[1] > columns
        bounds = process.bounds(epsilon, final=ended)
        if not bounds.measured and (process.hopeless or bounds.reach < epsilon):
            bounds = process.bounds(epsilon, final=True)
        if ended or process.hopeless or bounds.reach < epsilon:
            return bounds
        now = bounds.steps, bounds.reach
        look, before = now[0] + _steps_to(epsilon, before, now), now


def _steps_to(epsilon: float, before: tuple[int, float], now: tuple[int, float]) -> int:
    """Choose the number of steps until the next check is worth its cost: at most half of the steps so far.

    The bound on a direction that is spread over the bulk falls like steps^-½ once the process has found the values outside the bulk: then
    1/reach² grows by the same amount at each step.
    """
    (n0, reach0), (n1, reach1) = before, now
    grown = (reach1**-2 - reach0**-2) / (n1 - n0)
    return max(1, math.ceil(min((epsilon**-2 - reach1**-2) / grown if grown > 0 else 2, n1 / 2)))


def _sizes(W0: Matrix) -> list[float]:
    """List the magnitudes of extreme values piece by piece, without copying the matrix as abs() would."""
    return [abs(end) for piece in W0.pieces() for end in torch.stack(torch.aminmax(piece)).tolist()]


def _powers(W0: Matrix, delta: Delta) -> tuple[float, float]:
    """Choose powers of two that scale the entries of the sum, and of the base alone, so that squares neither overflow nor vanish.

    Usually they are 1. A base far smaller than the delta needs its own power, because its singular vectors are judged alone. For a zero
    base the second is 0.
    """
    largest = max(_sizes(W0))
    total = largest + delta.largest_estimate()
    return _power(total, W0.like.dtype) or 1.0, _power(largest, W0.like.dtype)


def _power(largest: float, dtype: torch.dtype) -> float:
    """Round ``1/largest`` to a power of two: 1 if it is near enough to 1, 0 for 0."""
    if largest == 0:
        return 0.0
    if 1e-6 < largest < 1e6:
        return 1.0
    # The power itself must not overflow, as it would for subnormal numbers.
    limit = math.floor(math.log2(torch.finfo(dtype).max)) - 8
    return 2.0 ** max(-limit, min(limit, -round(math.log2(min(largest, 1e308)))))


def _unscaled(t: Triplets, power: float) -> Triplets:
    return t if power == 1 else replace(t, S=t.S / power, residuals=t.residuals / power, gaps=t.gaps / power)


SOLVERS: dict[str, Solver] = {"certified": solve_certified, "dense": solve_dense}
"""Solvers by name: base, delta, k, ε, random generator, whether the dense solver may form the base → `SolverResult`."""
