"""Detect in matrices one at a time, in this process, the next one read while the current one computes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from streamer.detection.base_index import BaseIndex
from streamer.detection.cost import cost as solver_cost
from streamer.detection.fingerprints import fingerprint
from streamer.detection.intruders import Detection, decide
from streamer.detection.matrix_finding import MatrixFinding
from streamer.detection.memory import best_way, float64_way, held_bytes
from streamer.detection.options import DetectionOptions, RunOptions
from streamer.detection.prefetch import PrefetchedWeight, Prefetcher, read_ahead
from streamer.detection.sharing import Group
from streamer.detection.solvers import KnownSource
from streamer.errors import NumericError
from streamer.events import Event, Monitor
from streamer.linalg.golub_kahan import KnownTriplets
from streamer.linalg.operators import Dense, Matrix, RowBlocks, all_finite
from streamer.linalg.shared_products import NotSharedError, run_in_step
from streamer.linalg.torch_state import threads
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.weights.base import StoredTensor


def cost(target: Target, options: DetectionOptions) -> int:
    """Estimate the units of work that detection spends on a matrix; see `detection.cost.cost`."""
    shape = target.module.shape
    return solver_cost(shape, options.directions(shape), options.solver)


def detect_matrix(plan: Plan, target: Target, options: DetectionOptions, device: torch.device, resident: int,
                  prefetched: PrefetchedWeight | None = None, monitor: Monitor | None = None) -> MatrixFinding:  # fmt: skip
    """Detect in one matrix; one that the device has no memory for is computed on the CPU, and the monitor is told.

    Parameters
    ----------
    resident
        Bytes that stay in memory between two steps, as the budget has to hold them too; see `resident_bytes`.
    prefetched
        The matrix' weight, where that has been read ahead.

    Raises
    ------
    NumericError
        If an input is not finite or the solver fails; the message names file and tensor.
    """
    prefetched = prefetched or PrefetchedWeight(plan.weights[target.tensor])
    tensors = _tensors(plan, target)
    return _Step(plan, target, tensors, options, device, resident, prefetched, monitor).finding(_SharedDecision())


def _tensors(plan: Plan, target: Target) -> Mapping[str, StoredTensor]:
    """Read a module's tensors; a model's matrix has no fingerprint, and is too large to be held."""
    tensors = plan.adapter.tensors
    if plan.adapter.describes_model:
        return tensors
    return {name: tensors[name].load() for name in target.module.tensor_names}


Decided = tuple[Detection, bool]
"""A detection, and whether rounding alone leaves a direction open; see `decide`."""


class _SharedDecision(NamedTuple):
    """What came of sharing products with others, and a detection's part of the time; None where it is to be done alone."""

    decided: Future[Decided] | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class _Step:
    """Detection in one matrix; the attributes are parameters of `detect_matrix`, the adapter's tensors at hand, and the base index."""

    plan: Plan
    target: Target
    tensors: Mapping[str, StoredTensor]
    options: DetectionOptions
    device: torch.device
    resident: int
    prefetched: PrefetchedWeight
    monitor: Monitor | None
    index: BaseIndex | None = None

    @property
    def way(self) -> str:
        """Choose one of the ways of `working_bytes`."""
        return best_way(self.plan, self.target, self.options, self.resident)

    def finding(self, shared: _SharedDecision) -> MatrixFinding:
        """Detect, on the CPU where the device has no memory for it; from what was decided together with others, where that was."""
        began = time.perf_counter() - shared.seconds
        found: Detection | None = None
        try:
            found = self._detection(None if shared.decided is None else shared.decided.result())
        except RuntimeError as e:  # cuBLAS and cuSOLVER have no class of their own for it
            lacks_memory = isinstance(e, torch.cuda.OutOfMemoryError) or "ALLOC_FAILED" in str(e)
            if self.device.type == "cpu" or not lacks_memory:
                raise
        if found is None:  # outside of the handler, which holds on to what the device has
            if self.monitor is not None:
                text = f"{self.target.tensor}: {self.device} has not enough memory for it; it is computed on the CPU"
                self.monitor.emit(Event("warning", text))
            found = replace(self, device=torch.device("cpu"))._detection()
        module, weight = self.target.module, self.prefetched.weight
        printed = fingerprint(self.plan, self.target, self.tensors, weight)
        return MatrixFinding(self.target.tensor, module.name, module.shape, weight.label, module.rank, module.scaling, found,
                             time.perf_counter() - began, self.target.transposed, printed)  # fmt: skip

    def _detection(self, decided: Decided | None = None) -> Detection:
        """Detect on this very device, once more in float64 where only rounding leaves a direction open and memory allows it."""
        found, rounded = decided or self.decisions(self.base(self.way), self.way)
        again = float64_way(self.plan, self.target, self.options, self.resident, found.solver) if rounded else None
        if again is None:
            return found
        weight = self.prefetched.weight
        double = replace(self.prefetched, weight=replace(weight, compute=torch.float64))
        step = replace(self, prefetched=double, options=replace(self.options, solver=found.solver))
        precise, _ = step.decisions(step.base(again[0]), again[0])
        return replace(precise, **{key: getattr(precise, key).to(weight.compute) for key in ("U", "S", "Vh")},
                       escalated=found.escalated, steps=found.steps + precise.steps,
                       products=found.products + precise.products)  # fmt: skip

    def base(self, way: str) -> Dense | RowBlocks:
        """Take the weight in the computing dtype, as it is stored in the base: whole, or decoded a few rows at a time in each product."""
        weight = self.prefetched.weight
        if way == "blocks":
            like = torch.empty(0, dtype=weight.compute, device=self.device)
            return RowBlocks(weight.matrix, weight.at_hand().rows, like)
        return Dense(self.prefetched.whole(self.device).reshape(weight.matrix))

    def oriented(self, base: Matrix) -> Matrix:
        """Turn the base's matrix to (out, in)."""
        return base.T if self.target.transposed else base

    def known(self, base: Matrix) -> KnownTriplets | None:
        """Find the triplets that are known of the base, as `base` gives it or as it is shared; None where none are wanted."""
        weight = self.prefetched.weight
        # Next to float64's rounding the residuals of triplets in float32 would be all there is.
        if self.index is None or weight.compute == torch.float64:
            return None
        return self.index.triplets(self.target.tensor, weight, self.target.transposed, base)

    def decisions(self, base: Matrix, way: str, known: KnownSource | None = None) -> Decided:
        """Decide on the base as `base` gives it, or as it is shared, from `known` triplets, by default the index's; see `decide`."""
        weight = self.prefetched.weight
        W0 = base.matrix if isinstance(base, Dense) else None
        delta = self.plan.delta(self.target, W0, double=weight.compute == torch.float64, tensors=self.tensors)
        try:
            return decide(self.oriented(base), delta, self.options, self.target.module.rank, self.target.tensor,
                          way == "dense", known or self.known)  # fmt: skip
        except NumericError as e:
            # Of several adapters only one is at fault, unless it is the base.
            where = self.plan.adapter.file.path if all(map(all_finite, base.pieces())) else weight.where
            names = f"tensor {self.target.tensor!r} with module {self.target.module.name!r}"
            raise NumericError(f"{where}: {names}: {e}") from e


def _shared_decisions(steps: Sequence[_Step], checkpoint: Callable[[], None]) -> list[_SharedDecision]:
    """Decide in steps on one matrix, sharing the products with it, where they are more than one."""
    if len(steps) == 1:
        return [_SharedDecision()]
    began, first = time.perf_counter(), steps[0]
    way = first.way
    base = first.base(way)
    told = first.known(first.oriented(base))  # once for all
    computations = [partial(step.decisions, way=way, known=lambda _: told) for step in steps]
    futures = run_in_step(base, computations, checkpoint)
    part = (time.perf_counter() - began) / len(steps)
    alone = (isinstance(future.exception(), NotSharedError) for future in futures)
    return [_SharedDecision(None if again else future, part) for future, again in zip(futures, alone, strict=True)]


def detect_in_turn(
    plans: Sequence[Plan], todo: Sequence[Sequence[Group]], options: DetectionOptions, run: RunOptions,
    resident: int, counts: Sequence[int], begin: Callable[[int, Target], None],
) -> Generator[tuple[int, Target, MatrixFinding], None, None]:  # fmt: skip
    """Detect in matrices one at a time, in this process, and yield the number of the plan, the target, and its finding.

    Parameters
    ----------
    todo
        The targets that are one matrix of the base, in groups that share products with it; see `Batch.matrices` and `share`.
    counts
        Torch's threads for each plan.
    begin
        Called before each target.
    """
    device, monitor = run.device, run.monitor
    stager = Prefetcher(device)

    def load(groups: Sequence[Group]) -> PrefetchedWeight | None:
        uses = [use for group in groups for use in group]
        i, target = uses[0]
        weight = plans[i].weights[target.tensor]
        whole = weight.remote or any(best_way(plans[i], t, options, resident) != "blocks" for i, t in uses)
        return stager.stage(weight) if whole else None

    # Behind a small matrix a large one is not read in time; what is mapped may wait, other memory is not to grow.
    uses = (use for groups in todo for group in groups for use in group)
    mapped = device.type == "cpu" and not any(plans[i].weights[t.tensor].held_bytes for i, t in uses)
    with contextlib.closing(read_ahead(todo, load, 2 if mapped else 1)) as stream:
        for groups, prefetched in stream:
            for group in groups:
                held = resident + (held_bytes(plans, group, options) if len(group) > 1 else 0)
                weight = prefetched or PrefetchedWeight(plans[group[0][0]].weights[group[0][1].tensor])
                steps = [
                    _Step(plans[i], t, _tensors(plans[i], t), options, device, held, weight, monitor, run.base_index)
                    for i, t in group
                ]
                shared: list[_SharedDecision] = []
                for (i, target), step in zip(group, steps, strict=True):
                    begin(i, target)
                    with threads(counts[i]):
                        if not shared:
                            shared = _shared_decisions(steps, monitor.checkpoint)
                        finding = step.finding(shared.pop(0))
                    yield i, target, finding
