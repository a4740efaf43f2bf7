"""Forecast what a command needs: memory, bytes and disk from headers alone, and time from a short probe of this machine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from streamer.detection.cost import Way, chosen_solver, cost
from streamer.detection.detection_memory import best_way, detection_bytes, float64_way
from streamer.detection.findings_size import FindingsSize, findings_bytes
from streamer.detection.options import DetectionOptions
from streamer.errors import NumericError, UnsupportedError
from streamer.events import Event, Monitor
from streamer.forecast.calibration import decoding_pace, detection_pace, factor_cost, factor_pace, writing_pace
from streamer.json_types import Amount, Count, Keywords
from streamer.linalg.operators import Delta
from streamer.linalg.svd import OVERSAMPLING
from streamer.methods import make_method
from streamer.output.adapter_writer import AdapterWriter
from streamer.output.job import FindingsToMake, Job
from streamer.output.model_writer import ModelWriter
from streamer.output.output_spec import Writer
from streamer.output.write import resident_of
from streamer.plan.batch import AdapterBatch
from streamer.plan.memory_estimate import resident_bytes
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.storage.tensor_file import sampled_bytes
from streamer.weights.base import Weight
from streamer.workers.engine import Workers

TIMED = {"dense": 3, "certified": 1}
"""Number of shapes on which a solver is timed: `detection.cost.cost` predicts the certified solver's time on another shape to a tenth,
but the dense solver's only to a factor of two."""

NORMS = 2
"""Approximate number of norms of a delta in factors that a detection's figures need."""


@dataclass(frozen=True)
class Forecast:
    """Forecast for one command, from its start.

    Reads include headers, the samples and digests that identify inputs, and the tensors as often as they are read: a merge that detects
    first reads matrices twice. Small files and an output's record are not included. The time assumes that the processors stay as busy as
    now, that the disk keeps up, and that no matrix needs the dense solver unexpectedly; starting the process and the checks of a dry run
    take additional time.
    """

    # fmt: off
    peak_memory_bytes: Annotated[Count, "Largest anonymous memory of the process in bytes, if no matrix needs the dense solver or float64."]
    escalated_memory_bytes: Annotated[Count, "The same if the largest matrix needs the dense solver or float64."]
    read_bytes: Annotated[Count, "Bytes to read from base, adapter and findings."]
    network_bytes: Annotated[Count, "Bytes of these that cross the network, for a base at an address."]
    write_bytes: Annotated[Count, "Bytes to write: exact for models and adapters, an upper bound for findings."]
    temporary_bytes: Annotated[Count, "Largest number of bytes of temporary files beside the output."]
    seconds: Annotated[Amount | None, "Wall time in s, estimated from a short benchmark of this machine; null if it is not estimated."]
    threads: Annotated[int, Keywords(minimum=1), "CPU threads assumed for the time."] = field(default_factory=torch.get_num_threads)
    device_memory_bytes: Annotated[Count, "Of the largest memory, bytes on the GPU that --device runs the model on; else 0."] = 0
    # fmt: on


ForecastRecord = Annotated[dict[str, Any], Forecast]
"""A forecast as JSON."""


def forecast_detection(plan: Plan, options: DetectionOptions, device: torch.device, resident: int, size: FindingsSize,
                       monitor: Monitor | None = None) -> Forecast:  # fmt: skip
    """Forecast what `detect` needs.

    Parameters
    ----------
    resident
        Bytes in memory between two steps; see `resident_bytes`.
    size
        See `findings_bytes`.
    monitor
        Receives events about the probe.
    """
    monitor = monitor or Monitor()
    _tell(monitor, "memory of each matrix")
    works = [_Work.of(plan, target, options, resident) for target in plan.targets]
    return Forecast(
        max(work.memory for work in works),
        max(work.escalated for work in works),
        _identified_bytes(plan) + _detected_bytes(plan),
        network_bytes(plan, _base_bytes(plan)),
        *size,
        _detection_seconds(plan, works, device, monitor),
    )


def forecast_output(writer: Writer, resident: int, detects: bool | None = None, monitor: Monitor | None = None) -> Forecast:  # fmt: skip
    """Forecast what `mitigate` or `merge` needs.

    Parameters
    ----------
    resident
        Bytes in memory between two steps; see `resident_of`.
    detects
        Whether it detects first; by default as in the job. False forecasts as if findings existed.
    monitor
        As for `forecast_detection`.
    """
    monitor = monitor or Monitor()
    job, output = writer.spec.job, writer.spec.output
    plan = job.plan
    detects = job.detects if detects is None else detects
    memory = escalated = max(estimate.nbytes for estimate in writer.estimates(resident))
    read = _identified_bytes(plan) + _adapter_bytes(plan) + sum(p.stat().st_size for _, p in writer.spec.copies)
    read += writer.spec.base_bytes + job.findings.nbytes
    network = writer.spec.base_bytes
    seconds = _writing_seconds(writer, monitor)
    if detects:
        first = forecast_detection(plan, job.detection, job.device, resident, job.findings_size, monitor)
        memory, escalated = max(memory, first.peak_memory_bytes), max(escalated, first.escalated_memory_bytes)
        read += _detected_bytes(plan)
        network += _base_bytes(plan)
        seconds = None if seconds is None or first.seconds is None else seconds + first.seconds
    temporary = output.temporary_bytes if detects else 0
    return Forecast(memory, escalated, read, network_bytes(plan, network), output.total_bytes, temporary, seconds)


def forecast_commands(
    plan: Plan, device: torch.device, monitor: Monitor | None = None
) -> dict[str, Forecast | UnsupportedError]:
    """Forecast each command with its defaults, `mitigate` and `merge` from findings; or return the error that refuses it."""
    detection = DetectionOptions()
    job = Job(plan, make_method(None), detection, device, FindingsToMake(detection))
    resident = resident_bytes(AdapterBatch(plan.base, (plan,)))
    first = forecast_detection(plan, detection, device, resident, findings_bytes(plan, detection), monitor)
    commands: dict[str, Forecast | UnsupportedError] = {"detect": first}
    writers: dict[str, Callable[[Job, Path], Writer]] = {"mitigate": AdapterWriter, "merge": ModelWriter}
    for command, make in writers.items():
        try:
            writer = make(job, Path("output"))
            commands[command] = forecast_output(writer, resident_of([writer]), detects=False, monitor=monitor)
        except UnsupportedError as e:
            commands[command] = e
    return commands


def _tell(monitor: Monitor, what: str) -> None:
    """Report what is measured next; the number of such steps depends on their results."""
    monitor.checkpoint()
    monitor.emit(Event("probe", what))


def _identified_bytes(plan: Plan) -> int:
    """Count the bytes read to identify the inputs: headers, samples of models, and the whole adapter."""
    return sampled_bytes(plan.base.files.values()) + plan.adapter.identity_bytes


def _adapter_bytes(plan: Plan) -> int:
    return sum(file.header.data_bytes for file in plan.adapter.files)


def _detected_bytes(plan: Plan) -> int:
    """Count the bytes of tensors that detection reads."""
    return _adapter_bytes(plan) + _base_bytes(plan)


def _base_bytes(plan: Plan) -> int:
    """Count the bytes of the matrices that the adapter changes."""
    return sum(plan.weights[target.tensor].nbytes for target in plan.targets)


def network_bytes(plan: Plan, nbytes: int) -> int:
    """Count the bytes that cross the network when this many bytes of the base's tensors are read."""
    base = plan.base
    if not base.remote:
        return 0
    return base.to_download or sampled_bytes(base.files.values()) + nbytes


@dataclass(frozen=True)
class _Work:
    """Detection in one matrix: its solver and the memory that it needs."""

    target: Target
    k: int
    rank: int | None
    solver: str
    blocks: bool
    memory: int
    escalated: int

    @classmethod
    def of(cls, plan: Plan, target: Target, options: DetectionOptions, resident: int) -> _Work:
        shape, module = target.module.shape, target.module
        k, ways = options.directions(shape), detection_bytes(plan, target, options, resident)
        way = best_way(plan, target, options, resident)
        solver = chosen_solver(shape, k, options.solver, way.allows_dense)
        if k + OVERSAMPLING >= min(shape):
            solver = "dense"
        expected = ways[Way.WHOLE] if way.allows_dense and solver == "certified" else ways[way]
        last = "dense" if way.allows_dense else "certified"
        again = float64_way(plan, target, options, resident, last)
        rank = module.factor_rank if module.low_rank else None
        return cls(target, k, rank, solver, way is Way.BLOCKS, expected, max(ways[way], again[1] if again else 0))

    @property
    def shape(self) -> tuple[int, int]:
        return self.target.module.shape

    @property
    def cost(self) -> int:
        return cost(self.shape, self.k, self.solver)


def _detection_seconds(plan: Plan, works: Sequence[_Work], device: torch.device, monitor: Monitor) -> float | None:
    """Estimate the solvers' time and the time to convert each matrix to the computing dtype; the next one is read meanwhile."""
    if device.type != "cpu" or plan.base.remote:  # the speed of the device or network is unknown
        return None
    seconds, decoded = 0.0, defaultdict[str, list[Weight]](list)
    alike = defaultdict[tuple[str, bool, bool], list[_Work]](list)
    for work in works:
        weight = plan.weights[work.target.tensor]
        if not work.blocks:
            decoded[weight.label].append(weight)
        elif weight.quantized:  # decoded again for each product
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
    # Figures of each matrix: their cost grows with the square of the rank, which is scaled down when the solver is timed.
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


def _writing_seconds(writer: Writer, monitor: Monitor) -> float | None:
    """Estimate the time for all output tensors and each matrix's metrics; None for deltas that cannot be added a few rows at a time."""
    plan = writer.spec.job.plan
    if plan.base.remote and writer.spec.base_bytes:
        return None
    if any(not target.module.low_rank for target in plan.targets):
        return None
    _tell(monitor, "norms of mitigated deltas")
    seconds = _metrics_seconds(writer.spec.job, writer.spec.norms)

    def unchanged(target: Target) -> tuple[Delta, Delta]:
        delta = plan.delta(target)
        return delta, delta

    if (timed := writer.timed()) is None:
        return None
    for name, recipe, nbytes in timed:
        _tell(monitor, f"writing {name}")
        try:
            seconds += writing_pace(recipe, unchanged) * nbytes
        except NumericError:  # the run itself will report where
            return None
    return seconds


def _metrics_seconds(job: Job, times: int) -> float:
    """Estimate the time for the norms of each matrix's Δ and Δ', and for its projection."""
    works = [(t.module.shape, t.module.factor_rank, job.intruders(t)) for t in job.plan.targets]
    units = sum(factor_cost(shape, r) + (times - 1) * factor_cost(shape, r + q) for shape, r, q in works)
    shape, rank, intruders = max(works, key=lambda work: factor_cost(work[0], work[1] + work[2]))
    return factor_pace(shape, rank + intruders) * units


def on_workers(forecast: Forecast, workers: Workers | None, resident: int) -> Forecast:
    """Forecast the same work on workers of this machine beside this process; without workers, return the forecast unchanged."""
    processes = None if workers is None else workers.processes
    if processes is None:
        return forecast
    return replace(
        forecast,
        peak_memory_bytes=resident + processes * forecast.peak_memory_bytes,
        escalated_memory_bytes=resident + processes * forecast.escalated_memory_bytes,
        seconds=None if forecast.seconds is None else forecast.seconds / processes,
    )


def together(planned: Sequence[Forecast | None], shared: int = 0) -> Forecast | None:
    """Add up forecasts; None entries have nothing to do, and the result is None if all are.

    The steps of different outputs take turns, and each forecast counts the tables of all adapters, so the memory is the maximum.

    Parameters
    ----------
    shared
        Bytes that several of them count, except the first time.
    """
    forecasts = [forecast for forecast in planned if forecast]
    if not forecasts:
        return None
    seconds = [f.seconds for f in forecasts if f.seconds is not None]
    return Forecast(
        peak_memory_bytes=max(f.peak_memory_bytes for f in forecasts),
        escalated_memory_bytes=max(f.escalated_memory_bytes for f in forecasts),
        read_bytes=sum(f.read_bytes for f in forecasts) - shared,
        network_bytes=sum(f.network_bytes for f in forecasts),
        write_bytes=sum(f.write_bytes for f in forecasts),
        temporary_bytes=sum(f.temporary_bytes for f in forecasts),
        seconds=sum(seconds) if len(seconds) == len(forecasts) else None,
    )


def shared_by_detections(batch: AdapterBatch) -> int:
    """Count the bytes of matrices that several plans change, for every plan except the first."""
    return sum(batch.plans[i].weights[target.tensor].nbytes for group in batch.matrices() for i, target in group[1:])


def shared_by_merges(writers: Sequence[Writer]) -> int:
    """Count the bytes of the base's files, for every output except the first, plus the bytes that detection shares."""
    jobs = [writer.spec.job for writer in writers]
    if not jobs:
        return 0
    base = sum(file.header.file_bytes for job in jobs[1:] for file in job.plan.base.files.values())
    return base + shared_by_detections(AdapterBatch(jobs[0].plan.base, tuple(job.plan for job in jobs if job.detects)))
