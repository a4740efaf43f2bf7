"""What a command will take, before it is run: memory, bytes and disk from headers alone, and time from a short probe of this machine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from streamer.cli.calibration import decoding_pace, detection_pace, factor_cost, factor_pace, writing_pace
from streamer.detection.memory import best_way, detection_bytes
from streamer.detection.options import DetectionOptions
from streamer.detection.run import findings_bytes, matrices_of
from streamer.detection.solvers import cheaper, cost
from streamer.errors import NumericError, UnsupportedError
from streamer.events import Event, Monitor
from streamer.linalg.deltas import Delta
from streamer.linalg.svd import OVERSAMPLING
from streamer.output.adapter_writer import AdapterSink
from streamer.output.job import Job, ModelSink, Sink
from streamer.output.merged_model import Output
from streamer.output.mitigation import MitigationOptions
from streamer.output.recipes import AddBias, CopyBytes, Recipe, ReplaceRows, Requantize, RowSlice, Stack
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.storage.tensor_file import sampled_bytes
from streamer.weights.base import QuantizedWeight, Weight

TIMED = {"dense": 3, "certified": 1}
"""Shapes that a solver is timed on: `solvers.cost` is within a tenth of what the certified one takes from one shape to another, and
only within a factor of two for the dense one."""

NORMS = 2
"""Norms of a delta in factors that the figures of a detection take, about."""


@dataclass(frozen=True)
class Forecast:
    """What one command takes, from the beginning.

    Attributes
    ----------
    peak_memory_bytes
        Anonymous memory of the whole process at its peak, an upper estimate, where no matrix is left to the dense solver that
        another one is meant for.
    escalated_memory_bytes
        The same where the dense solver must decide the largest matrix after all; within the budget, if there is one.
    read_bytes
        Of base, adapter and findings: headers, the samples and digests that tell them from others, and the tensors, as often as
        they are read: by a merge that detects first, those that it detects in twice. Small files are left out.
    write_bytes
        Of the output: exact for models and adapters (without the record ``streamer.json``), for findings at most.
    temporary_bytes
        What stands beside the output for a while, at most: a journal, findings that the command makes for itself.
    seconds
        Estimated from a probe, for processors as busy as now, a disk that keeps up, and no matrix that needs the dense solver after
        all. Other work on them makes it longer, as it does the run, though not by the same factor. None where it is not estimated. The
        start of the process and the checks of a dry run come on top.
    threads
        That the time is for.
    """

    peak_memory_bytes: int
    escalated_memory_bytes: int
    read_bytes: int
    write_bytes: int
    temporary_bytes: int
    seconds: float | None
    threads: int = field(default_factory=torch.get_num_threads)


def forecast_detection(
    plan: Plan, options: DetectionOptions, device: torch.device, monitor: Monitor | None = None
) -> Forecast:
    """What `detect` takes; the monitor is told of the probe."""
    monitor = monitor or Monitor()
    _tell(monitor, "memory of each matrix")
    works = [_Work.of(plan, target, options) for target in plan.targets]
    written, journal = findings_bytes(plan, options)
    return Forecast(
        max(work.memory for work in works),
        max(work.escalated for work in works),
        _identified_bytes(plan) + _detected_bytes(plan),
        written,
        journal,
        _detection_seconds(plan, works, device, monitor),
    )


def forecast_output(sink: Sink, detects: bool | None = None, monitor: Monitor | None = None) -> Forecast:
    """What `mitigate` or `merge` takes.

    Parameters
    ----------
    detects
        Whether it detects first; by default what the job says. False asks for a forecast as if findings were there.
    monitor
        Is told of the probe.
    """
    monitor = monitor or Monitor()
    job, output = sink.job, sink.output
    plan, merges = job.plan, isinstance(sink, ModelSink)
    detects = job.detects if detects is None else detects
    memory = escalated = max(need.nbytes for need in sink.needs())
    read = _identified_bytes(plan) + _adapter_bytes(plan) + sum(p.stat().st_size for _, p in sink.copies)
    if merges:
        read += plan.base.data_bytes
    else:
        read += sum(plan.weights[t.tensor].nbytes for t in plan.targets if not t.module.low_rank)
    if job.findings is not None:
        factors = (f for m in job.findings for f in (m.detection.U, m.detection.S, m.detection.Vh))
        read += sum(factor.nbytes for factor in factors)
    seconds = _writing_seconds(sink, monitor)
    if detects:
        first = forecast_detection(plan, job.detection, job.device, monitor)
        memory, escalated = max(memory, first.peak_memory_bytes), max(escalated, first.escalated_memory_bytes)
        read += _detected_bytes(plan)
        seconds = None if seconds is None or first.seconds is None else seconds + first.seconds
    return Forecast(memory, escalated, read, output.total_bytes, output.temporary_bytes if detects else 0, seconds)


def forecast_commands(
    plan: Plan, device: torch.device, monitor: Monitor | None = None
) -> dict[str, Forecast | UnsupportedError]:
    """Say what each command takes with its defaults, `mitigate` and `merge` from findings; or with which error it is refused."""
    detection = DetectionOptions()
    job = Job(plan, MitigationOptions(), detection, device)
    commands: dict[str, Forecast | UnsupportedError] = {"detect": forecast_detection(plan, detection, device, monitor)}
    for sink in (AdapterSink, ModelSink):
        try:
            commands[sink.command] = forecast_output(sink(job, Path("output")), detects=False, monitor=monitor)
        except UnsupportedError as e:
            commands[sink.command] = e
    return commands


def _tell(monitor: Monitor, what: str) -> None:
    """Say what is measured next; how many such steps there are depends on what they find."""
    monitor.checkpoint()
    monitor.emit(Event("probe", what))


def _identified_bytes(plan: Plan) -> int:
    """What is read to know the inputs by: headers, samples of models, and the whole of an adapter."""
    return sampled_bytes(plan.base.files.values()) + plan.adapter.identity_bytes


def _adapter_bytes(plan: Plan) -> int:
    return sum(file.header.data_bytes for file in plan.adapter.files)


def _detected_bytes(plan: Plan) -> int:
    """What detection reads of the tensors."""
    return _adapter_bytes(plan) + sum(plan.weights[target.tensor].nbytes for target in plan.targets)


@dataclass(frozen=True)
class _Work:
    """Detection in one matrix: how, and what memory that takes."""

    target: Target
    k: int
    rank: int | None
    solver: str
    blocks: bool
    memory: int
    escalated: int

    @classmethod
    def of(cls, plan: Plan, target: Target, options: DetectionOptions) -> _Work:
        shape, module = target.module.shape, target.module
        k, ways, way = (
            options.directions(shape),
            detection_bytes(plan, target, options),
            best_way(plan, target, options),
        )
        solver = options.solver
        if solver == "auto":
            solver = cheaper(shape, k) if way == "dense" else "certified"
        if k + OVERSAMPLING >= min(shape):
            solver = "dense"
        expected = ways["whole"] if way == "dense" and solver == "certified" else ways[way]
        rank = module.factor_rank if module.low_rank else None
        return cls(target, k, rank, solver, way == "blocks", expected, ways[way])

    @property
    def shape(self) -> tuple[int, int]:
        return self.target.module.shape

    @property
    def cost(self) -> int:
        return cost(self.shape, self.k, self.solver)


def _detection_seconds(plan: Plan, works: Sequence[_Work], device: torch.device, monitor: Monitor) -> float | None:
    """The solvers' time, and that of bringing each matrix to the computing dtype. The next one is read meanwhile."""
    if device.type != "cpu":
        return None
    seconds, decoded = 0.0, defaultdict[str, list[Weight]](list)
    alike = defaultdict[tuple[str, bool, bool], list[_Work]](list)
    for work in works:
        weight = plan.weights[work.target.tensor]
        if not work.blocks:
            decoded[weight.label].append(weight)
        elif isinstance(weight, QuantizedWeight):  # decoded again for each product
            return None
        alike[work.solver, work.rank is None, work.blocks].append(work)
    for (solver, _, blocks), group in alike.items():
        of_shape = defaultdict[tuple[int, int], list[_Work]](list)
        for work in group:
            of_shape[work.shape].append(work)
        by_cost = sorted(of_shape.values(), key=lambda same: sum(w.cost for w in same), reverse=True)
        timed = 0.0
        for same in by_cost[: TIMED[solver]]:
            work = same[0]
            _tell(monitor, f"{solver} solver, {work.shape[0]}x{work.shape[1]}")
            timed += detection_pace(work.shape, work.k, work.rank, solver, blocks) * sum(w.cost for w in same)
        known = sum(w.cost for same in by_cost[: TIMED[solver]] for w in same)
        seconds += timed * sum(w.cost for w in group) / known
    # The figures of each matrix: these grow with the square of the rank, which is scaled down where the solver is timed.
    factors = [(work.shape, work.rank) for work in works if work.rank is not None]
    if factors:
        _tell(monitor, "norms of deltas")
        units = sum(NORMS * factor_cost(shape, rank) for shape, rank in factors)
        seconds += factor_pace(*max(factors, key=lambda work: factor_cost(*work))) * units
    for label, weights in decoded.items():
        _tell(monitor, f"reading {label}")
        values = sum(w.matrix[0] * w.matrix[1] for w in weights)
        seconds += decoding_pace(max(weights, key=lambda w: w.nbytes)) * values
    return seconds


def _writing_seconds(sink: Sink, monitor: Monitor) -> float | None:
    """The time of all output tensors, and of the figures of each matrix; None for what is not summed a few rows at a time."""
    plan = sink.job.plan
    if any(not target.module.low_rank for target in plan.targets):
        return None
    _tell(monitor, "norms of mitigated deltas")
    seconds = _figures_seconds(sink.job, 2 if isinstance(sink, ModelSink) else 3)

    def unchanged(target: Target) -> tuple[Delta, Delta]:
        delta = plan.delta(target)
        return delta, delta

    if not isinstance(sink, ModelSink):
        _tell(monitor, "writing an adapter's tensors")
        part = max(plan.adapter.tensors.values(), key=lambda part: part.info.nbytes)
        return seconds + writing_pace(CopyBytes(part), unchanged) * sink.output.total_bytes
    sizes = {info.name: info.nbytes for shard in sink.shards.values() for info in shard.header.tensors}
    alike = defaultdict[type, list[Output]](list)
    for output in (o for outputs in sink.model.files.values() for o in outputs):
        few = isinstance(output.recipe, AddBias | ReplaceRows)
        alike[CopyBytes if few else _kind(output.recipe)].append(output)
    if Requantize in alike:  # in several passes over the whole
        return None
    for group in alike.values():
        _tell(monitor, f"writing tensors like {group[0].name}")
        largest = max(group, key=lambda o: sizes[o.name])
        try:
            pace = writing_pace(largest.recipe, unchanged)
        except NumericError:  # the run itself will say where
            return None
        seconds += pace * sum(sizes[o.name] for o in group)
    return seconds


def _kind(recipe: Recipe) -> type:
    """The recipe, or that of the matrices that it holds."""
    if isinstance(recipe, Stack):
        return _kind(recipe.recipes[0])
    return type(recipe.recipe if isinstance(recipe, RowSlice) else recipe)


def _figures_seconds(job: Job, times: int) -> float:
    """For each matrix, the norms of Δ and Δ', and its projection."""
    works = [(t.module.shape, t.module.factor_rank, job.intruders(t)) for t in job.plan.targets]
    units = sum(factor_cost(shape, r) + (times - 1) * factor_cost(shape, r + q) for shape, r, q in works)
    shape, rank, intruders = max(works, key=lambda work: factor_cost(work[0], work[1] + work[2]))
    return factor_pace(shape, rank + intruders) * units


def together(forecasts: Sequence[Forecast], shared: int = 0) -> Forecast | None:
    """The forecast of all; None if there is nothing to do.

    The steps of different outputs take turns, and each forecast counts the tables of all adapters: so the memory is the largest.

    Parameters
    ----------
    shared
        Bytes that several of them count, beyond the first.
    """
    if not forecasts:
        return None
    seconds = [f.seconds for f in forecasts if f.seconds is not None]
    return Forecast(
        peak_memory_bytes=max(f.peak_memory_bytes for f in forecasts),
        escalated_memory_bytes=max(f.escalated_memory_bytes for f in forecasts),
        read_bytes=sum(f.read_bytes for f in forecasts) - shared,
        write_bytes=sum(f.write_bytes for f in forecasts),
        temporary_bytes=sum(f.temporary_bytes for f in forecasts),
        seconds=sum(seconds) if len(seconds) == len(forecasts) else None,
    )


def shared_by_detections(plans: Sequence[Plan]) -> int:
    """Bytes of the matrices that several plans change, for each plan but the first."""
    uses = matrices_of(plans)
    return sum(plans[i].weights[target.tensor].nbytes for same in uses for i, target in same[1:])


def shared_by_merges(sinks: Sequence[Sink]) -> int:
    """Bytes of the base's files, for each output but the first, and what detection shares."""
    base = sum(file.header.file_bytes for sink in sinks[1:] for file in sink.job.plan.base.files.values())
    return base + shared_by_detections([sink.job.plan for sink in sinks if sink.job.detects])
