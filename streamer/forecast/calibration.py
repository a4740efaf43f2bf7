"""Time the steps of a run on this machine: each step runs on a small part of the work, and nothing is written.

A pace is in seconds per unit of work. Disks are not measured: inputs are timed when they are read a second time.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable

import torch

from streamer.detection.cost import cost
from streamer.detection.intruders import detect
from streamer.detection.options import DetectionOptions
from streamer.forecast.cores import available_cores
from streamer.linalg.low_rank import LowRank
from streamer.linalg.operators import Delta, Dense, Matrix, RowBlocks
from streamer.linalg.torch_state import threads
from streamer.output.merged_tensors import Mitigated, Recipe
from streamer.storage.buffers import views
from streamer.storage.system import memory_file
from streamer.weights.base import DECODED_BYTES, Weight

DENSE_COST = 100_000_000
"""Largest matrix on which the dense solver is timed, in units of `detection.cost.cost`."""

CERTIFIED_VALUES = 1 << 21
"""Most values of a matrix on which the certified solver is timed: 0.1 s on two cores."""

SAMPLE_BYTES = 16 << 20
"""Most bytes of an output tensor that are made to time it."""

TOP = 64
"""Directions above the bulk of the timed matrix, as in `tools/bench_detect.py`."""

DELTA = 0.5
"""Largest singular value of the timed delta; the base's is 1."""

RUNS = 3
"""Number of runs, of which the fastest counts: a single run says little on a busy machine."""

ROUNDS, STEPS = 5, 10
"""Turns for each number of threads, and steps in a turn: 0.1 s in total on two idle cores."""

SECONDS = 0.4
"""Seconds after which no further run starts."""


def detection_pace(shape: tuple[int, int], k: int, rank: int | None, solver: str, blocks: bool = False) -> float:
    """Measure the seconds per unit of `detection.cost.cost` on a generated matrix of this shape, or a smaller one if it is large.

    Parameters
    ----------
    rank
        Rank of the delta; None for a dense one.
    solver
        The solver that is expected to run, not ``auto``.
    blocks
        Whether products use the stored matrix.
    """
    m, n = _smaller(shape, solver)
    share = min(1.0, min(m, n) / min(shape))
    k = max(1, min(k, round(k * share) if k > min(m, n) // 40 else k))
    g = torch.Generator().manual_seed(0)
    base = torch.randn(m, n, generator=g).mul_(0.5 * TOP**-0.7 / (m**0.5 + n**0.5))
    p = min(TOP, m, n)
    top = torch.randn(m, p, generator=g) * (torch.arange(1, p + 1).pow(-0.7) / (m * n) ** 0.5)
    base.addmm_(top, torch.randn(p, n, generator=g))
    r = max(1, min(rank or 8, m, n, round((rank or 8) * share) if (rank or 8) > min(m, n) // 40 else m))
    sizes = DELTA * torch.arange(1, r + 1).pow(-0.7)
    factors = LowRank(torch.randn(m, r, generator=g) * (sizes / m**0.5), torch.randn(n, r, generator=g) / n**0.5)
    delta: Delta = factors if rank is not None else Dense(factors.dense())
    matrix: Matrix = Dense(base)
    if blocks:
        stored = base.bfloat16()
        matrix = RowBlocks((m, n), lambda i, j: stored[i:j], torch.empty(0))
    options = DetectionOptions(k, 0.5, solver)

    def solve() -> None:
        detect(matrix, delta, options, name="probe", allow_dense=not blocks)

    # On a busy machine, threads wait for one another after each small step, and this matrix has smaller steps than the run: once it
    # took 20 times as long as on one thread.
    seconds = fastest(solve)
    with threads():
        seconds = min(seconds, fastest(solve))
    return seconds / cost((m, n), k, solver)


def _smaller(shape: tuple[int, int], solver: str) -> tuple[int, int]:
    """Scale a shape down so that timing it needs a fraction of a second."""
    (m, n), whole = shape, max(1, cost(shape, 1, solver))
    factor = (DENSE_COST / whole) ** (1 / 3) if solver == "dense" else (CERTIFIED_VALUES / max(1, m * n)) ** 0.5
    return (m, n) if factor >= 1 else (max(1, round(m * factor)), max(1, round(n * factor)))


def decoding_pace(weight: Weight) -> float:
    """Measure the seconds per value for conversion from the stored form to the computing dtype."""
    m, n = weight.matrix
    rows = max(1, min(m, DECODED_BYTES // max(1, n * weight.compute.itemsize)))
    source = weight.at_hand()
    out = torch.empty((rows, n), dtype=weight.compute)
    source.rows(0, rows)  # so that the data is in the page cache
    return fastest(lambda: out.copy_(source.rows(0, rows))) / max(1, rows * n)


def factor_pace(shape: tuple[int, int], rank: int) -> float:
    """Measure the seconds per unit of `factor_cost`, from the norm of a generated delta in factors, on one thread as in mitigation."""
    (m, n), r = shape, max(1, rank)
    g = torch.Generator().manual_seed(0)
    delta = LowRank(
        torch.randn(m, r, generator=g, dtype=torch.float64), torch.randn(n, r, generator=g, dtype=torch.float64)
    )
    with threads():
        return fastest(delta.norm) / factor_cost(shape, r)


def factor_cost(shape: tuple[int, int], rank: int) -> int:
    """Estimate the units of work for the thin QRs of a delta's two factors."""
    return (sum(shape) + 1000) * rank * (rank + 8)


def writing_pace(recipe: Recipe, mitigated: Mitigated) -> float:
    """Measure the seconds per byte to make a tensor by this recipe, hash it and write it, as limited by the processors.

    A writer and a hasher work beside the maker, so the slowest sets the pace, or the sum of the three if there are fewer processors.
    """
    count, last = 0, b""

    def make() -> None:
        nonlocal count, last
        count = 0
        for view in views(recipe.pieces(mitigated)):
            count, last = count + len(view), bytes(view) if count == 0 else last
            if count >= SAMPLE_BYTES:
                break

    with threads():
        making = fastest(make) / max(1, count)
    beside = [fastest(stage) / max(1, len(last)) for stage in (lambda: hashlib.sha256(last), lambda: _write(last))]
    stages = [making, *beside]
    return max(*stages, sum(stages) / available_cores())


def _write(data: bytes) -> None:
    """Write into memory, as into the system's cache of a file."""
    with memory_file() as f:
        f.write(data)


def threads_pace(count: int) -> float:
    """Time detection's typical step, products with a block and its orthogonalisation, on `count` threads, relative to one thread.

    The two take turns, and their sums count, because the time waiting for a core matters.
    """
    g = torch.Generator().manual_seed(0)
    W, block = torch.randn(1024, 1024, generator=g), torch.randn(1024, 16, generator=g)
    seconds = {1: 0.0, count: 0.0}
    for number in (1, count) * ROUNDS:
        with threads(number):
            began = time.perf_counter()
            for _ in range(STEPS):
                torch.linalg.qr(W.T @ (W @ block))
            seconds[number] += time.perf_counter() - began
    return seconds[count] / seconds[1]


def fastest(job: Callable[[], object]) -> float:
    """Measure the seconds of the fastest of a few runs."""
    began, best = time.perf_counter(), math.inf
    for _ in range(RUNS):
        start = time.perf_counter()
        job()
        now = time.perf_counter()
        best = min(best, now - start)
        if now - began > SECONDS:
            break
    return best
