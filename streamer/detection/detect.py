"""Detect in the matrices of adapters on one base, one at a time: here or on workers, into memory or into files, within a budget of memory.

A thread reads the next weights from disk while the current one is in use. Quantized values, and weights in several tensors, are decoded on
the CPU when they are needed. A findings file is written through a journal with a record for each matrix, so that a killed run resumes. The
largest size of the findings is estimated, and the free space checked, before the first matrix is read.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from streamer import __version__
from streamer.detection import findings as findings_module
from streamer.detection.findings import (
    FILE_NAME,
    Findings,
    MatrixFinding,
    fingerprint,
    header_entries,
    load_findings,
)
from streamer.detection.intruders import Decision, Detection, decide
from streamer.detection.options import DetectionOptions
from streamer.detection.solvers import Way, working_bytes
from streamer.errors import FormatError, NumericError, OutputError, OutputExistsError, UsageError
from streamer.events import Event, Monitor, Progress
from streamer.json_types import check
from streamer.linalg.operators import Dense, Matrix, RowBlocks, all_finite
from streamer.linalg.torch_state import CPU, thread_count, threads
from streamer.plan.plan import (
    AdapterBatch,
    MemoryEstimate,
    Plan,
    check_budget,
    factor_bytes,
    fits,
    resident_bytes,
)
from streamer.plan.targets import Target
from streamer.run import Run
from streamer.storage import transaction
from streamer.storage.atomic_file import Buffer, partials_of, write_sealed
from streamer.storage.header import Header, TensorInfo, layout, parse_header
from streamer.units import counted
from streamer.weights.base import Weight, as_bytes
from streamer.workers import Task, Workers


def choose_device(name: str) -> torch.device:
    """Resolve ``auto``, ``cpu``, ``cuda`` or ``cuda:i`` to an available device.

    Raises
    ------
    UsageError
        If the device is not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with contextlib.suppress(RuntimeError):
        device = torch.device(name)
        if device.type == "cpu" or (
            device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()
        ):
            return device
        if device.type == "cuda":
            raise UsageError(f"device: {name} is not available; use cpu")
    raise UsageError(f"device: expected auto, cpu, cuda or cuda:i, found {name!r}")


MIXED_BYTES = 32 << 20
"""Memory that the allocator keeps between arrays of two dtypes: up to 18 MB over 160 matrices repeated in float64."""

REPEATED_CUBE = 4096**3
"""Largest m·n·min(m, n) for which full SVDs are repeated in float64; docs/benchmarks.md has the time."""


def detection_bytes(
    plan: Plan,
    target: Target,
    options: DetectionOptions,
    resident: int,
    itemsize: int | None = None,
) -> dict[Way, int]:
    """Estimate the peak memory of detection in one matrix, for each way that the options allow; see `working_bytes`.

    Parameters
    ----------
    resident
        Bytes in memory between two steps; see `resident_bytes`.
    itemsize
        Bytes per value if the matrix is repeated in another dtype; by default it is computed once, in the weight's computing dtype.
    """
    weight = plan.weights[target.tensor]
    module = target.module
    resident += MIXED_BYTES if itemsize else 0
    itemsize = itemsize or weight.compute.itemsize
    rank = module.factor_rank if module.low_rank else None
    ways = working_bytes(module.shape, options.directions(module.shape), rank, itemsize)
    if options.solver == "dense":
        ways = {Way.DENSE: ways[Way.DENSE]}
    fixed = resident + factor_bytes(plan, target, itemsize)
    making = module.peak_bytes(itemsize)
    read = 2 * weight.load_bytes  # the stored bytes of a tensor and the next one
    mapped = {Way.BLOCKS} if not (weight.quantized or weight.remote) else set[Way]()
    return {
        way: fixed + max(size, making) + (0 if way in mapped else read)
        for way, size in ways.items()
    }


def kept_bytes(plan: Plan, target: Target, options: DetectionOptions) -> int:
    """Estimate the memory of a matrix's findings that are not written: the vectors, with every direction an intruder.

    An additional eighth covers gaps that the allocator keeps between them from earlier steps (5 % were measured).
    """
    m, n = target.module.shape
    return (
        options.directions((m, n)) * (m + n) * plan.weights[target.tensor].compute.itemsize * 9 // 8
    )


def best_way(plan: Plan, target: Target, options: DetectionOptions, resident: int) -> Way:
    """Choose the first way that fits the allowed memory."""
    ways = detection_bytes(plan, target, options, resident)
    return next(way for way, size in ways.items() if fits(size, options.max_memory))


def float64_way(
    plan: Plan, target: Target, options: DetectionOptions, resident: int, solver: str
) -> tuple[Way, int] | None:
    """Choose the way to repeat a matrix in float64.

    Returns
    -------
    tuple of Way and int, or None
        The first of the solver's ways that fits the allowed memory, and its peak memory. None if none fits, if the weight is already
        computed in float64, or for full SVDs of matrices beyond `is_repeated`.
    """
    is_double = plan.weights[target.tensor].compute == torch.float64
    if is_double or (solver == "dense" and not is_repeated(target.module.shape)):
        return None
    ways = detection_bytes(plan, target, options, resident, torch.float64.itemsize)
    of_solver = (
        (way, size) for way, size in ways.items() if (way is Way.DENSE) == (solver == "dense")
    )
    return next(((way, size) for way, size in of_solver if fits(size, options.max_memory)), None)


def is_repeated(shape: tuple[int, int]) -> bool:
    """Test whether a matrix is small enough to repeat its full SVDs in float64."""
    m, n = shape
    return m * n * min(m, n) <= REPEATED_CUBE


def detection_estimates(
    plans: Iterable[Plan], options: DetectionOptions, resident: int
) -> Iterator[MemoryEstimate]:
    """Estimate the least memory that detection needs for each matrix."""
    for plan in plans:
        for t in plan.targets:
            least = min(detection_bytes(plan, t, options, resident).values())
            yield MemoryEstimate(t.tensor, t.module.shape, least)


T = TypeVar("T")
V = TypeVar("V")


def read_ahead(
    items: Sequence[T], load: Callable[[T], V], depth: int = 1
) -> Generator[tuple[T, V], None, None]:
    """Yield each item with its result of `load`; a thread loads the next `depth` items while the current one is in use."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="streamer prefetch")
    try:
        context = (
            copy_context()
        )  # carries the monitor that `heed` set, which waits for servers obey
        coming = deque(pool.submit(context.run, load, item) for item in items[:depth])
        for i, item in enumerate(items):
            value = coming.popleft().result()
            coming.extend(
                pool.submit(context.run, load, following)
                for following in items[i + depth : i + depth + 1]
            )
            yield item, value
            del value  # before the next one arrives: keep at most `depth` beside the current one
    finally:
        pool.shutdown(cancel_futures=True)


def detect_matrix(
    plan: Plan,
    target: Target,
    options: DetectionOptions,
    device: torch.device,
    resident: int,
    prefetched: Weight | None = None,
    monitor: Monitor | None = None,
) -> MatrixFinding:
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
    began = time.perf_counter()
    module = target.module
    tensors = plan.adapter.tensors
    stored = prefetched or plan.weights[target.tensor]
    if (
        not plan.adapter.describes_model
    ):  # a fine-tuned model's matrix has no fingerprint and is too large to keep
        tensors = {name: tensors[name].load() for name in module.tensor_names}

    def decided(
        device: torch.device, weight: Weight, way: Way, options: DetectionOptions
    ) -> Decision:
        """Decide in the weight's computing dtype; the base is whole, or decoded a few rows at a time in each product."""
        W0 = None if way is Way.BLOCKS else weight.whole(device).reshape(weight.matrix)
        like = torch.empty(0, dtype=weight.compute, device=device)
        base: Matrix = (
            RowBlocks(weight.matrix, weight.at_hand().rows, like) if W0 is None else Dense(W0)
        )
        delta = plan.delta(target, W0, double=weight.compute == torch.float64, tensors=tensors)
        oriented = base.T if target.transposed else base
        try:
            return decide(oriented, delta, options, module.rank, target.tensor, way is Way.DENSE)
        except NumericError as e:
            # Only one of several adapters is at fault, unless the base is.
            where = plan.adapter.file.path if all(map(all_finite, base.pieces())) else weight.where
            raise NumericError(
                f"{where}: tensor {target.tensor!r} with module {module.name!r}: {e}"
            ) from e

    def detected(device: torch.device) -> Detection:
        """Detect on a device, and again in float64 if only rounding leaves a direction open and memory allows it."""
        detection, may_settle = decided(
            device, stored, best_way(plan, target, options, resident), options
        )
        repeat = (
            float64_way(plan, target, options, resident, detection.solver) if may_settle else None
        )
        if repeat is None:
            return detection
        double = replace(stored, compute=torch.float64)
        precise = decided(
            device, double, repeat[0], replace(options, solver=detection.solver)
        ).detection
        vectors = {key: getattr(precise, key).to(stored.compute) for key in ("U", "S", "Vh")}
        return replace(
            precise,
            **vectors,
            escalated=detection.escalated,
            steps=detection.steps + precise.steps,
            products=detection.products + precise.products,
        )

    found: Detection | None = None
    try:
        found = detected(device)
    except RuntimeError as e:  # cuBLAS and cuSOLVER have no class of their own for this
        if device.type == "cpu" or not (
            isinstance(e, torch.cuda.OutOfMemoryError) or "ALLOC_FAILED" in str(e)
        ):
            raise
    if found is None:  # outside the handler, which keeps the device's memory in use
        if monitor is not None:
            text = (
                f"{target.tensor}: {device} has not enough memory for it; it is computed on the CPU"
            )
            monitor.emit(Event("warning", text))
        found = detected(CPU)
    printed = fingerprint(plan, target, tensors, stored)
    return MatrixFinding(
        target.tensor,
        module.name,
        module.shape,
        stored.label,
        module.rank,
        module.scaling,
        target.transposed,
        printed,
        found,
        time.perf_counter() - began,
    )


SharedMatrices = Sequence[tuple[int, Target]]
"""Matrices that are the same bytes of the base, each with its plan's number; see `AdapterBatch.matrices`."""

FindingStream = Generator[tuple[int, MatrixFinding], None, None]
"""Findings as they are made, each with its plan's number; closing the generator stops the work."""

Begin = Callable[[int, Target], None]
"""Called before each matrix, or each task, with the number of the plan."""


def detect_in_turn(
    batch: AdapterBatch,
    groups: Sequence[SharedMatrices],
    options: DetectionOptions,
    device: torch.device,
    resident: int,
    counts: Sequence[int],
    monitor: Monitor,
    begin: Begin,
) -> FindingStream:
    """Detect in one matrix at a time, in this process.

    Parameters
    ----------
    groups
        The matrices; there may be fewer than in the batch.
    resident
        Bytes in memory between two steps; see `resident_bytes`.
    counts
        Number of torch's threads for each plan, on which the last bits of findings depend.
    """
    plans = batch.plans

    def load(group: SharedMatrices) -> Weight | None:
        i, target = group[0]
        weight = plans[i].weights[target.tensor]
        in_memory = weight.remote or any(
            best_way(plans[i], t, options, resident) is not Way.BLOCKS for i, t in group
        )
        return weight.load() if in_memory else None

    # A large matrix after a small one is not read in time. Mapped weights may be read two ahead; other memory must not grow.
    mapped = device.type == "cpu" and not any(
        plans[i].weights[t.tensor].load_bytes for g in groups for i, t in g
    )
    with contextlib.closing(read_ahead(groups, load, 2 if mapped else 1)) as stream:
        for group, prefetched in stream:
            for i, target in group:
                begin(i, target)
                with threads(counts[i]):
                    finding = detect_matrix(
                        plans[i], target, options, device, resident, prefetched, monitor
                    )
                yield i, finding


def total_cost(matrices: Iterable[tuple[int, Target]], options: DetectionOptions) -> int:
    """Estimate the units of work for some matrices."""
    return sum(options.cost(target.module.shape) for _, target in matrices)


TASK_COST = 1_000_000_000
"""Units of cost (see `detection.solvers.cost`; about a second) from which a task gets no more matrices."""

TASK_MATRICES = 8
"""Most matrices of a task: a killed run loses the matrices of its unfinished tasks."""


def detect_groups(
    batch: AdapterBatch,
    monitor: Monitor,
    groups: Sequence[Sequence[tuple[int, str]]],
    options: DetectionOptions,
    device: str,
    resident: int,
    count: int,
) -> list[tuple[int, MatrixFinding]]:
    """Detect in the matrices of a task, each given by its plan's number and its tensor's name."""
    targets = [{target.tensor: target for target in plan.targets} for plan in batch.plans]
    todo = [[(i, targets[i][name]) for i, name in group] for group in groups]
    counts = [count] * len(batch.plans)
    results = [
        *detect_in_turn(
            batch, todo, options, choose_device(device), resident, counts, monitor, lambda *_: None
        )
    ]
    for i in sorted({i for i, _ in results}):
        batch.plans[i].check_unchanged()
    return results


def _divided(
    groups: Iterable[SharedMatrices], options: DetectionOptions, enough: int
) -> Iterator[list[SharedMatrices]]:
    """Divide groups among tasks: each but the last costs enough, or is full."""
    task = list[SharedMatrices]()
    done = 0
    for group in groups:
        task.append(group)
        done += total_cost(group, options)
        if done >= enough or len(task) == TASK_MATRICES:
            yield task
            task = []
            done = 0
    if task:
        yield task


def detect_on_workers(
    batch: AdapterBatch,
    groups: Sequence[SharedMatrices],
    options: DetectionOptions,
    run: Run,
    resident: int,
    counts: Sequence[int],
    begin: Begin,
) -> FindingStream:
    """Detect as `detect_in_turn` does, but on workers: a task is matrices in the base's file order with one number of threads."""
    assert run.workers is not None
    inputs = run.task_inputs(batch)
    step = partial(detect_groups, options=options, device=str(run.device), resident=resident)
    tasks = dict[int, Task[list[tuple[int, MatrixFinding]]]]()
    firsts = list[tuple[int, Target]]()
    enough = min(
        TASK_COST, sum(total_cost(group, options) for group in groups) // (4 * run.workers.at_once)
    )
    for count in sorted(set(counts)):
        with_count = (
            [(i, target) for i, target in group if counts[i] == count] for group in groups
        )
        for task_groups in _divided(filter(None, with_count), options, enough):
            names = [[(i, target.tensor) for i, target in group] for group in task_groups]
            plan_number, first = task_groups[0][0]
            tasks[len(tasks)] = Task(
                inputs, count, first.tensor, partial(step, groups=names, count=count)
            )
            firsts.append((plan_number, first))
    with contextlib.closing(
        run.workers.run(tasks, run.monitor, lambda number: begin(*firsts[number]))
    ) as results:
        for _, findings in results:
            yield from findings


def shared(
    workers: Workers, batch: AdapterBatch, options: DetectionOptions, resident: int
) -> DetectionOptions:
    """Divide the allowed memory among this process and its workers; see `Workers.budget`."""
    results = [kept_bytes(plan, target, options) for plan in batch.plans for target in plan.targets]
    nbytes = resident_bytes(batch) + workers.at_once * TASK_MATRICES * max(results, default=0)
    needs = detection_estimates(batch.plans, options, resident)
    return replace(options, max_memory=workers.budget(options.max_memory, nbytes, needs))


@dataclass
class FindingsWriter:
    """Findings of one plan on the way to a file: records of matrices in a journal, and the file made of them.

    Attributes
    ----------
    head
        What the findings are made from.
    finished
        The file's findings if it exists already.
    file
        The file, with its journal and lock.
    resumed
        Whether the run goes on from a journal.
    threads
        Number of torch's threads for the matrices: the number with which the run began, even if it is resumed elsewhere, because
        the last bits of findings depend on it.
    """

    plan: Plan
    path: Path
    head: Findings
    finished: Findings | None
    file: transaction.ResumableFile
    resumed: bool = False
    threads: int = 0

    @property
    def state(self) -> str:
        """Say what a run will do: ``new``, ``resume`` or ``done``."""
        if self.finished is not None:
            return "done"
        return "resume" if self.file.is_begun() else "new"

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """Lock the file, resume or begin its run, and write it if the block does not raise."""
        with self.file.begun() as (self._journal, self.resumed):
            self._records = {self._read(i)[1]["tensor"]: i for i in range(1, len(self._journal))}
            self._seconds: dict[str, float | None] = {}
            self.threads = thread_count(json.loads(self._journal[0]).get("threads"))
            yield
            self.write()

    def _read(self, i: int) -> tuple[Header, dict[str, Any]]:
        """Read the header and the figures of a record, which is a safetensors file for one matrix."""
        raw = self._journal[i]
        header = parse_header(raw[: 8 + int.from_bytes(raw[:8], "little")], len(raw), "journal")
        with contextlib.suppress(KeyError, TypeError, ValueError, RecursionError):
            figures: dict[str, Any] = json.loads(header.metadata["matrix"])
            check(figures, findings_module.FIGURES)
            if header.by_name.keys() == {
                f"{figures['tensor']}/{key}" for key in findings_module.ARRAYS
            }:
                return header, figures
        raise OutputError(
            f"{self._journal.path}: its record {i} is of another version; --no-resume starts over"
        )

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._records

    def __len__(self) -> int:
        return len(self._records)

    def add(self, finding: MatrixFinding) -> None:
        """Append one matrix durably to the journal."""
        arrays = finding.arrays()
        _, raw = layout(header_entries(arrays), {"matrix": json.dumps(finding.figures())})
        self._journal.append(raw + b"".join(as_bytes(t) for t in arrays.values()))
        self._records[finding.tensor] = len(self._journal) - 1
        self._seconds[finding.tensor] = finding.seconds

    def write(self) -> None:
        """Write the file, once all matrices of a plan are recorded; it gets its name only if the inputs have not changed."""
        records = [
            (i, *self._read(i))
            for i in (self._records[target.tensor] for target in self.plan.targets)
        ]
        homes = {
            info.name: (i, header, info) for i, header, _ in records for info in header.tensors
        }
        arrays = [(info.name, info.dtype, info.shape) for *_, info in homes.values()]

        def source(info: TensorInfo) -> Iterator[Buffer]:
            i, header, entry = homes[info.name]
            yield self._journal.part(
                i, header.data_start + entry.start, header.data_start + entry.end
            )

        shard = self.head.file_plan(self.path.name, [figures for *_, figures in records], arrays)
        write_sealed(self.path.parent, shard, source, self.plan.check_unchanged)

    def findings(self) -> Findings:
        """Read the findings; seconds are this run's."""
        if self.finished is not None:
            return self.finished
        findings = load_findings(self.path)
        return replace(
            findings,
            matrices=tuple(replace(m, seconds=self._seconds.get(m.tensor)) for m in findings),
        )


FIGURES_BYTES = 1800
"""Upper bound of the bytes of a matrix's figures and of its arrays' entries in a header, without names."""


def findings_bytes(plan: Plan, options: DetectionOptions) -> int:
    """Bound the size of a findings file, and of the journal beside it, with every direction an intruder and degenerate."""
    head = Findings.of(plan, options)
    nbytes = 4096 + 2 * len(json.dumps([head.base, head.adapter, head.sources, options.as_dict()]))
    for target in plan.targets:
        m, n = target.module.shape
        k = options.directions(target.module.shape)
        names = (1 + len(findings_module.ARRAYS)) * len(json.dumps(target.tensor)) + len(
            json.dumps(target.module.name)
        )
        values = (
            (m + n + 1) * plan.weights[target.tensor].compute.itemsize
            + 8 * (len(findings_module.ARRAYS) - 3)
            + 12
        )
        nbytes += FIGURES_BYTES + 2 * names + k * values
    return nbytes


def detect_all(
    batch: AdapterBatch,
    options: DetectionOptions,
    run: Run,
    resident: int,
    writers: Sequence[FindingsWriter] = (),
) -> FindingStream:
    """Detect in every target of a batch, in the base's file order, in this process or on the run's workers.

    A matrix that several plans change is read once for all of them.

    Parameters
    ----------
    resident
        Bytes in memory between two steps; see `resident_bytes`.
    writers
        Writers of each plan's findings: matrices that they already have are skipped, and they set the number of torch's threads.
    """
    plans = batch.plans
    counts = [writer.threads for writer in writers] or [torch.get_num_threads()] * len(plans)
    check_budget(detection_estimates(plans, options, resident), options.max_memory)
    groups = batch.matrices(
        lambda member: not writers or member.target.tensor not in writers[member.plan]
    )
    total = sum(total_cost(enumerate(plan.targets), options) for plan in plans)
    progress = Progress(run.monitor, "detect", total, batch.matrix_count)
    todo = [member for group in groups for member in group]
    progress.add(total - total_cost(todo, options), batch.matrix_count - len(todo))
    names = [plan.adapter.path.absolute().name if len(plans) > 1 else "" for plan in plans]

    def begin(i: int, target: Target) -> None:
        progress.begin(target.tensor, names[i])

    if run.workers is not None:
        stream = detect_on_workers(batch, groups, options, run, resident, counts, begin)
    else:
        stream = detect_in_turn(
            batch, groups, options, run.device, resident, counts, run.monitor, begin
        )
    with contextlib.closing(stream):
        for i, finding in stream:
            yield i, finding
            progress.add(options.cost(finding.shape))
    progress.end()


def detect_in_memory(batch: AdapterBatch, options: DetectionOptions, run: Run) -> list[Findings]:
    """Detect and keep each plan's findings in memory, which the budget includes."""
    memory = sum(kept_bytes(plan, t, options) for plan in batch.plans for t in plan.targets)
    by_tensor = {
        (i, m.tensor): m for i, m in detect_all(batch, options, run, resident_bytes(batch) + memory)
    }
    results = [
        Findings.of(p, options, [by_tensor[i, t.tensor] for t in p.targets])
        for i, p in enumerate(batch.plans)
    ]
    run.monitor.warn(warning for findings in results for warning in findings.warnings)
    return results


def detect_to_files(
    batch: AdapterBatch, paths: Sequence[Path], options: DetectionOptions, run: Run, resident: int
) -> list[Findings]:
    """Detect, journal each matrix, and write each plan's findings file; seconds are this run's.

    Finished findings of exactly these plans stay unchanged, but their modification times are updated. Missing directories are created.

    Parameters
    ----------
    resident
        Bytes in memory between two steps; see `resident_bytes`.
    """
    monitor = run.monitor
    writers = plan_findings(batch, paths, options, run, resident)
    todo = [writer for writer in writers if writer.finished is None]
    for writer in writers:
        if writer.finished is not None:
            transaction.touch_finished(writer.path, monitor)
    with contextlib.ExitStack() as stack:
        for writer in todo:
            stack.enter_context(writer.begun())
        if resumed := [writer for writer in todo if writer.resumed]:
            monitor.resuming(
                sum(map(len, resumed)),
                sum(len(writer.plan.targets) for writer in resumed),
                "matrix",
            )
        if todo:
            now = torch.get_num_threads()
            for count in sorted({writer.threads for writer in todo} - {now}):
                text = f"goes on with {counted(count, 'thread')}, as it began; --no-resume starts over with {now}"
                monitor.note(text)
            pending = AdapterBatch(batch.base, tuple(writer.plan for writer in todo))
            for i, finding in detect_all(pending, options, run, resident, todo):
                todo[i].add(finding)
        monitor.checkpoint()
    for writer in todo:
        monitor.outputs[writer.path] = "resumed" if writer.resumed else "written"
    results = [writer.findings() for writer in writers]
    monitor.warn(warning for findings in results for warning in findings.warnings)
    return results


@contextlib.contextmanager
def naming_inputs(plan: Plan, paths: Sequence[Path], overwrite: bool) -> Iterator[None]:
    """If an output would replace an input, raise an error that names the input, instead of one about an unknown file."""
    try:
        yield
    except OutputExistsError:
        if overwrite:
            plan.refuse_overwriting(paths)
        raise


def plan_findings(
    batch: AdapterBatch, paths: Sequence[Path], options: DetectionOptions, run: Run, resident: int
) -> list[FindingsWriter]:
    """Check before detection where findings go, which are finished, and whether the others fit on the disk with their journals."""
    check_budget(detection_estimates(batch.plans, options, resident), options.max_memory)
    writers = list[FindingsWriter]()
    needed = 0
    for plan, path in zip(batch.plans, paths, strict=True):
        head = Findings.of(plan, options)
        made_from = head.made_from(target.tensor for target in plan.targets)
        with naming_inputs(plan, [path], run.overwrite):
            finished = _finished(plan, path, made_from, run.overwrite)
        # The last bits depend on the number of threads; without any matrix, a resumed run chooses it.
        start = {
            "plan": made_from,
            "version": __version__,
            "stamps": plan.detection_stamps(),
            "threads": torch.get_num_threads(),
        }
        file = transaction.ResumableFile(path, start, run.resume, run.overwrite, records=1)
        writers.append(FindingsWriter(plan, path, head, finished, file))
        if finished is None:
            plan.refuse_overwriting([path])
            # Files of an interrupted run: usable ones are reused, and the others are removed first.
            journal = transaction.journal_of(path)
            partials = (
                partials_of(path.parent, {path.name, journal.name}) if path.parent.is_dir() else ()
            )
            needed += 2 * findings_bytes(plan, options) - sum(
                map(transaction.allocated_bytes, (journal, *partials))
            )
    if todo := [writer.path for writer in writers if writer.finished is None]:
        transaction.check_space(todo[0].parent if len(todo) > 1 else todo[0], needed, at_most=True)
    return writers


def _finished(plan: Plan, path: Path, made_from: str, overwrite: bool) -> Findings | None:
    """Find the finished findings of exactly this plan, without writing; return None if they do not exist yet or are to be replaced.

    Raises
    ------
    OutputError
        If another file exists at the path, or it cannot be written.
    """
    transaction.check_file_path(path, FILE_NAME, transaction.journal_of(path).name)
    if path.suffix != ".safetensors":
        raise UsageError(
            f"{path}: expected a name that ends in .safetensors, such as {path}.safetensors"
        )
    for source in plan.inputs:
        if source.resolve() in (path.resolve(), *path.resolve().parents):
            raise OutputError(
                f"{path}: lies inside the input {source}; choose an output outside it"
            )
    if not transaction.is_taken(path):
        return None
    if not findings_module.is_findings_file(path):
        raise transaction.not_own(path, "findings")
    if overwrite:
        return None
    try:
        findings = load_findings(path)
    except FormatError as e:
        raise transaction.holds(path, "findings that cannot be read") from e
    if findings.made_from() != made_from:
        raise transaction.holds(path, "findings of other inputs or options")
    return findings
