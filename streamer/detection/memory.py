"""Estimate the peak memory of detection, matrix by matrix, and choose the way that a budget leaves."""

from __future__ import annotations

from collections.abc import Iterator

from streamer.detection.cost import working_bytes
from streamer.detection.options import DetectionOptions
from streamer.plan.memory import MemoryEstimate, factor_bytes
from streamer.plan.plan import Plan
from streamer.plan.targets import Target


def detection_bytes(plan: Plan, target: Target, options: DetectionOptions, resident: int) -> dict[str, int]:
    """Estimate the peak memory of detection in one matrix, by each way that the options leave; see `working_bytes`.

    Parameters
    ----------
    resident
        Bytes that stay in memory between two steps; see `resident_bytes`.
    """
    weight, module = plan.weights[target.tensor], target.module
    rank = module.factor_rank if module.low_rank else None
    ways = working_bytes(module.shape, options.directions(module.shape), rank, weight.compute.itemsize)
    if options.solver == "dense":
        ways = {"dense": ways["dense"]}
    read = 2 * weight.held_bytes  # the tensor's own bytes, and those of the next one
    always = read if weight.quantized else 0
    fixed, making = resident + factor_bytes(plan, target), module.peak_bytes(weight.compute.itemsize)
    return {way: fixed + max(size, making) + (always if way == "blocks" else read) for way, size in ways.items()}


def kept_bytes(plan: Plan, target: Target, options: DetectionOptions) -> int:
    """Estimate the memory of a matrix' findings that are not written: the vectors, every direction an intruder."""
    m, n = target.module.shape
    return options.directions((m, n)) * (m + n) * plan.weights[target.tensor].compute.itemsize


def best_way(plan: Plan, target: Target, options: DetectionOptions, resident: int) -> str:
    """Choose the first of ``dense``, ``whole`` and ``blocks`` that fits the memory allowed."""
    if options.max_memory is None:
        return "dense"
    ways = detection_bytes(plan, target, options, resident)
    return next(way for way, size in ways.items() if size <= options.max_memory)


def detection_estimates(plan: Plan, options: DetectionOptions, resident: int) -> Iterator[MemoryEstimate]:
    """Estimate the least memory that detection in each matrix takes."""
    for t in plan.targets:
        least = min(detection_bytes(plan, t, options, resident).values())
        yield MemoryEstimate(t.tensor, t.module.shape, least)
