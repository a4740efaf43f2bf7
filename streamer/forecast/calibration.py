"""Time the steps of a run on this machine: each is done once, on a small share of the work, and nothing is written.

A pace is seconds for a unit of work. Disks are not measured: of what is read the second reading counts.
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
"""Units of `detection.cost.cost` of a matrix that the dense solver is timed on, at most."""

CERTIFIED_VALUES = 1 << 21
"""Values of a matrix that the certified solver is timed on, at most: 0.1 s on two cores."""

SAMPLE_BYTES = 16 << 20
"""Bytes of an output tensor that are made, at most, to time it."""

TOP = 64
"""Directions above the bulk of a matrix that is timed, as in `tools/bench_detect.py`."""

DELTA = 0.5
"""The largest singular value of a delta that is timed; the base's is 1."""

RUNS = 3
"""Runs of which the fastest counts: on a machine with other work one alone says little."""

ROUNDS, STEPS = 5, 10
"""Turns of each number of threads, and steps in a turn: 0.1 s in all on two idle cores."""

SECONDS = 0.4
"""No further run begins after these."""


def detection_pace(shape: tuple[int, int], k: int, rank: int | None, solver: str, blocks: bool = False) -> float:
    """Measure the seconds for a unit of `detection.cost.cost`, from a generated matrix of this form, smaller where that is large.

    Parameters
    ----------
    rank
        That of the delta; None for a dense one.
    solver
        The one that is meant to run, not ``auto``.
    blocks
        Whether the matrix is multiplied as it is stored.
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

    # Where other work wants the processors, threads wait for one another after each small step, and this matrix has smaller ones than
    # the run: it took 20 times as long then as on one thread.
    seconds = fastest(solve)
    with threads():
        seconds = min(seconds, fastest(solve))
    return seconds / cost((m, n), k, solver)


def _smaller(shape: tuple[int, int], solver: str) -> tuple[int, int]:
    """Scale a shape down to one that takes a fraction of a second."""
    (m, n), whole = shape, max(1, cost(shape, 1, solver))
    factor = (DENSE_COST / whole) ** (1 / 3) if solver == "dense" else (CERTIFIED_VALUES / max(1, m * n)) ** 0.5
    return (m, n) if factor >= 1 else (max(1, round(m * factor)), max(1, round(n * factor)))


def decoding_pace(weight: Weight) -> float:
    """Measure the seconds for a value that is brought from where it is stored to the computing dtype."""
    m, n = weight.matrix
    rows = max(1, min(m, DECODED_BYTES // max(1, n * weight.compute.itemsize)))
    source = weight.at_hand()
    out = torch.empty((rows, n), dtype=weight.compute)
    source.rows(0, rows)  # read by now
    return fastest(lambda: out.copy_(source.rows(0, rows))) / max(1, rows * n)


def factor_pace(shape: tuple[int, int], rank: int) -> float:
    """Measure the seconds for a unit of `factor_cost`, from the norm of a generated delta in factors; on one thread, as mitigation has."""
    (m, n), r = shape, max(1, rank)
    g = torch.Generator().manual_seed(0)
    delta = LowRank(
        torch.randn(m, r, generator=g, dtype=torch.float64), torch.randn(n, r, generator=g, dtype=torch.float64)
    )
    with threads():
        return fastest(delta.norm) / factor_cost(shape, r)


def factor_cost(shape: tuple[int, int], rank: int) -> int:
    """Estimate the units of work of the thin QRs of both factors of a delta."""
    return (sum(shape) + 1000) * rank * (rank + 8)


def writing_pace(recipe: Recipe, mitigated: Mitigated) -> float:
    """Measure the seconds for a byte of a tensor that is made by this recipe, hashed and written, as far as the processors go.

    A writer and a hasher work beside the maker, so that the slowest sets the pace, or all three where there are fewer processors.
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
    """Write into memory of the system's, as into its cache of a file."""
    with memory_file() as f:
        f.write(data)


def threads_pace(count: int) -> float:
    """Time what detection does again and again, products with a block and its orthogonalisation, on so many threads: in times of one alone.

    The two take turns, and their sums count: what matters is how long they wait for a core.
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
