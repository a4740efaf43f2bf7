"""Forecast what a command takes: memory, bytes and disk from headers alone, and time from a short probe of this machine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from streamer.detection.cost import Way, chosen_solver, cost
from streamer.detection.findings_size import FindingsSize, findings_bytes
from streamer.detection.memory import best_way, detection_bytes, float64_way
from streamer.detection.options import DetectionOptions
from streamer.errors import NumericError, UnsupportedError
from streamer.events import Event, Monitor
from streamer.forecast.calibration import decoding_pace, detection_pace, factor_cost, factor_pace, writing_pace
from streamer.json_types import Amount, Count, Keywords
from streamer.linalg.operators import Delta
from streamer.linalg.svd import OVERSAMPLING
from streamer.methods import make_method
from streamer.output.adapter_writer import AdapterWriter
from streamer.output.job import Job, OwnFile
from streamer.output.model_writer import ModelWriter
from streamer.output.output_spec import Writer
from streamer.output.run import resident_of
from streamer.plan.batch import Batch
from streamer.plan.memory import resident_bytes
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.storage.tensor_file import sampled_bytes
from streamer.weights.base import Weight
from streamer.workers.engine import Workers

TIMED = {"dense": 3, "certified": 1}
"""Shapes that a solver is timed on: `detection.cost.cost` is within a tenth of what the certified one takes from one shape to another, and
only within a factor of two for the dense one."""

NORMS = 2
"""Norms of a delta in factors that the figures of a detection take, about."""


@dataclass(frozen=True)
class Forecast:
    """Forecast of one command, from its beginning.

    Reads are headers, the samples and digests that tell inputs from others, and the tensors, as often as they are read: by a merge that
    detects first, those that it detects in twice. Small files are left out, and the record of an output. Time is for processors as busy as
    now, a disk that keeps up, and no matrix that needs the dense solver after all; the start of the process and the checks of a dry run
    come on top.
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
    """Forecast what `detect` takes.

    Parameters
    ----------
    resident
        Bytes that stay in memory between two steps; see `resident_bytes`.
    size
        See `findings_bytes`.
    monitor
        Is told of the probe.
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
    """Forecast what `mitigate` or `merge` takes.

    Parameters
    ----------
    resident
        Bytes that stay in memory between two steps; see `resident_of`.
    detects
        Whether it detects first; by default what the job says. False asks for a forecast as if findings were there.
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
    """Say what each command takes with its defaults, `mitigate` and `merge` from findings; or with which error it is refused."""
    detection = DetectionOptions()
    job = Job(plan, make_method(None), detection, device, OwnFile(detection))
    resident = resident_bytes(Batch(plan.base, (plan,)))
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
    """Say what is measured next; how many such steps there are depends on what they find."""
    monitor.checkpoint()
    monitor.emit(Event("probe", what))


def _identified_bytes(plan: Plan) -> int:
    """Count the bytes that are read to identify the inputs: headers, samples of models, and the whole of an adapter."""
    return sampled_bytes(plan.base.files.values()) + plan.adapter.identity_bytes


def _adapter_bytes(plan: Plan) -> int:
    return sum(file.header.data_bytes for file in plan.adapter.files)


def _detected_bytes(plan: Plan) -> int:
    """Count the bytes that detection reads of the tensors."""
    return _adapter_bytes(plan) + _base_bytes(plan)


def _base_bytes(plan: Plan) -> int:
    """Count the bytes of the matrices that the adapter changes."""
    return sum(plan.weights[target.tensor].nbytes for target in plan.targets)


def network_bytes(plan: Plan, nbytes: int) -> int:
    """Count the bytes that cross the network, where so many of the base's tensors are read."""
    base = plan.base
    if not base.remote:
        return 0
    return base.to_download or sampled_bytes(base.files.values()) + nbytes


@dataclass(frozen=True)
class _Work:
    """Detection in one matrix: its solver, and what memory that takes."""

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
    """Estimate the solvers' time, and that of bringing each matrix to the computing dtype. The next one is read meanwhile."""
    if device.type != "cpu" or plan.base.remote:  # by a network of unknown pace
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


def _writing_seconds(writer: Writer, monitor: Monitor) -> float | None:
    """Estimate the time of all output tensors, and of the metrics of each matrix; None for what is not summed a few rows at a time."""
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
        except NumericError:  # the run itself will say where
            return None
    return seconds


def _metrics_seconds(job: Job, times: int) -> float:
    """Estimate the time of the norms of Δ and Δ' of each matrix, and of its projection."""
    works = [(t.module.shape, t.module.factor_rank, job.intruders(t)) for t in job.plan.targets]
    units = sum(factor_cost(shape, r) + (times - 1) * factor_cost(shape, r + q) for shape, r, q in works)
    shape, rank, intruders = max(works, key=lambda work: factor_cost(work[0], work[1] + work[2]))
    return factor_pace(shape, rank + intruders) * units


def on_workers(forecast: Forecast, workers: Workers | None, resident: int) -> Forecast:
    """Forecast the same on processes of this machine, beside this one; without any it stays as it is."""
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
    """Add up forecasts, of which None has nothing to do; None if all have.

    The steps of different outputs take turns, and each forecast counts the tables of all adapters: so the memory is the largest.

    Parameters
    ----------
    shared
        Bytes that several of them count, beyond the first.
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


def shared_by_detections(batch: Batch) -> int:
    """Count the bytes of the matrices that several plans change, for each plan but the first."""
    return sum(batch.plans[i].weights[target.tensor].nbytes for group in batch.matrices() for i, target in group[1:])


def shared_by_merges(writers: Sequence[Writer]) -> int:
    """Count the bytes of the base's files, for each output but the first, and what detection shares."""
    jobs = [writer.spec.job for writer in writers]
    if not jobs:
        return 0
    base = sum(file.header.file_bytes for job in jobs[1:] for file in job.plan.base.files.values())
    return base + shared_by_detections(Batch(jobs[0].plan.base, tuple(job.plan for job in jobs if job.detects)))
