"""Forecast what a command needs: memory, bytes and disk from headers, and time as its work divided by the rates of this machine.

The rates are those of one product and one read; no part of the job runs. Work is counted in multiply-adds and bytes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch

from streamer.detection.detect import best_way, detection_bytes, findings_bytes, float64_way
from streamer.detection.options import DetectionOptions
from streamer.detection.solvers import Way, chosen_solver, cost
from streamer.events import Event, Monitor
from streamer.json_types import Amount, Count, Keywords
from streamer.linalg.svd import OVERSAMPLING
from streamer.linalg.torch_state import CPU
from streamer.measuring.batches import TRANSFORMERS_BYTES, sweep_cost
from streamer.measuring.prepared import Prepared
from streamer.output.layout import Output
from streamer.plan.plan import AdapterBatch, Plan
from streamer.plan.targets import Target
from streamer.storage.atomic_file import views
from streamer.storage.checkpoint import Checkpoint, sampled_bytes
from streamer.workers import Workers

SIDE = 2048
TIMED_COLUMNS = 64
"""Sides of the product ``(SIDE, SIDE) (SIDE, COLUMNS)`` in float32 that is timed."""

PROBE_SECONDS = 0.3
"""Seconds for which the product repeats, and for which the base's largest tensor is read and hashed."""

MULTIPLY_ADDS_PER_SOLVER_UNIT = 30
"""Multiply-adds of the timed product that take as long as a unit of `detection.solvers.cost`."""

MULTIPLY_ADDS_PER_VALUE = 30
"""Multiply-adds of the timed product that take as long as the conversion or addition of one value."""

MULTIPLY_ADDS_PER_NORM_STEP = 30
"""Multiply-adds of the timed product that take as long as one multiply-add of a delta's norms."""

MULTIPLY_ADDS_PER_SWEEP_STEP = 1.2
"""Multiply-adds of the timed product that take as long as one multiply-add of a sweep with its share of attention, norms and softmax."""

START_SECONDS = 0.5
"""Time before a run's first sweep and after its last, in addition to a dry run's: the check of the logits, files."""


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
    seconds: Annotated[Amount | None, "Wall time in s, within a factor of 3: the work divided by measured rates; null if not estimated."]
    threads: Annotated[int, Keywords(minimum=1), "CPU threads assumed for the time."] = field(default_factory=torch.get_num_threads)
    device_memory_bytes: Annotated[Count, "Of the largest memory, bytes on the GPU that --device runs the model on; else 0."] = 0
    # fmt: on


ForecastRecord = Annotated[dict[str, Any], Forecast]
"""A forecast as JSON."""


class Rates(NamedTuple):
    """Speed of this machine at its current load: multiply-adds and bytes per second."""

    products: float
    nbytes: float


def measure_rates(base: Checkpoint, monitor: Monitor) -> Rates | None:
    """Time a product on torch's threads, and read and hash a part of the base; None for a base that streams over the network."""
    if base.remote:
        return None
    monitor.checkpoint()
    monitor.emit(Event("probe", "a product and a read"))
    W = torch.ones(SIDE, SIDE)
    block = torch.ones(SIDE, TIMED_COLUMNS)
    W @ block  # starts the threads
    products = 0
    began = time.perf_counter()
    while (product_seconds := time.perf_counter() - began) < PROBE_SECONDS:
        W @ block
        products += SIDE * SIDE * TIMED_COLUMNS
    file, info = max(
        ((f, t) for f in base.files.values() for t in f.header.tensors),
        key=lambda pair: pair[1].nbytes,
    )
    digest = hashlib.sha256()
    nbytes = 0
    began = time.perf_counter()
    for view in views(file.chunks(info)):
        digest.update(view)
        nbytes += len(view)
        if time.perf_counter() - began > PROBE_SECONDS:
            break
    return Rates(products / product_seconds, max(1, nbytes) / (time.perf_counter() - began))


def forecast_detection(
    plan: Plan, options: DetectionOptions, device: torch.device, resident: int, rates: Rates | None
) -> Forecast:
    """Forecast what `detect` needs.

    Parameters
    ----------
    resident
        Bytes in memory between two steps; see `resident_bytes`.
    rates
        None gives no time, as does a device other than the CPU, whose rate is unknown.
    """
    works = [_detection_work(plan, target, options, resident) for target in plan.targets]
    peaks, escalated, products = zip(*works, strict=True)
    read = _adapter_bytes(plan) + _base_bytes(plan)
    seconds = None
    if rates is not None and device == CPU and None not in products:
        seconds = sum(products) / rates.products + read / rates.nbytes
    nbytes = findings_bytes(plan, options)
    return Forecast(
        peak_memory_bytes=max(peaks),
        temporary_bytes=nbytes,
        seconds=seconds,
        escalated_memory_bytes=max(escalated),
        write_bytes=nbytes,
        read_bytes=_identified_bytes(plan) + read,
        network_bytes=network_bytes(plan, _base_bytes(plan)),
    )


def _detection_work(
    plan: Plan, target: Target, options: DetectionOptions, resident: int
) -> tuple[int, int, int | None]:
    """Estimate for one matrix the memory, the same if it escalates, and the multiply-adds: None if each product decodes the matrix."""
    module = target.module
    shape = m, n = module.shape
    k = options.directions(shape)
    needed = detection_bytes(plan, target, options, resident)
    way = best_way(plan, target, options, resident)
    is_dense = way is Way.DENSE
    solver = "dense"
    if k + OVERSAMPLING < min(shape):
        solver = chosen_solver(shape, k, options.solver, is_dense)
    peak = needed[Way.WHOLE if is_dense and solver == "certified" else way]
    escalated = needed[way]
    if repeat := float64_way(plan, target, options, resident, "dense" if is_dense else "certified"):
        _, nbytes = repeat
        escalated = max(escalated, nbytes)
    products = MULTIPLY_ADDS_PER_SOLVER_UNIT * cost(shape, k, solver)
    products += MULTIPLY_ADDS_PER_VALUE * m * n
    if module.low_rank:
        products += _norm_cost(shape, module.factor_rank)
    decodes_again = way is Way.BLOCKS and plan.weights[target.tensor].quantized
    return peak, escalated, None if decodes_again else products


def _norm_cost(shape: tuple[int, int], rank: int) -> int:
    """Count the multiply-adds for the norms of a delta before and after, by thin QRs of its factors in float64 on one thread."""
    return MULTIPLY_ADDS_PER_NORM_STEP * (sum(shape) + 1000) * rank * (rank + 8)


def forecast_output(output: Output, resident: int, rates: Rates | None) -> Forecast:
    """Forecast what `mitigate` or `merge` needs.

    Parameters
    ----------
    resident
        Bytes in memory between two steps; see `resident_of`.
    rates
        None gives no time; neither do a delta that is not low-rank, and rounding to codes.
    """
    mitigation = output.mitigation
    plan = output.plan
    files = output.on_disk
    estimates = output.layout.memory(mitigation, resident)
    peak = escalated = max(estimate.nbytes for estimate in estimates)
    network = output.layout.base_bytes
    read = network + _adapter_bytes(plan) + sum(p.stat().st_size for p in output.copies.values())
    for matrix in mitigation.findings or ():
        found = matrix.detection
        read += found.U.nbytes + found.S.nbytes + found.Vh.nbytes
    seconds = None
    is_known = output.form.requantize is None and all(t.module.low_rank for t in plan.targets)
    if rates is not None and is_known:
        products = 0
        for target in plan.targets:
            m, n = target.module.shape
            rank = target.module.factor_rank + mitigation.added_directions(target)
            products += _norm_cost((m, n), rank)
            if output.layout.command == "merge":
                products += m * n * (MULTIPLY_ADDS_PER_VALUE + rank)
        seconds = products / rates.products + (read + files.total_bytes) / rates.nbytes
    if mitigation.detects:
        first = forecast_detection(plan, mitigation.detection, mitigation.device, resident, rates)
        peak = max(peak, first.peak_memory_bytes)
        escalated = max(escalated, first.escalated_memory_bytes)
        read += _adapter_bytes(plan) + _base_bytes(plan)
        network += _base_bytes(plan)
        if seconds is not None:
            seconds = first.seconds and seconds + first.seconds
    return Forecast(
        peak_memory_bytes=peak,
        escalated_memory_bytes=escalated,
        seconds=seconds,
        network_bytes=network_bytes(plan, network),
        write_bytes=files.total_bytes,
        temporary_bytes=files.temporary_bytes,
        read_bytes=_identified_bytes(plan) + read,
    )


def forecast_texts(prepared: Prepared[Any], output: Path) -> Forecast:
    """Forecast a run on texts, each of whose sweeps reads the base once; a device holds everything except the memory between steps."""
    known = prepared.known(output)
    sweeps = prepared.sweeps(known)
    writes, temporary = prepared.written_bytes(known)
    model = prepared.model
    plan = model.job.plan
    device = model.job.device
    resident = prepared.resident + prepared.solving_bytes
    read = model.size.read * (1 + len(sweeps))  # with the check of the logits
    needs = (work.nbytes(model.size, resident, prepared.limits_of(work)) for work in sweeps)
    peak = max(needs, default=resident)
    seconds = None
    if device == CPU and (rates := measure_rates(plan.base, prepared.run.monitor)) is not None:
        products = sum(sweep_cost(model.size, work.fitted + work.riding) for work in sweeps)
        # The run needs the time that this process has used so far, mostly for imports, as well.
        seconds = MULTIPLY_ADDS_PER_SWEEP_STEP * products / rates.products
        seconds += time.process_time() + START_SECONDS
    return Forecast(
        peak_memory_bytes=peak,
        escalated_memory_bytes=peak,
        read_bytes=read,
        network_bytes=network_bytes(plan, read),
        seconds=seconds,
        write_bytes=writes,
        temporary_bytes=temporary,
        device_memory_bytes=0 if device == CPU else peak - TRANSFORMERS_BYTES - resident,
    )


def _identified_bytes(plan: Plan) -> int:
    """Count the bytes read to identify the inputs: headers, samples of models, and the whole adapter."""
    base = sampled_bytes(plan.base.files.values())
    if plan.adapter.describes_model:
        return base + sampled_bytes(plan.adapter.files)
    return base + sum(f.header.file_bytes for f in plan.adapter.files)


def _adapter_bytes(plan: Plan) -> int:
    """Count the bytes of the adapter's tensors."""
    return sum(file.header.data_bytes for file in plan.adapter.files)


def _base_bytes(plan: Plan) -> int:
    """Count the bytes of the matrices that the adapter changes."""
    return sum(plan.weights[target.tensor].nbytes for target in plan.targets)


def network_bytes(plan: Plan, nbytes: int) -> int:
    """Count the bytes that cross the network when this many bytes of the base's tensors are read."""
    base = plan.base
    return (base.to_download or sampled_bytes(base.files.values()) + nbytes) if base.remote else 0


def on_workers(forecast: Forecast, workers: Workers | None, resident: int) -> Forecast:
    """Forecast the same work on workers of this machine beside this process; without workers, return the forecast unchanged."""
    if workers is None or workers.processes is None:
        return forecast
    count = workers.processes
    return replace(
        forecast,
        peak_memory_bytes=resident + count * forecast.peak_memory_bytes,
        escalated_memory_bytes=resident + count * forecast.escalated_memory_bytes,
        seconds=forecast.seconds and forecast.seconds / count,
    )


def together(planned: Sequence[Forecast | None], shared: int = 0) -> Forecast | None:
    """Add up forecasts; None entries have nothing to do, and the result is None if all are.

    The steps of different outputs take turns, and each forecast counts the tables of all adapters, so the memory is the maximum.

    Parameters
    ----------
    shared
        Bytes that several of them count, except the first time.
    """
    forecasts = [forecast for forecast in planned if forecast is not None]
    if not forecasts:
        return None
    seconds = [f.seconds for f in forecasts if f.seconds is not None]
    return Forecast(
        peak_memory_bytes=max(f.peak_memory_bytes for f in forecasts),
        read_bytes=sum(f.read_bytes for f in forecasts) - shared,
        escalated_memory_bytes=max(f.escalated_memory_bytes for f in forecasts),
        network_bytes=sum(f.network_bytes for f in forecasts),
        write_bytes=sum(f.write_bytes for f in forecasts),
        temporary_bytes=sum(f.temporary_bytes for f in forecasts),
        seconds=sum(seconds) if len(seconds) == len(forecasts) else None,
    )


def shared_by_detections(batch: AdapterBatch) -> int:
    """Count the bytes of matrices that several plans change, for every plan except the first."""
    return sum(
        batch.plans[i].weights[target.tensor].nbytes
        for group in batch.matrices()
        for i, target in group[1:]
    )


def shared_by_merges(outputs: Sequence[Output]) -> int:
    """Count the bytes of the base's files, for every output except the first, plus the bytes that detection shares."""
    if not outputs:
        return 0
    base = outputs[0].plan.base
    files = sum(file.header.file_bytes for file in base.files.values())
    detecting = tuple(output.plan for output in outputs if output.mitigation.detects)
    return (len(outputs) - 1) * files + shared_by_detections(AdapterBatch(base, detecting))
