"""Estimate the cost of the solvers: which one is cheaper, the time of a matrix, and the memory that each way through it takes."""

from __future__ import annotations

from enum import Enum

from streamer.linalg.golub_kahan import block_width
from streamer.linalg.operators import BLOCK_BYTES
from streamer.linalg.overlap_bounds import PROVABLE
from streamer.linalg.svd import OVERSAMPLING

BOUNDS_BYTES = 64 << 20
"""Memory that evaluating bounds takes, and that the allocator keeps of it: with 8 MB, four detections took 2 % more than estimated."""

BASIS = 256
"""Columns of the basis for the triplets before it restarts, unless four blocks are more; measured in docs/benchmarks.md."""

OPEN_COLUMNS = 512
"""Columns of the basis for the bounds where memory does not allow the matrix to be formed."""


class Way(Enum):
    """A way through a matrix, by the memory that it takes, the most first."""

    DENSE = "dense"
    """There is room for the full SVDs of the dense solver, whichever solver runs."""
    WHOLE = "whole"
    """The certified solver only, with a copy of the matrix in the computing dtype."""
    BLOCKS = "blocks"
    """The certified solver only, by products with the matrix as it is stored, a few rows at a time."""

    @property
    def allows_dense(self) -> bool:
        """Whether the dense solver is allowed."""
        return self is Way.DENSE


def triplets_columns(k: int) -> int:
    """Count the columns at which the basis for the triplets restarts."""
    return max(BASIS, 4 * block_width(k, OVERSAMPLING))


def bounds_columns(shape: tuple[int, int], k: int, allow_dense: bool) -> int:
    """Count the columns of the basis for the bounds at which the certified solver gives up.

    With 0.45 of the short side the dense solver costs no more. Large matrices are given up earlier, so that the basis needs a sixth
    of the matrix' own memory at most; but not before 1024 columns, or 16 blocks.
    """
    m, n = shape
    width = block_width(k, OVERSAMPLING)
    most = max(1024, 16 * width, m * n // (6 * (m + n))) if allow_dense else max(OPEN_COLUMNS, 8 * width)
    return max(min(round(0.45 * min(m, n)), most), min(256, m, n))


def working_bytes(shape: tuple[int, int], k: int, rank: int | None, itemsize: int) -> dict[Way, int]:
    """Estimate from above the peak memory for one matrix in bytes, beyond the process itself, by each way that there is, in order.

    Values have `itemsize` bytes. The certified solver has a share of the matrix for its bases only, and so is not for all k. A `rank` of
    None means a dense delta: there are two matrices then, a third while the second is formed, and no way by blocks.
    """
    m, n = shape
    p = min(m, n)
    matrix = itemsize * m * n
    factors = 8 * 6 * (m + n) * (rank + k) if rank is not None else 2 * matrix  # thin QRs in float64
    # The sum, LAPACK's copy, both factors, and its workspace, beside the matrix.
    dense = 3 * matrix + itemsize * ((m + n) * p + 4 * p * p) + factors
    if k + OVERSAMPLING >= p:
        return {Way.DENSE: dense}

    proof = 20 * n * n if n < m and n <= PROVABLE else 0

    def certified(allow_dense: bool) -> int:
        columns = min(p, max(bounds_columns(shape, k, allow_dense), triplets_columns(k))) + block_width(k, OVERSAMPLING)
        bases = (m + n + max(m, n)) * columns * itemsize  # and the successor of one, while it grows
        return bases + BOUNDS_BYTES + 8 * columns**2 * 8 + proof + factors

    whole = matrix + certified(True)
    ways = {Way.DENSE: max(dense, whole), Way.WHOLE: whole}
    return ways if rank is None else ways | {Way.BLOCKS: 3 * min(matrix, BLOCK_BYTES) + certified(False)}


def cheaper(shape: tuple[int, int], k: int) -> str:
    """Choose the solver that costs less, by the measurements in docs/benchmarks.md."""
    return "certified" if min(shape) >= 640 and k <= min(shape) // 40 else "dense"


def chosen_solver(shape: tuple[int, int], k: int, solver: str, allow_dense: bool) -> str:
    """Choose the solver that runs first: the one asked for, or the cheaper one, which is the certified one where there is no other."""
    if solver == "auto":
        solver = cheaper(shape, k) if allow_dense else "certified"
    return solver


def cost(shape: tuple[int, int], k: int, solver: str = "auto") -> int:
    """Estimate the cost of a matrix, about nanoseconds on two cores, so that the rest of a run can be told from what is done.

    Fitted to the measurements in docs/benchmarks.md: upcast from bf16 and decisions, for a power spectrum. The number of steps depends on
    the spectrum, and is taken to be the same.
    """
    m, n = shape
    if chosen_solver(shape, k, solver, allow_dense=True) == "dense":
        return 1_000_000 + m * n * min(m, n) // 2
    proof = 80 * n * n if n < m and n <= PROVABLE else 0
    return 67_000_000 + block_width(k, OVERSAMPLING) * m * n + proof
