"""Estimate the solvers' cost: which one is cheaper, a matrix's time, and the memory that each way of computing it needs."""

from __future__ import annotations

from enum import Enum

from streamer.linalg.golub_kahan import block_width
from streamer.linalg.operators import BLOCK_BYTES
from streamer.linalg.overlap_bounds import PROVABLE
from streamer.linalg.svd import OVERSAMPLING

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

    @property
    def allows_dense(self) -> bool:
        """Return whether the dense solver is allowed."""
        return self is Way.DENSE


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
    most = max(1024, 16 * width, m * n // (6 * (m + n))) if allow_dense else max(OPEN_COLUMNS, 8 * width)
    return max(min(round(0.45 * min(m, n)), most), min(256, m, n))


def working_bytes(shape: tuple[int, int], k: int, rank: int | None, itemsize: int) -> dict[Way, int]:
    """Estimate an upper bound of the peak memory for one matrix, in bytes, without the process itself, for each possible way in order.

    Values have `itemsize` bytes. The certified solver's bases may be a limited part of the matrix only, so it does not support every k. A
    `rank` of None means a dense delta: then there are two matrices, a third while the second is formed, and no way by blocks.
    """
    m, n = shape
    p = min(m, n)
    matrix = itemsize * m * n
    factors = 8 * 6 * (m + n) * (rank + k) if rank is not None else 2 * matrix  # thin QRs in float64
    # The sum, LAPACK's copy, both factors and its workspace, in addition to the matrix.
    dense = 3 * matrix + itemsize * ((m + n) * p + 4 * p * p) + factors
    if k + OVERSAMPLING >= p:
        return {Way.DENSE: dense}

    proof = 20 * n * n if n < m and n <= PROVABLE else 0

    def certified(allow_dense: bool) -> int:
        columns = min(p, max(bounds_columns(shape, k, allow_dense), triplets_columns(k))) + block_width(k, OVERSAMPLING)
        bases = (m + n + max(m, n)) * columns * itemsize  # including the copy of a basis that grows
        return bases + BOUNDS_BYTES + 8 * columns**2 * 8 + proof + factors

    whole = matrix + certified(True)
    ways = {Way.DENSE: max(dense, whole), Way.WHOLE: whole}
    return ways if rank is None else ways | {Way.BLOCKS: 3 * min(matrix, BLOCK_BYTES) + certified(False)}


def cheaper(shape: tuple[int, int], k: int) -> str:
    """Choose the cheaper solver, by the measurements in docs/benchmarks.md."""
    return "certified" if min(shape) >= 640 and k <= min(shape) // 40 else "dense"


def chosen_solver(shape: tuple[int, int], k: int, solver: str, allow_dense: bool) -> str:
    """Choose the solver that runs first: the requested one, or the cheaper one; without `allow_dense` that is the certified one."""
    if solver == "auto":
        solver = cheaper(shape, k) if allow_dense else "certified"
    return solver


def cost(shape: tuple[int, int], k: int, solver: str = "auto") -> int:
    """Estimate the cost of a matrix in units of about a nanosecond on two cores, used to predict the rest of a run.

    The formula is fitted to the measurements in docs/benchmarks.md: upcast from bf16 and decisions, for a power spectrum. The number of
    steps depends on the spectrum; the formula assumes the same number for every matrix.
    """
    m, n = shape
    if chosen_solver(shape, k, solver, allow_dense=True) == "dense":
        return 1_000_000 + m * n * min(m, n) // 2
    proof = 100 * n * n if n < m and n <= PROVABLE else 0
    return 125_000_000 + block_width(k, OVERSAMPLING) * m * n * 5 // 4 + proof
