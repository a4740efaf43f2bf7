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

from streamer.linalg.operators import BLOCK_BYTES, LowRank, Matrix, Sum
from streamer.linalg.overlaps import OverlapBounds, OverlapProcess, dense_overlaps
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


BASIS = 256
"""Columns of the basis for the triplets before it restarts, unless four blocks are more. On flat spectra, where it matters, 128 to
2048 columns took 31 to 28 steps at 2048x2048 and 40 to 35 at 4096x4096, and 256 the least time."""

OPEN_COLUMNS = 512
"""Columns of the basis for the bounds where the matrix may not be formed: memory is short then."""

Solver = Callable[[Matrix, LowRank, int, float, torch.Generator, bool], Spectrum]


def solve_dense(
    base: Matrix, delta: LowRank, k: int, epsilon: float, generator: torch.Generator, may_form: bool = True
) -> Spectrum:
    """LAPACK's full SVD of the sum and of the base, formed in any case."""
    scale, base_scale = _scales(base, delta)
    triplets = dense_triplets(Sum([base.scaled(scale), delta.scaled(scale)]), k)
    bounds, similarity = dense_overlaps(base.scaled(base_scale), triplets.U, generator)
    error = triplets.angle_error_estimate
    low, high = (bounds.low - error).clamp_min(0), (bounds.high + error).clamp_max(1)
    return Spectrum(_unscaled(triplets, scale), similarity, low, high, "dense")


def solve_certified(
    base: Matrix, delta: LowRank, k: int, epsilon: float, generator: torch.Generator, may_form: bool = True
) -> Spectrum:
    """Block Krylov for the triplets, then bounds on the overlaps until each lies on one side of ε; else the dense solver.

    A matrix with a direction that is degenerate goes to the dense solver at once: no bound on its overlaps would settle it. Where the
    matrix may not be formed, what is open stays open: the interval says so, and the similarity is its upper end, so that nothing is
    called an intruder that is not proven to be one.
    """
    scale, base_scale = _scales(base, delta)
    if k + 6 >= min(base.shape) or (base_scale == 0 and may_form):
        return replace(solve_dense(base, delta, k, epsilon, generator), escalated=True)
    width, columns = block_width(k), bounds_columns(base.shape, k, may_form)
    W = Sum([base.scaled(scale), delta.scaled(scale)])
    found = krylov_triplets(W, k, generator, base.like, triplets_columns(k), max(16, 2 * columns // width))
    steps, products = found.steps, found.products
    triplets = found.triplets
    if triplets is not None:
        error = triplets.angle_error_estimate
        sound = error <= DEGENERATE
        if not may_form or (found.converged and bool(sound.all())):
            # A zero base has any singular vectors.
            bounds = OverlapBounds(torch.zeros_like(error), torch.ones_like(error), 0, 0, 0.0)
            if base_scale:
                bounds = _bounded(
                    OverlapProcess(base.scaled(base_scale), triplets.U, generator), epsilon, error, columns
                )
            low, high = (bounds.low - error).clamp_min(0), (bounds.high + error).clamp_max(1)
            steps, products = steps + bounds.steps, products + bounds.products
            if not may_form or bool(((low >= epsilon) | (high < epsilon)).all()):
                similarity = torch.where(low >= epsilon, bounds.low, bounds.high)
                return Spectrum(_unscaled(triplets, scale), similarity, low, high, "certified",
                                steps=steps, products=products, cutoff=bounds.cutoff)  # fmt: skip
    return replace(solve_dense(base, delta, k, epsilon, generator), escalated=True, steps=steps, products=products)


def _bounded(process: OverlapProcess, epsilon: float, error: Tensor, columns: int) -> OverlapBounds:
    """Step until every interval, widened by the vector's own error, lies on one side of ε, or there is no hope."""

    def settled(b: OverlapBounds) -> bool:
        return bool(((b.low - error >= epsilon) | (b.high + error < epsilon) | (error > DEGENERATE)).all())

    look, before = 4, (0, 1.0)
    while True:
        while process.process.steps < look and not process.exhausted:
            process.step()
        ended = process.exhausted or process.process.P.shape[1] > columns
        bounds = process.bounds(epsilon, final=ended)
        if not bounds.measured and (process.hopeless or settled(bounds)):
            bounds = process.bounds(epsilon, final=True)
        if ended or process.hopeless or settled(bounds):
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


def _scales(base: Matrix, delta: LowRank) -> tuple[float, float]:
    """Powers of two that bring the entries of the sum, and of the base alone, to where squares neither overflow nor vanish.

    They are 1 as a rule. A base far smaller than the delta needs its own: its singular vectors are judged alone. For a zero
    base the second is 0.
    """
    # No copy of the matrix, as abs() would make.
    largest = max(abs(end) for piece in base.pieces() for end in torch.stack(torch.aminmax(piece)).tolist())
    total = largest + float(delta.L.abs().max()) * float(delta.R.abs().max())
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


def block_width(k: int) -> int:
    """Columns of a block: k and at least 6 more, a multiple of 16."""
    return -(-(k + 6) // 16) * 16


def triplets_columns(k: int) -> int:
    """Columns at which the basis for the triplets restarts."""
    return max(BASIS, 4 * block_width(k))


def bounds_columns(shape: tuple[int, int], k: int, may_form: bool) -> int:
    """Columns at which the basis for the bounds is given up.

    With 0.45 of the short side the dense solver costs no more. Large matrices are given up earlier, so that the basis needs a quarter
    of the matrix' own memory at most; but not before 1024 columns, or 16 blocks.
    """
    m, n = shape
    most = max(1024, 16 * block_width(k), m * n // (4 * (m + n))) if may_form else max(OPEN_COLUMNS, 8 * block_width(k))
    return max(min(round(0.45 * min(m, n)), most), min(256, m, n))


def working_bytes(shape: tuple[int, int], k: int, rank: int, itemsize: int) -> dict[str, int]:
    """Peak memory for one matrix by each way, an upper estimate in bytes, beyond the process itself.

    ``blocks`` multiplies from the matrix as it is stored; ``whole`` makes one copy of it in the computing dtype, of `itemsize` bytes;
    ``dense`` is the full SVD of that.
    """
    m, n = shape
    p = min(m, n)
    # A basis and its successor, of one side, at a time; thin QR of the factors, in float64, and the products' temporaries.
    basis = [
        itemsize * (m + n + max(m, n)) * max(bounds_columns(shape, k, form), triplets_columns(k) + block_width(k))
        for form in (False, True)
    ]
    factors = 8 * 6 * (m + n) * (rank + k)
    whole = itemsize * m * n
    return {
        "blocks": 3 * BLOCK_BYTES + basis[0] + factors,
        "whole": BLOCK_BYTES + whole + basis[1] + factors,
        # The sum, LAPACK's copy, both factors, and its workspace.
        "dense": 3 * whole + itemsize * ((m + n) * p + 4 * p * p) + factors,
    }


def cheaper(shape: tuple[int, int], k: int) -> str:
    """The solver that costs less.

    Measured by `tools/bench_detect.py` (power spectrum, k = 10, one thread): dense costs 0.6 times as much as certified at 448x448,
    0.9 at 576x576, 1.3 at 640x640, 1.8 at 768x768, 1.0 at 2048x512, 1.5 at 2560x640, 5 at 640x2560.
    """
    return "certified" if min(shape) >= 640 and k <= min(shape) // 40 else "dense"


SOLVERS: dict[str, Solver] = {"certified": solve_certified, "dense": solve_dense}
"""Solvers by name: base, delta, k, ε, source of randomness, whether the base may be formed for the dense one → `Spectrum`."""
