"""Detect in matrices one at a time, in this process, the next one read while the current one computes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace

import torch

from streamer.detection.base_index import BaseIndex
from streamer.detection.cost import cost as solver_cost
from streamer.detection.fingerprints import fingerprint
from streamer.detection.intruders import Detection, decide
from streamer.detection.matrix_finding import MatrixFinding
from streamer.detection.memory import best_way, float64_way
from streamer.detection.options import DetectionOptions
from streamer.detection.prefetch import PrefetchedWeight, Prefetcher, read_ahead
from streamer.errors import NumericError
from streamer.events import Event, Monitor
from streamer.linalg.operators import Dense, Matrix, RowBlocks
from streamer.linalg.torch_state import threads
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.weights.base import StoredTensor


def cost(target: Target, options: DetectionOptions) -> int:
    """Estimate the units of work that detection spends on a matrix; see `detection.cost.cost`."""
    shape = target.module.shape
    return solver_cost(shape, options.directions(shape), options.solver)


def detect_matrix(plan: Plan, target: Target, options: DetectionOptions, device: torch.device, resident: int,
                  prefetched: PrefetchedWeight | None = None, monitor: Monitor | None = None,
               index: BaseIndex | None = None) -> MatrixFinding:  # fmt: skip
    """Detect in one matrix; one that the device has no memory for is computed on the CPU, and the monitor is told.

    Parameters
    ----------
    resident
        Bytes that stay in memory between two steps, as the budget has to hold them too; see `resident_bytes`.
    prefetched
        The matrix' weight, where that has been read ahead.
    index
        What is kept of the base for all adapters.

    Raises
    ------
    NumericError
        If an input is not finite or the solver fails; the message names file and tensor.
    """
    began = time.perf_counter()
    prefetched = prefetched or PrefetchedWeight(plan.weights[target.tensor])
    tensors = plan.adapter.tensors
    if not plan.adapter.describes_model:  # whose matrix has no fingerprint, and is too large to be held
        tensors = {name: tensors[name].load() for name in target.module.tensor_names}
    found: Detection | None = None
    try:
        found = _detection(plan, target, tensors, options, device, resident, prefetched, index)
    except RuntimeError as e:  # cuBLAS and cuSOLVER have no class of their own for it
        if device.type == "cpu" or not (isinstance(e, torch.cuda.OutOfMemoryError) or "ALLOC_FAILED" in str(e)):
            raise
    if found is None:  # outside of the handler, which holds on to what the device has
        if monitor is not None:
            monitor.emit(
                Event("warning", f"{target.tensor}: {device} has not enough memory for it; it is computed on the CPU")
            )
        found = _detection(plan, target, tensors, options, torch.device("cpu"), resident, prefetched, index)
    module = target.module
    printed = fingerprint(plan, target, tensors, prefetched.weight)
    return MatrixFinding(target.tensor, module.name, module.shape, prefetched.weight.label, module.rank, module.scaling, found,
                         time.perf_counter() - began, target.transposed, printed)  # fmt: skip


def _detection(plan: Plan, target: Target, tensors: Mapping[str, StoredTensor], options: DetectionOptions, device: torch.device,
               resident: int, prefetched: PrefetchedWeight, index: BaseIndex | None) -> Detection:  # fmt: skip
    """Detect on this very device, once more in float64 where only rounding leaves a direction open and memory allows it."""
    way = best_way(plan, target, options, resident)
    found, rounded = _decisions(plan, target, tensors, options, device, prefetched, way, index)
    again = float64_way(plan, target, options, resident, found.solver) if rounded else None
    if again is None:
        return found
    weight = prefetched.weight
    prefetched = replace(prefetched, weight=replace(weight, compute=torch.float64))
    options = replace(options, solver=found.solver)
    precise, _ = _decisions(plan, target, tensors, options, device, prefetched, again[0])
    return replace(precise, **{key: getattr(precise, key).to(weight.compute) for key in ("U", "S", "Vh")},
                   escalated=found.escalated, steps=found.steps + precise.steps,
                   products=found.products + precise.products)  # fmt: skip


def _decisions(plan: Plan, target: Target, tensors: Mapping[str, StoredTensor], options: DetectionOptions, device: torch.device,
               prefetched: PrefetchedWeight, way: str, index: BaseIndex | None = None) -> tuple[Detection, bool]:  # fmt: skip
    """Decide in the weight's computing dtype, in one of the ways of `working_bytes`; see `decide`."""
    weight = prefetched.weight
    base: Matrix
    if way == "blocks":  # as it is stored, decoded a few rows at a time in each product
        base = RowBlocks(weight.matrix, weight.at_hand().rows, torch.empty(0, dtype=weight.compute, device=device))
    else:
        base = Dense(prefetched.whole(device).reshape(weight.matrix))
    W0 = base.matrix if isinstance(base, Dense) else None
    delta = plan.delta(target, W0, double=weight.compute == torch.float64, tensors=tensors)
    known = None if index is None else index.source(target.tensor, weight, target.transposed)
    try:
        oriented = base.T if target.transposed else base
        return decide(oriented, delta, options, target.module.rank, target.tensor, way == "dense", known)
    except NumericError as e:
        raise NumericError(f"{weight.where}: tensor {target.tensor!r} with module {target.module.name!r}: {e}") from e


def detect_in_turn(
    plans: Sequence[Plan], todo: Sequence[Sequence[tuple[int, Target]]], options: DetectionOptions, device: torch.device,
    resident: int, counts: Sequence[int], monitor: Monitor, begin: Callable[[int, Target], None], index: BaseIndex | None = None,
) -> Generator[tuple[int, Target, MatrixFinding], None, None]:  # fmt: skip
    """Detect in matrices one at a time, in this process, and yield the number of the plan, the target, and its finding.

    Parameters
    ----------
    todo
        The targets that are one matrix of the base, and the numbers of their plans; see `Batch.matrices`.
    counts
        Torch's threads for each plan.
    begin
        Called before each target.
    index
        What is kept of the base for all adapters.
    """
    stager = Prefetcher(device)

    def load(uses: Sequence[tuple[int, Target]]) -> PrefetchedWeight | None:
        i, target = uses[0]
        weight = plans[i].weights[target.tensor]
        whole = weight.remote or any(best_way(plans[i], t, options, resident) != "blocks" for i, t in uses)
        return stager.stage(weight) if whole else None

    # Behind a small matrix a large one is not read in time; what is mapped may wait, other memory is not to grow.
    mapped = device.type == "cpu" and not any(plans[i].weights[t.tensor].held_bytes for uses in todo for i, t in uses)
    with contextlib.closing(read_ahead(todo, load, 2 if mapped else 1)) as stream:
        for uses, prefetched in stream:
            for i, target in uses:
                begin(i, target)
                with threads(counts[i]):
                    finding = detect_matrix(plans[i], target, options, device, resident, prefetched, monitor, index)
                yield i, target, finding
