"""Estimate the peak memory of detection for each matrix, and choose the way that fits a budget."""

from __future__ import annotations

from collections.abc import Iterator

from streamer.detection.cost import Way, working_bytes
from streamer.detection.options import DetectionOptions
from streamer.plan.memory_estimate import MemoryEstimate, factor_bytes
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.weights.base import Weight

DOUBLE_BYTES = 8
"""Bytes of a value in float64."""

MIXED_BYTES = 32 << 20
"""Memory that the allocator keeps between arrays of two dtypes: up to 18 MB over 160 matrices repeated in float64."""

REPEATED_CUBE = 4096**3
"""Largest m·n·min(m, n) for which full SVDs are repeated in float64; docs/benchmarks.md has the time."""


def detection_bytes(
    plan: Plan, target: Target, options: DetectionOptions, resident: int, itemsize: int | None = None
) -> dict[Way, int]:
    """Estimate the peak memory of detection in one matrix, for each way that the options allow; see `working_bytes`.

    Parameters
    ----------
    resident
        Bytes in memory between two steps; see `resident_bytes`.
    itemsize
        Bytes per value if the matrix is repeated in another dtype; by default it is computed once, in the weight's computing dtype.
    """
    weight, module = plan.weights[target.tensor], target.module
    resident += MIXED_BYTES if itemsize else 0
    itemsize = itemsize or weight.compute.itemsize
    rank = module.factor_rank if module.low_rank else None
    ways = working_bytes(module.shape, options.directions(module.shape), rank, itemsize)
    if options.solver == "dense":
        ways = {Way.DENSE: ways[Way.DENSE]}
    fixed, making = resident + factor_bytes(plan, target, itemsize), module.peak_bytes(itemsize)
    return {way: fixed + max(size, making) + _read_bytes(weight, way) for way, size in ways.items()}


def _read_bytes(weight: Weight, way: Way) -> int:
    """Return the memory of the stored bytes of a tensor and the next one."""
    return 2 * weight.load_bytes if way is not Way.BLOCKS or weight.quantized or weight.remote else 0


def kept_bytes(plan: Plan, target: Target, options: DetectionOptions) -> int:
    """Estimate the memory of a matrix's findings that are not written: the vectors, with every direction an intruder.

    An additional eighth covers gaps that the allocator keeps between them from earlier steps (5 % were measured).
    """
    m, n = target.module.shape
    return options.directions((m, n)) * (m + n) * plan.weights[target.tensor].compute.itemsize * 9 // 8


def best_way(plan: Plan, target: Target, options: DetectionOptions, resident: int) -> Way:
    """Choose the first way that fits the allowed memory."""
    if options.max_memory is None:
        return Way.DENSE
    ways = detection_bytes(plan, target, options, resident)
    return next(way for way, size in ways.items() if size <= options.max_memory)


def float64_way(
    plan: Plan, target: Target, options: DetectionOptions, resident: int, solver: str
) -> tuple[Way, int] | None:
    """Choose the way to repeat a matrix in float64, and its peak memory.

    Returns
    -------
    tuple or None
        The first of the solver's ways that fits the allowed memory. None if none fits, if the weight is already computed in float64,
        or for full SVDs of matrices beyond `is_repeated`.
    """
    if plan.weights[target.tensor].compute.itemsize == DOUBLE_BYTES:
        return None
    if solver == "dense" and not is_repeated(target.module.shape):
        return None
    ways = detection_bytes(plan, target, options, resident, DOUBLE_BYTES)
    allowed = options.max_memory
    fitting = (pair for pair in ways.items() if pair[0].allows_dense == (solver == "dense"))
    return next((pair for pair in fitting if allowed is None or pair[1] <= allowed), None)


def is_repeated(shape: tuple[int, int]) -> bool:
    """Test whether a matrix is small enough to repeat its full SVDs in float64."""
    m, n = shape
    return m * n * min(m, n) <= REPEATED_CUBE


def detection_estimates(plan: Plan, options: DetectionOptions, resident: int) -> Iterator[MemoryEstimate]:
    """Estimate the least memory that detection needs for each matrix."""
    for t in plan.targets:
        least = min(detection_bytes(plan, t, options, resident).values())
        yield MemoryEstimate(t.tensor, t.module.shape, least)
