"""Detect in one matrix at a time in this process, reading the next one while the current one computes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from streamer.detection.cost import Way
from streamer.detection.detection_memory import best_way, float64_way
from streamer.detection.fingerprints import fingerprint
from streamer.detection.intruders import Detection, decide
from streamer.detection.matrix_finding import MatrixFinding
from streamer.detection.options import DetectionOptions
from streamer.detection.prefetch import PrefetchedWeight, Prefetcher, read_ahead
from streamer.detection.work import Begin, Found, Work
from streamer.errors import NumericError
from streamer.events import Event, Monitor
from streamer.linalg.operators import Dense, Matrix, RowBlocks, all_finite
from streamer.linalg.torch_state import threads
from streamer.plan.batch import SharedGroup
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.weights.base import StoredTensor


def detect_matrix(plan: Plan, target: Target, options: DetectionOptions, device: torch.device, resident: int,
                  prefetched: PrefetchedWeight | None = None, monitor: Monitor | None = None) -> MatrixFinding:  # fmt: skip
    """Detect in one matrix; if the device lacks memory for it, compute on the CPU and warn through the monitor.

    Parameters
    ----------
    resident
        Bytes in memory between two steps, which the budget includes; see `resident_bytes`.
    prefetched
        The matrix's weight, if already read.

    Raises
    ------
    NumericError
        If an input is not finite or the solver fails; the message names file and tensor.
    """
    prefetched = prefetched or PrefetchedWeight(plan.weights[target.tensor])
    tensors = _tensors(plan, target)
    return _Step(plan, target, tensors, options, device, resident, prefetched, monitor).finding()


def _tensors(plan: Plan, target: Target) -> Mapping[str, StoredTensor]:
    """Read a module's tensors; a fine-tuned model's matrix has no fingerprint and is too large to keep."""
    tensors = plan.adapter.tensors
    if plan.adapter.describes_model:
        return tensors
    return {name: tensors[name].load() for name in target.module.tensor_names}


@dataclass(frozen=True)
class _Step:
    """Detection in one matrix; the attributes are `detect_matrix`'s parameters and the adapter's tensors."""

    plan: Plan
    target: Target
    tensors: Mapping[str, StoredTensor]
    options: DetectionOptions
    device: torch.device
    resident: int
    prefetched: PrefetchedWeight
    monitor: Monitor | None

    def finding(self) -> MatrixFinding:
        """Detect, on the CPU if the device has too little memory."""
        began = time.perf_counter()
        found: Detection | None = None
        try:
            found = self._detection()
        except RuntimeError as e:  # cuBLAS and cuSOLVER have no class of their own for this
            lacks_memory = isinstance(e, torch.cuda.OutOfMemoryError) or "ALLOC_FAILED" in str(e)
            if self.device.type == "cpu" or not lacks_memory:
                raise
        if found is None:  # outside the handler, which keeps the device's memory in use
            if self.monitor is not None:
                text = f"{self.target.tensor}: {self.device} has not enough memory for it; it is computed on the CPU"
                self.monitor.emit(Event("warning", text))
            found = replace(self, device=torch.device("cpu"))._detection()
        module, weight = self.target.module, self.prefetched.weight
        printed = fingerprint(self.plan, self.target, self.tensors, weight)
        return MatrixFinding(self.target.tensor, module.name, module.shape, weight.label, module.rank, module.scaling, found,
                             time.perf_counter() - began, self.target.transposed, printed)  # fmt: skip

    def _detection(self) -> Detection:
        """Detect on this device, and again in float64 if only rounding leaves a direction open and memory allows it."""
        found, rounded = self._decisions(best_way(self.plan, self.target, self.options, self.resident))
        again = float64_way(self.plan, self.target, self.options, self.resident, found.solver) if rounded else None
        if again is None:
            return found
        weight = self.prefetched.weight
        double = replace(self.prefetched, weight=replace(weight, compute=torch.float64))
        step = replace(self, prefetched=double, options=replace(self.options, solver=found.solver))
        precise, _ = step._decisions(again[0])
        return replace(precise, **{key: getattr(precise, key).to(weight.compute) for key in ("U", "S", "Vh")},
                       escalated=found.escalated, steps=found.steps + precise.steps,
                       products=found.products + precise.products)  # fmt: skip

    def _base(self, way: Way) -> Matrix:
        """Return the base's weight in the computing dtype: whole, or decoded a few rows at a time in each product."""
        weight = self.prefetched.weight
        if way is Way.BLOCKS:
            like = torch.empty(0, dtype=weight.compute, device=self.device)
            return RowBlocks(weight.matrix, weight.at_hand().rows, like)
        return Dense(self.prefetched.whole(self.device).reshape(weight.matrix))

    def _decisions(self, way: Way) -> tuple[Detection, bool]:
        """Decide in the weight's computing dtype, in the given way; see `decide`."""
        base, weight = self._base(way), self.prefetched.weight
        W0 = base.matrix if isinstance(base, Dense) else None
        delta = self.plan.delta(self.target, W0, double=weight.compute == torch.float64, tensors=self.tensors)
        oriented = base.T if self.target.transposed else base
        try:
            return decide(oriented, delta, self.options, self.target.module.rank, self.target.tensor, way.allows_dense)
        except NumericError as e:
            # Only one of several adapters is at fault, unless the base is.
            where = self.plan.adapter.file.path if all(map(all_finite, base.pieces())) else weight.where
            names = f"tensor {self.target.tensor!r} with module {self.target.module.name!r}"
            raise NumericError(f"{where}: {names}: {e}") from e


def detect_in_turn(work: Work, device: torch.device, monitor: Monitor, begin: Begin) -> Found:
    """Detect in one matrix at a time, in this process."""
    plans, options, resident = work.batch.plans, work.options, work.resident
    stager = Prefetcher(device)

    def load(group: SharedGroup) -> PrefetchedWeight | None:
        i, target = group[0]
        weight = plans[i].weights[target.tensor]
        whole = weight.remote or any(best_way(plans[i], t, options, resident) is not Way.BLOCKS for i, t in group)
        return stager.stage(weight) if whole else None

    # A large matrix after a small one is not read in time. Mapped weights may be read two ahead; other memory must not grow.
    mapped = device.type == "cpu" and not any(plans[i].weights[t.tensor].load_bytes for g in work.groups for i, t in g)
    with contextlib.closing(read_ahead(work.groups, load, 2 if mapped else 1)) as stream:
        for group, prefetched in stream:
            for one in group:
                begin(one)
                with threads(work.threads[one.plan]):
                    plan = plans[one.plan]
                    finding = detect_matrix(plan, one.target, options, device, resident, prefetched, monitor)
                yield one, finding
