"""Estimate the cost of the solvers: which one is cheaper, the time of a matrix, and the memory that each way through it takes."""

from __future__ import annotations

from collections.abc import Sequence

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


def working_bytes(shape: tuple[int, int], k: int, rank: int | None, itemsize: int) -> dict[str, int]:
    """Estimate from above the peak memory for one matrix in bytes, beyond the process itself, by each way that there is.

    ``dense`` allows for the full SVD of the sum, in the computing dtype of `itemsize` bytes; ``whole`` for a copy of the matrix;
    ``blocks`` for products with the matrix as it is stored. The last two are the certified solver's, which has a share of the matrix
    for its bases only, and so is not for all k. A `rank` of None stands for a dense delta: there are two matrices then, a third while
    the second is formed, and no way by blocks.
    """
    m, n = shape
    p = min(m, n)
    matrix = itemsize * m * n
    factors = _factor_bytes(shape, k, rank) if rank is not None else 2 * matrix
    # The sum, LAPACK's copy, both factors, and its workspace, beside the matrix.
    dense = 3 * matrix + itemsize * ((m + n) * p + 4 * p * p) + factors
    if k + OVERSAMPLING >= p:
        return {"dense": dense}

    def certified(way: str) -> int:
        held, passing = _process_bytes(shape, k, itemsize, way)
        return matrix_bytes(shape, itemsize, way) + held + passing + factors

    whole = certified("whole")
    ways = {"dense": max(dense, whole), "whole": whole}
    return ways if rank is None else ways | {"blocks": certified("blocks")}


def sharing_bytes(shape: tuple[int, int], k: int, ranks: Sequence[int], itemsize: int, way: str) -> int:
    """Estimate from above the peak memory of certified detections that share the products with one matrix, beyond the process itself.

    All hold their bases and factors; what a step takes besides, one has at a time. What the dense solver is left to comes after them.

    Parameters
    ----------
    ranks
        Those of the deltas.
    way
        As in `working_bytes`.
    """
    m, n = shape
    held, passing = _process_bytes(shape, k, itemsize, way)
    factors = [_factor_bytes(shape, k, rank) for rank in ranks]
    # What is asked for, side by side; the product, cut in pieces, whole, and each one's share.
    products = 4 * (m + n) * block_width(k, OVERSAMPLING) * len(ranks) * itemsize
    return (
        matrix_bytes(shape, itemsize, way) + len(ranks) * held + passing + sum(factors) // 2 + max(factors) + products
    )


def matrix_bytes(shape: tuple[int, int], itemsize: int, way: str) -> int:
    """Count the bytes of a matrix in the computing dtype, or of the rows of it that are at hand."""
    m, n = shape
    matrix = itemsize * m * n
    return 3 * min(matrix, BLOCK_BYTES) if way == "blocks" else matrix


def _factor_bytes(shape: tuple[int, int], k: int, rank: int) -> int:
    """Estimate the memory of a delta's factors: half of it in the computing dtype, for as long as detection takes, half for thin QRs."""
    m, n = shape
    return 8 * 6 * (m + n) * (rank + k)


def _process_bytes(shape: tuple[int, int], k: int, itemsize: int, way: str) -> tuple[int, int]:
    """Estimate the memory of the certified solver's processes: between two products, and what a step takes besides."""
    m, n = shape
    width = block_width(k, OVERSAMPLING)
    columns = min(m, n, max(bounds_columns(shape, k, way != "blocks"), triplets_columns(k))) + width
    proof = 20 * n * n if n < m and n <= PROVABLE else 0
    small = 4 * 8 * columns**2
    # The successor of a basis while it grows is the largest thing that passes.
    return (m + n) * columns * itemsize + small, max(m, n) * columns * itemsize + small + BOUNDS_BYTES + proof


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
