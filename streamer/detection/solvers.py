"""Define the solvers: from base and delta to the leading triplets of their sum, and an interval for each similarity; estimate their cost.

A new solver is a new entry in `SOLVERS`. ``certified`` uses only products, no decompositions; matrices that it cannot settle within a cost
limit go to ``dense``, and the result says so. ``auto`` chooses the cheaper one (`cheaper`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from streamer.linalg.operators import BLOCK_BYTES, Delta, Matrix, Sum
from streamer.linalg.overlap_bounds import PROVABLE, OverlapBounds, OverlapProcess, dense_overlaps
from streamer.linalg.svd import OVERSAMPLING, Triplets, block_width, dense_triplets, krylov_triplets

BOUNDS_BYTES = 64 << 20
"""Memory used to evaluate bounds, or kept by the allocator afterwards: with 8 MB, four detections took 2 % more than estimated."""

BASIS = 256
"""Columns of the basis for the triplets before it restarts, unless four blocks are more; measured in docs/benchmarks.md."""

OPEN_COLUMNS = 512
"""Columns of the basis for the bounds if memory does not allow the matrix to be formed."""


class Way(Enum):
    """A way to compute with a matrix; the way that needs most memory comes first."""

    DENSE = "dense"
    """There is memory for the dense solver's full SVDs, whichever solver runs."""
    WHOLE = "whole"
    """Only the certified solver, with a copy of the matrix in the computing dtype."""
    BLOCKS = "blocks"
    """Only the certified solver, by products with the stored matrix, a few rows at a time."""


def triplets_columns(k: int) -> int:
    """Return the number of columns at which the basis for the triplets restarts."""
    return max(BASIS, 4 * block_width(k, OVERSAMPLING))


def bounds_columns(shape: tuple[int, int], k: int, allow_dense: bool) -> int:
    """Return the number of columns of the basis for the bounds at which the certified solver gives up.

    At 0.45 of the short side the dense solver costs no more. For large matrices the limit is lower, so that the basis needs at most a sixth
    of the matrix's own memory, but at least 1024 columns or 16 blocks.
    """
    m, n = shape
    width = block_width(k, OVERSAMPLING)
    if allow_dense:
        most = max(1024, 16 * width, m * n // (6 * (m + n)))
    else:
        most = max(OPEN_COLUMNS, 8 * width)
    return max(min(round(0.45 * min(m, n)), most), min(256, m, n))


def working_bytes(
    shape: tuple[int, int], k: int, rank: int | None, itemsize: int
) -> dict[Way, int]:
    """Estimate an upper bound of the peak memory for one matrix, in bytes, without the process itself, for each possible way in order.

    Values have `itemsize` bytes. The certified solver's bases may be a limited part of the matrix only, so it does not support every k. A
    `rank` of None means a dense delta: then there are two matrices, a third while the second is formed, and no way by blocks.
    """
    m, n = shape
    p = min(m, n)
    matrix = itemsize * m * n
    factors = (
        8 * 6 * (m + n) * (rank + k) if rank is not None else 2 * matrix
    )  # thin QRs in float64
    # The sum, LAPACK's copy, both factors and its workspace, in addition to the matrix.
    dense = 3 * matrix + itemsize * ((m + n) * p + 4 * p * p) + factors
    if k + OVERSAMPLING >= p:
        return {Way.DENSE: dense}

    proof = 20 * n * n if n < m and n <= PROVABLE else 0

    def certified(allow_dense: bool) -> int:
        columns = min(
            p, max(bounds_columns(shape, k, allow_dense), triplets_columns(k))
        ) + block_width(k, OVERSAMPLING)
        bases = (m + n + max(m, n)) * columns * itemsize  # including the copy of a basis that grows
        return bases + BOUNDS_BYTES + 8 * columns**2 * 8 + proof + factors

    whole_bytes = matrix + certified(True)
    ways = {Way.DENSE: max(dense, whole_bytes), Way.WHOLE: whole_bytes}
    if rank is None:
        return ways
    return ways | {Way.BLOCKS: 3 * min(matrix, BLOCK_BYTES) + certified(False)}


def cheaper(shape: tuple[int, int], k: int) -> str:
    """Choose the cheaper solver, by the measurements in tools/bench_detect.py."""
    return "certified" if min(shape) >= 640 and k <= min(shape) // 40 else "dense"


def chosen_solver(shape: tuple[int, int], k: int, solver: str, allow_dense: bool) -> str:
    """Choose the solver that runs first: the requested one, or the cheaper one; without `allow_dense` that is the certified one."""
    if solver != "auto":
        return solver
    return cheaper(shape, k) if allow_dense else "certified"


def cost(shape: tuple[int, int], k: int, solver: str = "auto") -> int:
    """Estimate the cost of a matrix in units of about a nanosecond on two cores, used to predict the rest of a run.

    The formula is fitted to the measurements in tools/bench_detect.py: upcast from bf16 and decisions, for a power spectrum. The number of
    steps depends on the spectrum; the formula assumes the same number for every matrix.
    """
    m, n = shape
    if chosen_solver(shape, k, solver, allow_dense=True) == "dense":
        return 1_000_000 + m * n * min(m, n) // 2
    proof = 100 * n * n if n < m and n <= PROVABLE else 0
    return 125_000_000 + block_width(k, OVERSAMPLING) * m * n * 5 // 4 + proof


@dataclass(frozen=True)
class SolverResult:
    """Triplets and similarities from a solver; attributes not described here are as in `Detection`.

    Attributes
    ----------
    triplets
        The k leading triplets of base + delta.
    similarity
        (k,) float64: the best estimate.
    bounds
        Intervals around it that hold for the true singular vectors, widened by the angle error of the triplets; their cost includes the
        triplets', and their values are the base's, never above the true ones.
    limited
        Whether the intervals are wide because the process stopped early; higher precision would not narrow them.
    """

    triplets: Triplets
    similarity: Tensor
    bounds: OverlapBounds
    solver: str
    escalated: bool = False
    limited: bool = False


Solver = Callable[[Matrix, Delta, int, float, torch.Generator, bool], SolverResult]


def solve_dense(
    W0: Matrix,
    delta: Delta,
    k: int,
    epsilon: float,
    generator: torch.Generator,
    allow_dense: bool = True,
) -> SolverResult:
    """Decide by LAPACK's full SVDs of the sum and the base, which are always formed."""
    power, base_power = _powers(W0, delta)
    triplets = dense_triplets(Sum(W0.scaled(power), delta.scaled(power)), k)
    bounds, similarity = dense_overlaps(W0.scaled(base_power), triplets.U, generator)
    distance = triplets.distance_estimate
    low = (bounds.low - distance).clamp_min(0)
    high = (bounds.high + distance).clamp_max(1)
    bounds = replace(bounds, low=low, high=high, values=bounds.values / (base_power or 1.0))
    return SolverResult(_unscaled(triplets, power), similarity, bounds, "dense")


def solve_certified(
    W0: Matrix,
    delta: Delta,
    k: int,
    epsilon: float,
    generator: torch.Generator,
    allow_dense: bool = True,
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
    krylov = krylov_triplets(W, k, generator, W0.like, triplets_columns(k), most)
    steps = krylov.steps
    products = krylov.products
    triplets = krylov.triplets
    distance = triplets.distance_estimate
    if not allow_dense or (krylov.converged and bool((distance < 2).all())):
        # Any vectors are singular vectors of a zero base.
        unknown = torch.zeros_like(distance)
        process = None
        bounds = OverlapBounds(unknown, torch.ones_like(distance), 0, 0, 0.0, unknown)
        if base_power:
            process = OverlapProcess(W0.scaled(base_power), triplets.U, generator, distance)
            bounds = _settle(process, epsilon, columns)
        low = bounds.low
        high = bounds.high
        steps += bounds.steps
        products += bounds.products
        settled = bool(((low >= epsilon) | (high < epsilon)).all())
        if not allow_dense or settled:
            similarity = torch.where(low >= epsilon, low, high)
            exact = settled or (
                krylov.converged
                and process is not None
                and process.settles_without_rounding(epsilon)
            )
            bounds = replace(
                bounds, steps=steps, products=products, values=bounds.values / (base_power or 1.0)
            )
            return SolverResult(
                _unscaled(triplets, power), similarity, bounds, "certified", limited=not exact
            )
    dense = solve_dense(W0, delta, k, epsilon, generator)
    return replace(
        dense, escalated=True, bounds=replace(dense.bounds, steps=steps, products=products)
    )


def _settle(process: OverlapProcess, epsilon: float, columns: int) -> OverlapBounds:
    """Step until every interval that can settle lies on one side of ε, or the process is hopeless."""
    look = 4
    before = (0, 1.0)
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
        look = now[0] + _steps_to(epsilon, before, now)
        before = now


def _steps_to(epsilon: float, before: tuple[int, float], now: tuple[int, float]) -> int:
    """Choose the number of steps until the next check is worth its cost: at most half of the steps so far.

    The bound on a direction that is spread over the bulk falls like steps^-½ once the process has found the values outside the bulk: then
    1/reach² grows by the same amount at each step.
    """
    n0, reach0 = before
    n1, reach1 = now
    grown = (reach1**-2 - reach0**-2) / (n1 - n0)
    return max(1, math.ceil(min((epsilon**-2 - reach1**-2) / grown if grown > 0 else 2, n1 / 2)))


def _powers(W0: Matrix, delta: Delta) -> tuple[float, float]:
    """Choose powers of two that scale the entries of the sum, and of the base alone, so that squares neither overflow nor vanish.

    Usually they are 1. A base far smaller than the delta needs its own power, because its singular vectors are judged alone. For a zero
    base the second is 0.
    """
    # abs() would copy the matrix.
    largest = max(
        abs(end) for piece in W0.pieces() for end in torch.stack(torch.aminmax(piece)).tolist()
    )
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
    if power == 1:
        return t
    return replace(t, S=t.S / power, residuals=t.residuals / power, gaps=t.gaps / power)


SOLVERS: dict[str, Solver] = {"certified": solve_certified, "dense": solve_dense}
"""Solvers by name: base, delta, k, ε, random generator, whether the dense solver may form the base → `SolverResult`."""
