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

from streamer.linalg.christoffel import CHRISTOFFEL_BYTES
from streamer.linalg.golub_kahan import block_width
from streamer.linalg.operators import BLOCK_BYTES, Delta, Matrix, Sum
from streamer.linalg.overlap_bounds import PROVABLE, OverlapBounds, OverlapProcess, dense_overlaps
from streamer.linalg.svd import OVERSAMPLING, Triplets, dense_triplets, krylov_triplets


@dataclass(frozen=True)
class SolverResult:
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


BASIS = 256
"""Columns of the basis for the triplets before it restarts, unless four blocks are more. On flat spectra, where it matters, 128 to
2048 columns took 31 to 28 steps at 2048x2048 and 40 to 35 at 4096x4096, and 256 the least time."""

OPEN_COLUMNS = 512
"""Columns of the basis for the bounds where the matrix may not be formed: memory is short then."""

Solver = Callable[[Matrix, Delta, int, float, torch.Generator, bool], SolverResult]


def solve_dense(
    base: Matrix, delta: Delta, k: int, epsilon: float, generator: torch.Generator, allow_dense: bool = True
) -> SolverResult:
    """LAPACK's full SVD of the sum and of the base, formed in any case."""
    scale, base_scale = _scales(base, delta)
    triplets = dense_triplets(Sum(base.scaled(scale), delta.scaled(scale)), k)
    bounds, similarity = dense_overlaps(base.scaled(base_scale), triplets.U, generator)
    distance = triplets.distance_estimate
    low, high = (bounds.low - distance).clamp_min(0), (bounds.high + distance).clamp_max(1)
    return SolverResult(_unscaled(triplets, scale), similarity, low, high, "dense")


def solve_certified(
    base: Matrix, delta: Delta, k: int, epsilon: float, generator: torch.Generator, allow_dense: bool = True
) -> SolverResult:
    """Block Krylov for the triplets, then bounds on the overlaps until each lies on one side of ε; else the dense solver.

    A matrix with a direction that is degenerate goes to the dense solver at once: no bound on its overlaps would settle it. Where the
    matrix may not be formed, what is open stays open: the interval says so, and the similarity is its upper end, so that nothing is
    called an intruder that is not proven to be one.
    """
    scale, base_scale = _scales(base, delta)
    if k + OVERSAMPLING >= min(base.shape) or (base_scale == 0 and allow_dense):
        return replace(solve_dense(base, delta, k, epsilon, generator), escalated=True)
    columns = bounds_columns(base.shape, k, allow_dense)
    W = Sum(base.scaled(scale), delta.scaled(scale))
    most = max(16, 2 * columns // block_width(k, OVERSAMPLING))
    found = krylov_triplets(W, k, generator, base.like, triplets_columns(k), most)
    steps, products, triplets = found.steps, found.products, found.triplets
    distance = triplets.distance_estimate
    if not allow_dense or (found.converged and bool((distance < 2).all())):
        # A zero base has any singular vectors.
        bounds = OverlapBounds(torch.zeros_like(distance), torch.ones_like(distance), 0, 0, 0.0)
        if base_scale:
            process = OverlapProcess(base.scaled(base_scale), triplets.U, generator, distance)
            bounds = _settle(process, epsilon, columns)
        low, high = bounds.low, bounds.high
        steps, products = steps + bounds.steps, products + bounds.products
        if not allow_dense or bool(((low >= epsilon) | (high < epsilon)).all()):
            similarity = torch.where(low >= epsilon, low, high)
            return SolverResult(_unscaled(triplets, scale), similarity, low, high, "certified",
                            steps=steps, products=products, cutoff=bounds.cutoff)  # fmt: skip
    return replace(solve_dense(base, delta, k, epsilon, generator), escalated=True, steps=steps, products=products)


def _settle(process: OverlapProcess, epsilon: float, columns: int) -> OverlapBounds:
    """Step until every interval that can lies on one side of ε, or there is no hope."""
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
    """How many steps on the next look is worth its cost: at most half of those taken.

    The bound on a direction that is spread over the bulk falls like steps^-½ once the process has found what stands out of it: then
    1/reach² grows by as much each step.
    """
    (n0, reach0), (n1, reach1) = before, now
    grown = (reach1**-2 - reach0**-2) / (n1 - n0)
    return max(1, math.ceil(min((epsilon**-2 - reach1**-2) / grown if grown > 0 else 2, n1 / 2)))


def _scales(base: Matrix, delta: Delta) -> tuple[float, float]:
    """Powers of two that bring the entries of the sum, and of the base alone, to where squares neither overflow nor vanish.

    They are 1 as a rule. A base far smaller than the delta needs its own: its singular vectors are judged alone. For a zero
    base the second is 0.
    """
    # No copy of the matrix, as abs() would make.
    largest = max(abs(end) for piece in base.pieces() for end in torch.stack(torch.aminmax(piece)).tolist())
    total = largest + delta.largest_estimate()
    return _power(total, base.like.dtype) or 1.0, _power(largest, base.like.dtype)


def _power(largest: float, dtype: torch.dtype) -> float:
    """The power of two near ``1/largest``, or 1 where that is near enough to 1; 0 for 0."""
    if largest == 0:
        return 0.0
    if 1e-6 < largest < 1e6:
        return 1.0
    # The power itself must not overflow, as it would for subnormals.
    limit = math.floor(math.log2(torch.finfo(dtype).max)) - 8
    return 2.0 ** max(-limit, min(limit, -round(math.log2(min(largest, 1e308)))))


def _unscaled(t: Triplets, scale: float) -> Triplets:
    return t if scale == 1 else replace(t, S=t.S / scale, residuals=t.residuals / scale, gaps=t.gaps / scale)


def triplets_columns(k: int) -> int:
    """Columns at which the basis for the triplets restarts."""
    return max(BASIS, 4 * block_width(k, OVERSAMPLING))


def bounds_columns(shape: tuple[int, int], k: int, allow_dense: bool) -> int:
    """Columns at which the basis for the bounds is given up.

    With 0.45 of the short side the dense solver costs no more. Large matrices are given up earlier, so that the basis needs a sixth
    of the matrix' own memory at most; but not before 1024 columns, or 16 blocks.
    """
    m, n = shape
    width = block_width(k, OVERSAMPLING)
    most = max(1024, 16 * width, m * n // (6 * (m + n))) if allow_dense else max(OPEN_COLUMNS, 8 * width)
    return max(min(round(0.45 * min(m, n)), most), min(256, m, n))


def working_bytes(shape: tuple[int, int], k: int, rank: int | None, itemsize: int) -> dict[str, int]:
    """Peak memory for one matrix by each way that there is, an upper estimate in bytes, beyond the process itself.

    ``dense`` allows for the full SVD of the sum, in the computing dtype of `itemsize` bytes; ``whole`` for a copy of the matrix;
    ``blocks`` for products with the matrix as it is stored. The last two are the certified solver's, which has a share of the matrix
    for its bases only, and so is not for all k. A `rank` of None stands for a dense delta: there are two matrices then, a third while
    the second is formed, and no way by blocks.
    """
    m, n = shape
    p, width = min(m, n), block_width(k, OVERSAMPLING)
    matrix = itemsize * m * n
    factors = 8 * 6 * (m + n) * (rank + k) if rank is not None else 2 * matrix  # thin QRs in float64
    # The sum, LAPACK's copy, both factors, and its workspace, beside the matrix.
    dense = 3 * matrix + itemsize * ((m + n) * p + 4 * p * p) + factors
    if k + OVERSAMPLING >= p:
        return {"dense": dense}
    proof = 20 * n * n if n < m and n <= PROVABLE else 0

    def certified(allow_dense: bool) -> int:
        columns = min(p, max(bounds_columns(shape, k, allow_dense), triplets_columns(k))) + width
        bases = (m + n + max(m, n)) * columns * itemsize  # and the successor of one, while it grows
        return bases + 2 * CHRISTOFFEL_BYTES + 8 * columns**2 * 8 + proof + factors

    whole = matrix + certified(True)
    ways = {"dense": max(dense, whole), "whole": whole}
    return ways if rank is None else ways | {"blocks": 3 * min(matrix, BLOCK_BYTES) + certified(False)}


def cheaper(shape: tuple[int, int], k: int) -> str:
    """The solver that costs less.

    Measured by `tools/bench_detect.py` (power spectrum, k = 10, one thread): dense costs 0.6 times as much as certified at 448x448,
    0.9 at 576x576, 1.3 at 640x640, 1.8 at 768x768, 1.0 at 2048x512, 1.5 at 2560x640, 5 at 640x2560.
    """
    return "certified" if min(shape) >= 640 and k <= min(shape) // 40 else "dense"


def cost(shape: tuple[int, int], k: int, solver: str = "auto") -> int:
    """What a matrix costs: about the nanoseconds on two cores, so that what is left of a run can be told from what is done.

    Fitted to the job of `tools/bench_detect.py --dtype bf16` (power spectrum, k = 10; Intel Xeon), upcast and decisions. Certified
    seconds, measured and by this formula: 0.07 and 0.07 at 640x640, 0.20 and 0.20 at 1024x8192, 0.38 and 0.34 at 4096x4096, 1.06 and
    1.01 at 14336x4096, 1.35 and 1.14 at 8192x8192, 3.54 and 3.83 at 8192x28672, 0.14 and 0.14 at 2048x768, 0.53 and 0.54 at 4096x2048,
    within a third at 15 others. The last two are tall and narrow enough for the proof of full rank. Dense: 0.31 and 0.27 at 512x2048,
    within a factor of two up to 8192x8192. The number of steps depends on the spectrum, and is taken to be the same.
    """
    m, n = shape
    if (cheaper(shape, k) if solver == "auto" else solver) == "dense":
        return 1_000_000 + m * n * min(m, n) // 2
    proof = 80 * n * n if n < m and n <= PROVABLE else 0
    return 67_000_000 + block_width(k, OVERSAMPLING) * m * n + proof


SOLVERS: dict[str, Solver] = {"certified": solve_certified, "dense": solve_dense}
"""Solvers by name: base, delta, k, ε, source of randomness, whether the base may be formed for the dense one → `SolverResult`."""
