"""Peak memory of detection, matrix by matrix, and the way that a budget leaves."""

from __future__ import annotations

from collections.abc import Iterator

from streamer.detection.options import DetectionOptions
from streamer.detection.solvers import working_bytes
from streamer.plan.memory import MemoryEstimate, factor_bytes, resident_bytes
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.weights.base import QuantizedWeight


def detection_bytes(plan: Plan, target: Target, options: DetectionOptions) -> dict[str, int]:
    """Peak memory of detection in one matrix, by each way that the options leave; see `working_bytes`."""
    weight, module = plan.weights[target.tensor], target.module
    rank = module.factor_rank if module.low_rank else None
    ways = working_bytes(module.shape, options.directions(module.shape), rank, weight.compute.itemsize)
    if options.solver == "dense":
        ways = {"dense": ways["dense"]}
    read = 2 * weight.held_bytes  # the tensor's own bytes, and those of the next one
    always = read if isinstance(weight, QuantizedWeight) else 0
    resident, making = resident_bytes(plan) + factor_bytes(plan, target), module.peak_bytes(weight.compute.itemsize)
    return {way: resident + max(size, making) + (always if way == "blocks" else read) for way, size in ways.items()}


def kept_bytes(plan: Plan, target: Target, options: DetectionOptions) -> int:
    """Memory of a matrix' findings that are not written: the vectors, every direction an intruder."""
    m, n = target.module.shape
    return options.directions((m, n)) * (m + n) * plan.weights[target.tensor].compute.itemsize


def best_way(plan: Plan, target: Target, options: DetectionOptions) -> str:
    """The first of ``dense``, ``whole`` and ``blocks`` that fits the memory allowed."""
    if options.max_memory is None:
        return "dense"
    ways = detection_bytes(plan, target, options)
    return next(way for way, size in ways.items() if size <= options.max_memory)


def detection_estimates(plan: Plan, options: DetectionOptions) -> Iterator[MemoryEstimate]:
    """The least that detection in each matrix takes."""
    return (
        MemoryEstimate(t.tensor, t.module.shape, min(detection_bytes(plan, t, options).values())) for t in plan.targets
    )
