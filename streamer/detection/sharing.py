"""Choose which detections in one matrix share the products with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from streamer.detection.cost import chosen_solver
from streamer.detection.memory import best_way, detection_bytes, held_bytes, sharing_peak
from streamer.detection.options import DetectionOptions
from streamer.linalg.svd import OVERSAMPLING
from streamer.plan.batch import Batch, Use
from streamer.plan.plan import Plan
from streamer.plan.targets import Target

Group = tuple[Use, ...]
"""Targets that are one matrix of the base, whose detections share the products with it; one by itself is detected alone."""

ENOUGH = 3
"""Adapters on a matrix from which on products are shared: findings of two are byte for byte those of each alone."""

TOGETHER = 8
"""Detections that share products at most: with more a column costs hardly less (docs/benchmarks.md), and each holds its bases."""


def share(
    plans: Sequence[Plan],
    uses: Sequence[Use],
    options: DetectionOptions,
    device: torch.device,
    resident: int,
    counts: Sequence[int],
) -> list[Group]:
    """Divide the targets that are one matrix into groups that share products, as large as the memory allowed holds.

    Groups depend on options, shapes and numbers of threads alone: last bits of findings depend on who shares. On a GPU, whose memory reads
    a matrix in microseconds, nobody does: there a step's time is that of its small decompositions.

    Parameters
    ----------
    uses
        All targets that are this matrix; see `Batch.matrices`.
    resident
        Bytes that stay in memory between two steps; see `resident_bytes`.
    counts
        Torch's threads for each plan.
    """
    if len(uses) < ENOUGH or device.type != "cpu":
        return [(use,) for use in uses]
    alike: dict[object, list[Use]] = {}
    for use in uses:
        i, target = use
        way = best_way(plans[i], target, options, resident)
        key = (counts[i], target.transposed, way) if _is_shareable(target, options, way) else i
        alike.setdefault(key, []).append(use)
    return [group for same in alike.values() for group in _divided(plans, same, options, resident)]


class SharingMemory(NamedTuple):
    """Bytes that a detection in a group holds until the last one has ended, and the peak memory of the group."""

    held: int
    peak: int


Sharing = Mapping[str, SharingMemory]
"""Memory of the groups that one plan is in, by its tensors there."""

ALONE: Sharing = {}
"""Where there is no other plan."""


def sharing_memory(batch: Batch, options: DetectionOptions, device: torch.device, resident: int) -> Sequence[Sharing]:
    """Estimate the memory of the groups of a batch, for each plan."""
    plans, found = batch.plans, [dict[str, SharingMemory]() for _ in batch.plans]
    for uses in batch.matrices():
        for group in share(plans, uses, options, device, resident, [0] * len(plans)):
            if len(group) > 1:
                held = held_bytes(plans, group, options)
                memory = SharingMemory(held, sharing_peak(plans, group, options, resident + held))
                for i, target in group:
                    found[i][target.tensor] = memory
    return found


def _is_shareable(target: Target, options: DetectionOptions, way: str) -> bool:
    """Test whether the certified solver begins, on a delta in factors."""
    shape = target.module.shape
    k = options.directions(shape)
    solver = chosen_solver(shape, k, options.solver, allow_dense=way == "dense")
    return target.module.low_rank and solver == "certified" and k + OVERSAMPLING < min(shape)


def _divided(plans: Sequence[Plan], uses: Sequence[Use], options: DetectionOptions, resident: int) -> list[Group]:
    """Divide detections that may share into the fewest groups that memory allows, of about the same size."""
    for count in range(-(-len(uses) // TOGETHER), len(uses)):
        groups = [tuple(uses[len(uses) * i // count : len(uses) * (i + 1) // count]) for i in range(count)]
        if all(_fits(plans, group, options, resident) for group in groups):
            return groups
    return [(use,) for use in uses]


def _fits(plans: Sequence[Plan], group: Group, options: DetectionOptions, resident: int) -> bool:
    """Test whether memory allows a group to share, and then to do each in the way that it has alone, while the others' findings wait."""
    if len(group) == 1 or options.max_memory is None:
        return True
    held = resident + held_bytes(plans, group, options)
    for i, target in group:
        sizes = detection_bytes(plans[i], target, options, held)
        if sizes[best_way(plans[i], target, options, resident)] > options.max_memory:
            return False
    return sharing_peak(plans, group, options, held) <= options.max_memory
