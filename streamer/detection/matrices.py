"""Detect in one matrix at a time in this process, reading the next one while the current one computes.

Choose the device on which detection computes.

Estimate the peak memory of detection for each matrix, and choose the way that fits a budget.

Describe the work of a detection, independent of who does it: a list of matrices, with everything that determines the findings.

Read weights ahead: a thread reads the next ones from disk while the current one is in use.

For a GPU, the stored bytes are copied into pinned memory and then, on a separate stream, to the device while it computes; the device
converts them to float32 exactly. Quantized values, and weights in several tensors, are decoded on the CPU when they are needed.

Detect on workers: divide matrices into tasks and pass on findings as they arrive.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from streamer.detection.findings import fingerprint
from streamer.detection.findings_file import MatrixFinding
from streamer.detection.intruders import Detection, decide
from streamer.detection.options import DetectionOptions, Run
from streamer.detection.solvers import Way, working_bytes
from streamer.errors import NumericError, UsageError
from streamer.events import Event, Monitor
from streamer.linalg.operators import Dense, Matrix, RowBlocks, all_finite
from streamer.linalg.torch_state import threads
from streamer.plan.plan import AdapterBatch, Assignment, MemoryEstimate, Plan, SharedGroup, factor_bytes, resident_bytes
from streamer.plan.targets import Target
from streamer.weights.base import StoredTensor, Weight
from streamer.workers import Inputs, Task, Workers


def choose_device(name: str) -> torch.device:
    """Resolve ``auto``, ``cpu``, ``cuda`` or ``cuda:i`` to an available device.

    Raises
    ------
    UsageError
        If the device is not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device: expected auto, cpu, cuda or cuda:i, found {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device: expected auto, cpu, cuda or cuda:i, found {name!r}")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"device: {name} is not available; use cpu")
    return device


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
    read = 2 * weight.load_bytes  # the stored bytes of a tensor and the next one
    mapped = {Way.BLOCKS} if not (weight.quantized or weight.remote) else set[Way]()
    return {way: fixed + max(size, making) + (0 if way in mapped else read) for way, size in ways.items()}


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
    is_double = plan.weights[target.tensor].compute.itemsize == DOUBLE_BYTES
    if is_double or (solver == "dense" and not is_repeated(target.module.shape)):
        return None
    ways = detection_bytes(plan, target, options, resident, DOUBLE_BYTES)
    allowed = options.max_memory
    fitting = (pair for pair in ways.items() if (pair[0] is Way.DENSE) == (solver == "dense"))
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


Begin = Callable[[Assignment], None]
"""Called before each matrix."""

Found = Generator[tuple[Assignment, MatrixFinding], None, None]
"""Findings as they are made; closing the generator stops the work."""


@dataclass(frozen=True)
class Work:
    """Matrices in which to detect.

    Attributes
    ----------
    groups
        The matrices; there may be fewer than in the batch.
    threads
        Torch's threads for each plan, on which the last bits of findings depend.
    resident
        Bytes in memory between two steps; see `resident_bytes`.
    """

    batch: AdapterBatch
    groups: Sequence[SharedGroup]
    options: DetectionOptions
    threads: Sequence[int]
    resident: int

    def cost(self, assignments: Iterable[Assignment]) -> int:
        """Estimate the units of work for some matrices."""
        return sum(self.options.cost(one.target.module.shape) for one in assignments)


T = TypeVar("T")
V = TypeVar("V")


@dataclass(frozen=True)
class PrefetchedWeight:
    """A weight that has been read.

    Attributes
    ----------
    weight
        The weight, with its bytes in memory.
    values
        Its stored values on a GPU; None if not copied yet.
    arrived
        Event that marks the end of the copy.
    """

    weight: Weight
    values: Tensor | None = None
    arrived: torch.cuda.Event | None = None

    def whole(self, device: torch.device) -> Tensor:
        """Return all values in the computing dtype, as `Weight.whole` does; do not write to them.

        Raises
        ------
        torch.cuda.OutOfMemoryError
            If the GPU has too little memory.
        """
        if self.values is None or self.arrived is None or self.values.device.type != device.type:
            return self.weight.whole(device)
        stream = torch.cuda.current_stream(self.values.device)
        stream.wait_event(self.arrived)
        self.values.record_stream(stream)  # the memory is not reused before this stream is done with it
        return self.values.to(self.weight.compute)


class Prefetcher:
    """Reader of weights; a GPU receives copies while it computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]  # in torch's stubs

    def stage(self, weight: Weight) -> PrefetchedWeight:
        """Read a weight and start its copy, in the calling thread."""
        weight = weight.load()
        values = weight.stored() if self._stream is not None else None
        if values is None or self._stream is None:
            return PrefetchedWeight(weight)
        try:
            with torch.cuda.stream(self._stream):
                there = values.pin_memory().to(self._device, non_blocking=True)
            return PrefetchedWeight(weight, there, self._stream.record_event())
        except RuntimeError:
            # There is no memory on the device, or no pinned memory. There may be when the weight is needed; if not, that step fails.
            return PrefetchedWeight(weight)


def read_ahead(items: Sequence[T], load: Callable[[T], V], depth: int = 1) -> Generator[tuple[T, V], None, None]:
    """Yield each item with its result of `load`; a thread loads the next `depth` items while the current one is in use."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="streamer prefetch")
    try:
        context = copy_context()  # with the monitor that waits for servers heed
        coming = deque(pool.submit(context.run, load, item) for item in items[:depth])
        for i, item in enumerate(items):
            value = coming.popleft().result()
            coming.extend(pool.submit(context.run, load, following) for following in items[i + depth : i + depth + 1])
            yield item, value
            del value  # before the next one arrives: keep at most `depth` beside the current one
    finally:
        pool.shutdown(cancel_futures=True)


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
    prefetched, tensors = prefetched or PrefetchedWeight(plan.weights[target.tensor]), plan.adapter.tensors
    if not plan.adapter.describes_model:  # a fine-tuned model's matrix has no fingerprint and is too large to keep
        tensors = {name: tensors[name].load() for name in target.module.tensor_names}
    return _Step(plan, target, tensors, options, device, resident, prefetched, monitor).finding()


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
        return MatrixFinding(self.target.tensor, module.name, module.shape, weight.label, module.rank, module.scaling,
                             self.target.transposed, printed, found, time.perf_counter() - began)  # fmt: skip

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
            return decide(oriented, delta, self.options, self.target.module.rank, self.target.tensor, way is Way.DENSE)
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


def detect_in(work: Work, run: Run, begin: Begin) -> Found:
    """Detect in all matrices, in this process or on the run's workers."""
    if run.workers is None:
        return detect_in_turn(work, run.device, run.monitor, begin)
    return detect_on_workers(work, run.workers, inputs_of(work.batch, run), run.device, run.monitor, begin)


TASK_COST = 1_000_000_000
"""Units of cost (see `detection.solvers.cost`; about a second) from which a task gets no more matrices."""

TASK_MATRICES = 8
"""Most matrices of a task: a killed run loses the matrices of its unfinished tasks."""


MatrixName = tuple[int, str]
"""An `Assignment` with its tensor's name instead of the target, for pickling."""


@dataclass(frozen=True)
class DetectTask(Task[list[tuple[int, MatrixFinding]]]):
    """A group of matrices; its result is their findings with their plans' numbers.

    Attributes
    ----------
    groups
        The matrices; see `Work`.
    options, device, resident
        See `Work`; the device is given by name.
    """

    groups: tuple[tuple[MatrixName, ...], ...]
    options: DetectionOptions
    device: str
    resident: int

    @property
    def name(self) -> str:
        """Name the first matrix."""
        return self.groups[0][0][1]

    def do(self, batch: AdapterBatch, monitor: Monitor) -> list[tuple[int, MatrixFinding]]:
        """Detect in the task's matrices."""
        plans, targets = batch.plans, _targets(batch)
        groups = [tuple(Assignment(i, targets[i][tensor]) for i, tensor in one) for one in self.groups]
        work = Work(batch, groups, self.options, [self.threads] * len(plans), self.resident)
        with contextlib.closing(detect_in_turn(work, choose_device(self.device), monitor, lambda _: None)) as stream:
            found = [(one.plan, finding) for one, finding in stream]
        for i in sorted({i for i, _ in found}):
            plans[i].check_unchanged()
        return found


def inputs_of(batch: AdapterBatch, run: Run) -> Inputs:
    """Describe the inputs of a run."""
    return Inputs.of(batch, run.io, run.stated, run.architecture)


def shared(workers: Workers, batch: AdapterBatch, options: DetectionOptions, resident: int) -> DetectionOptions:
    """Divide the allowed memory among this process and its workers; see `Workers.budget`."""
    results = [kept_bytes(plan, target, options) for plan in batch.plans for target in plan.targets]
    own = resident_bytes(batch) + workers.at_once * TASK_MATRICES * max(results, default=0)
    needs = (e for plan in batch.plans for e in detection_estimates(plan, options, resident))
    return replace(options, max_memory=workers.budget(options.max_memory, own, needs))


def detect_on_workers(work: Work, workers: Workers, inputs: Inputs, device: torch.device,
                      monitor: Monitor, begin: Begin) -> Found:  # fmt: skip
    """Detect as `detect_in_turn` does, but on workers; findings arrive as they are made, and `begin` is called once per task."""
    targets, tasks = _targets(work.batch), dict(enumerate(_tasks(work, inputs, str(device), workers.at_once)))

    def begin_task(number: int) -> None:
        i, tensor = tasks[number].groups[0][0]
        begin(Assignment(i, targets[i][tensor]))

    with contextlib.closing(workers.run(tasks, monitor, begin_task)) as results:
        for _, found in results:
            for i, finding in found:
                yield Assignment(i, targets[i][finding.tensor]), finding


def _targets(batch: AdapterBatch) -> list[dict[str, Target]]:
    """Return each plan's targets by their tensors."""
    return [{target.tensor: target for target in plan.targets} for plan in batch.plans]


def _tasks(work: Work, inputs: Inputs, device: str, at_once: int) -> list[DetectTask]:
    """Group matrices into tasks, each with one number of threads, in the base's file order."""
    enough = min(TASK_COST, sum(map(work.cost, work.groups)) // (4 * at_once))
    tasks: list[DetectTask] = []
    for count in sorted(set(work.threads)):
        groups: list[tuple[MatrixName, ...]] = []
        done = 0
        for group in work.groups:
            mine = [one for one in group if work.threads[one.plan] == count]
            if mine:
                groups.append(tuple((i, target.tensor) for i, target in mine))
                done += work.cost(mine)
            if groups and (done >= enough or len(groups) == TASK_MATRICES or group is work.groups[-1]):
                tasks.append(DetectTask(inputs, count, tuple(groups), work.options, device, work.resident))
                groups, done = [], 0
    return tasks
