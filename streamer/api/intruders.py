"""Offer detection, mitigation and merging as functions of the library: into files, or tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, overload

from torch import Tensor

from streamer import forecast
from streamer.adapters.finetuned import AdapterPaths, ByName
from streamer.api.calls import call, explained, watched
from streamer.api.records import DryRun, SeveralRecord, dry_run, dry_runs
from streamer.api.requests import Request, detection_options, found_inputs, read_size
from streamer.detection.detect import detect_in_memory, detect_to_files, plan_findings, shared
from streamer.detection.findings import Findings
from streamer.detection.options import DetectionOptions
from streamer.errors import UsageError
from streamer.events import Monitor
from streamer.methods import UNCHANGED
from streamer.methods.files import InputMap, load_map
from streamer.options import (
    Adapters,
    DetectOptions,
    IterateOptions,
    MergeOptions,
    MitigateOptions,
    SeveralAdapters,
    written,
)
from streamer.output import write
from streamer.output.form import Form
from streamer.output.layout import Command, Output
from streamer.output.merged import merged_tensors
from streamer.output.mitigation import Mitigation
from streamer.output.opening import load_given, open_mitigations
from streamer.output.record import Written
from streamer.plan.plan import AdapterBatch, make_batch, resident_bytes
from streamer.run import Run
from streamer.workers import Workers

if TYPE_CHECKING:
    from streamer.api.keywords import DetectKeywords, IterateKeywords, MergeKeywords, ReduceKeywords


METHOD_LINES = (
    "  streamer repair BASE ADAPTER -o OUTPUT  no text needed: kept 93 %, left 12 %; with text of the task 98 and 8 %",
    "  --map FILE                              a map of BASE from `streamer map`: kept 99 %, left 39 %",
    "  --method shrink --lambda 0.5            nothing needed: kept 91 %, left 29 %",
    "  --method paper, --method project        intruders, which `detect` finds: kept 100 %, left 100 % (none were found)",
    "  --coefficients FILE                     what `repair` wrote beside its output",
    "  --lambda 1                              the adapter as it is",
    "  means over four adapters: learning kept, and KL from the base left on general text (docs/methods.md)",
)
"""What each method needs, and what it kept and left in README's table."""


class DetectRequest(Request, DetectOptions):
    """A requested detection."""

    def run(self, monitor: Monitor, workers: Workers | None = None) -> Findings | ByName[Findings]:
        """Run the detection."""
        adapters, batch, paths, options, run = self._opened(monitor, workers)
        if not paths:
            return adapters.collected(detect_in_memory(batch, options, run))
        return adapters.collected(
            detect_to_files(batch, paths, options, run, resident_bytes(batch))
        )

    def forecast(self, monitor: Monitor, workers: Workers | None = None) -> DryRun | SeveralRecord:
        """Check everything and forecast a run, without writing anything."""
        adapters, batch, paths, options, run = self._opened(monitor, workers, peek=True)
        assert self.file is not None
        resident = resident_bytes(batch)
        states = [writer.state for writer in plan_findings(batch, paths, options, run, resident)]
        pending = tuple(
            plan for plan, state in zip(batch.plans, states, strict=True) if state != "done"
        )
        rates = forecast.measure_rates(batch.base, monitor) if pending else None
        forecasts = []
        runs = []
        for plan, path, state in zip(batch.plans, paths, states, strict=True):
            needs = None
            if state != "done":
                needs = forecast.forecast_detection(plan, options, run.device, resident, rates)
                needs = forecast.on_workers(needs, workers, resident)
            forecasts.append(needs)
            runs.append(dry_run("detect", path, state, len(plan.targets), 1, None, needs))
        shared_bytes = forecast.shared_by_detections(AdapterBatch(batch.base, pending))
        return dry_runs(adapters, self.file, runs, forecast.together(forecasts, shared_bytes))

    def _opened(
        self, monitor: Monitor, workers: Workers | None, peek: bool = False
    ) -> tuple[AdapterPaths, AdapterBatch, Sequence[Path], DetectionOptions, Run]:
        base, adapters = found_inputs(self.located(monitor, peek), self.base, self.adapter)
        run = self.make_run(monitor, workers)
        options = detection_options(self, self.memory)
        batch = make_batch(base, adapters.paths, run.io, run.stated, run.architecture)
        monitor.warn(batch.warnings)
        if workers is not None:
            options = shared(workers, batch, options, resident_bytes(batch))
        paths = [] if self.file is None else adapters.findings_files(self.file)
        return adapters, batch, paths, options, run


@overload
def detect_intruder_dimensions(
    base: str | Path,
    adapter: str | Path,
    output: str | Path | None = None,
    **options: Unpack[DetectKeywords],
) -> Findings: ...
@overload
def detect_intruder_dimensions(
    base: str | Path,
    adapter: SeveralAdapters,
    output: str | Path | None = None,
    **options: Unpack[DetectKeywords],
) -> dict[str, Findings]: ...
@explained(DetectOptions)
def detect_intruder_dimensions(
    base: str | Path,
    adapter: Adapters,
    output: str | Path | None = None,
    **options: Unpack[DetectKeywords],
) -> Findings | dict[str, Findings]:
    """Find the intruder dimensions of ``W0 + s·B·A`` in every matrix that the adapter changes.

    Several adapters share one pass over the base.

    Parameters
    ----------
    output
        Findings file to write; a journal beside it lets a killed run resume. None keeps the findings in memory. For several adapters, a
        directory in which ``NAME.safetensors`` is written for the adapter in ``…/NAME``.
    executor
        Workers that run detection: any `concurrent.futures.Executor`, of threads, processes, or an engine such as
        ``dask.distributed.Client.get_executor()``; None runs it in this process. Workers need the inputs at the same paths. Each task uses
        torch's current number of threads and has the budget `max_memory`; with that number, findings have the same bytes as without
        workers. If a worker dies and the executor replaces it, its tasks run once more; a `ProcessPoolExecutor` does not replace workers,
        so the run ends with `WorkerError`.

    Returns
    -------
    Findings
        One entry for each matrix, as input for `reduce_intruder_dimension` and `merge_with_reduced_intruder_dimensions`. For several
        adapters, a dict of findings by adapter name.
    """
    return call(DetectRequest(base=base, adapter=adapter, output=output, **options))


class OutputRequest(Request, MitigateOptions, MergeOptions, IterateOptions):
    """A requested mitigation or merge.

    Attributes
    ----------
    command
        Whether to write an adapter or a model.
    measured
        What a repair adds to the record: ``measured`` and ``repair``.
    default_method
        Whether `paper` is used if no method is named, as by PEFT's function. The command line asks for a method.
    """

    output: str | Path = written("", "DIR")
    command: Command
    measured: Mapping[str, Any] | None = None
    default_method: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.chosen, self.shard_bytes
        if self.dequantize and self.requantize is not None:
            raise UsageError(
                "requantize: writes codes, and dequantize writes none; give one of them"
            )

    @cached_property
    def input_map(self) -> InputMap | None:
        """Return the map by which 4-bit weights are written."""
        given = self.requantize
        return given if isinstance(given, InputMap | None) else load_map(given)

    @property
    def _names_method(self) -> bool:
        """Test whether a method, a file that sets it, or λ 1, at which all are the same, is given."""
        named = self.method, self.coefficients, self.map
        return self.mitigation_lambda == 1 or any(value is not None for value in named)

    @property
    def shard_bytes(self) -> int | None:
        """Return the largest size of a merged model's file in bytes; None for the base's files."""
        if self.max_shard_size is None:
            return None
        size = read_size("max_shard_size", self.max_shard_size, 1000)
        if size < 1:
            raise UsageError(
                f"max_shard_size: expected a size from 1 byte, found {self.max_shard_size!r}"
            )
        return size

    def open(self, monitor: Monitor) -> None:
        """Open the inputs and plan the outputs; this refuses outputs that cannot be written."""
        self._opened(monitor, peek=True)

    def run(self, monitor: Monitor, workers: Workers | None = None) -> Written | ByName[Written]:
        """Write the output of each adapter and return its record."""
        adapters, outputs, run = self._opened(monitor, workers)
        return adapters.collected(write.write_outputs(outputs, run))

    def forecast(self, monitor: Monitor, workers: Workers | None = None) -> DryRun | SeveralRecord:
        """Check everything and forecast a run, without writing anything."""
        adapters, outputs, run = self._opened(monitor, workers, peek=True)
        states = write.inspect_outputs(outputs, run)
        resident = write.resident_of(outputs)
        pending = [output for output, state in zip(outputs, states, strict=True) if state != "done"]
        rates = forecast.measure_rates(outputs[0].plan.base, monitor) if pending else None
        forecasts = []
        runs = []
        for output, state in zip(outputs, states, strict=True):
            needs = None
            if state != "done":
                needs = forecast.forecast_output(output, resident, rates)
                needs = forecast.on_workers(needs, workers, resident)
            forecasts.append(needs)
            files = output.on_disk
            sizes = len(files.files), files.total_bytes
            matrices = len(output.plan.targets)
            runs.append(dry_run(self.command, output.path, state, matrices, *sizes, needs))
        shared_bytes = forecast.shared_by_merges(pending)
        return dry_runs(
            adapters, Path(self.output), runs, forecast.together(forecasts, shared_bytes)
        )

    @cached_property
    def form(self) -> Form:
        """Return the form of the outputs."""
        return Form(
            dequantize=self.dequantize,
            dtype=self.dtype,
            shard_bytes=self.shard_bytes,
            requantize=self.input_map,
            to_lora=self.to_lora,
            for_server=self.for_server,
            card=self.model_card,
            measured=self.measured or {},
        )

    def mitigations(self, base: str | Path, adapters: AdapterPaths, run: Run) -> list[Mitigation]:
        """Open and check the inputs of the mitigation of each adapter."""
        findings = load_given(self.findings, adapters)
        detection = detection_options(self, self.memory, findings[0])
        opened = open_mitigations(base, adapters, findings, self.chosen, detection, run)
        is_plain = not self._names_method and self.mitigation_lambda is None
        if self.command == "merge" and is_plain and self.findings is None:
            opened = [replace(m, method=UNCHANGED) if m.made_before else m for m in opened]
            if any(mitigation.made_before for mitigation in opened):
                run.monitor.note(
                    "the adapter was mitigated already, and is merged as it is; --method mitigates it again"
                )
        is_stated = self.default_method or self._names_method
        if not is_stated and any(mitigation.method != UNCHANGED for mitigation in opened):
            error = UsageError(
                f"method: {self.command} needs one; these are the choices, with what each kept and left"
            )
            for line in METHOD_LINES:
                error.add_note(line)
            raise error
        return opened

    def _opened(
        self, monitor: Monitor, workers: Workers | None = None, peek: bool = False
    ) -> tuple[AdapterPaths, list[Output], Run]:
        base, adapters = found_inputs(self.located(monitor, peek), self.base, self.adapter)
        run = self.make_run(monitor, workers)
        mitigations = self.mitigations(base, adapters, run)
        paths = adapters.directories(Path(self.output))
        outputs = [
            write.plan_output(self.command, mitigation, self.form, path)
            for mitigation, path in zip(mitigations, paths, strict=True)
        ]
        monitor.warn(write.batch_of(outputs).warnings)
        if workers is not None:
            share = write.shared_memory(outputs, workers)
            outputs = [output.within(share) for output in outputs]
        return adapters, outputs, run


@overload
def reduce_intruder_dimension(
    base: str | Path, adapter: str | Path, output: str | Path, **options: Unpack[ReduceKeywords]
) -> Written: ...
@overload
def reduce_intruder_dimension(
    base: str | Path,
    adapter: SeveralAdapters,
    output: str | Path,
    **options: Unpack[ReduceKeywords],
) -> dict[str, Written]: ...
@explained(MitigateOptions)
def reduce_intruder_dimension(
    base: str | Path, adapter: Adapters, output: str | Path, **options: Unpack[ReduceKeywords]
) -> Written | dict[str, Written]:
    """Write a new LoRA adapter whose delta has its intruders scaled by `mitigation_lambda`.

    The mitigated delta is projected onto ``lora_A`` and ``lora_B`` at the adapter's own rank. The record states for each matrix the share
    of the norm that is lost in projection (``dropped``); a loss over 1 % is a warning. Tensors of matrices without intruders are copied bit
    for bit.

    Parameters
    ----------
    output
        Directory to write: a PEFT adapter. For several adapters, a directory in which each adapter is written under its name.
    findings
        Findings from `detect_intruder_dimensions`, or the path of their file; for several adapters a dict by name, or the directory
        that detection wrote. They must belong to the same base and adapter; no weight needs an SVD then.
        None detects first, into a findings file in the output.
    to_lora
        Write a LoRA adapter of this rank, for an adapter of any kind; the record states the relative norm that the rank leaves out. A
        float in (0, 1] is a share of each mitigated delta's energy, its squared singular values: each module gets the smallest rank that
        keeps this share, as in PEFT's ``convert_to_lora``. Methods that need findings then require `findings`. None writes the adapter's
        own kind, which must be LoRA without DoRA.

    Returns
    -------
    Written
        The record, as in ``streamer.json``, with `output` (the path) and `state` (``written``, ``resumed`` or ``present``): a dict that
        prints as a few lines. For several adapters, a dict of records by name.
    """
    return call(
        OutputRequest(command="mitigate", base=base, adapter=adapter, output=output, **options)
    )


@overload
def merge_with_reduced_intruder_dimensions(
    base: str | Path, adapter: str | Path, output: str | Path, **options: Unpack[MergeKeywords]
) -> Written: ...
@overload
def merge_with_reduced_intruder_dimensions(
    base: str | Path, adapter: SeveralAdapters, output: str | Path, **options: Unpack[MergeKeywords]
) -> dict[str, Written]: ...
@explained(MergeOptions)
def merge_with_reduced_intruder_dimensions(
    base: str | Path, adapter: Adapters, output: str | Path, **options: Unpack[MergeKeywords]
) -> Written | dict[str, Written]:
    """Write the base with the mitigated delta merged in: ``W0 + Δ'``, summed in float32 and rounded once to the base's dtype.

    Tensor order, metadata and all other files are the base's. So are shard names and dtypes, and unchanged tensors keep their bytes, unless
    `max_shard_size` or `dtype` is given. The delta is not truncated. FP8 weights are quantized again with new scales: each value is rounded
    to 4 significant bits. Other quantized weights need `dequantize` or, in 4 bits, `requantize`. Several
    adapters share one pass over the base.

    Parameters
    ----------
    output
        Directory to write: a model. For several adapters, a directory in which each model is written under its adapter's name.
    findings
        Findings from `detect_intruder_dimensions`, or the path of their file; for several adapters a dict by name, or the directory
        that detection wrote. They must belong to the same base and adapter; no weight needs an SVD then.
        None detects first, into a findings file in the output.
    dequantize
        Write all quantized weights as plain tensors of the config's dtype, and remove the quantization from ``config.json``.
    requantize
        Map from `map_inputs` of the base, or the path of its file: merged weights in 4 bits become codes again, with the base's own scales,
        and are rounded so that the response to the map's inputs changes least. The record states the share of the update that survives, for
        each matrix that is stored as one tensor (``survives``, ``rounding_error``).
    executor
        Workers that write shards, as for `detect_intruder_dimensions`; they need the output at the same path. The bytes are the same.

    Returns
    -------
    Written
        The record, as in ``streamer.json``, with `output` and `state`: a dict that prints as a few lines. For several adapters, a dict of
        records by name.
    """
    return call(
        OutputRequest(command="merge", base=base, adapter=adapter, output=output, **options)
    )


@explained(IterateOptions)
def iter_merged(
    base: str | Path, adapter: str | Path, **options: Unpack[IterateKeywords]
) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(name, tensor)`` of the merged model in file order, one tensor in memory at a time, without writing files.

    The call itself opens and checks the inputs, before the first step.

    Parameters
    ----------
    adapter
        Directory of a PEFT adapter, or of a fully fine-tuned model.
    findings
        Findings from `detect_intruder_dimensions`, or the path of their file. They must belong to the same base and adapter; no weight
        needs an SVD then. None detects each matrix before its tensor is yielded.
    dequantize
        Yield all quantized weights as plain tensors of the config's dtype.

    Yields
    ------
    name, tensor
        Tensors as `merge_with_reduced_intruder_dimensions` writes them; of a dtype that torch lacks, the bytes, as flat uint8.
    """
    request = OutputRequest(command="merge", base=base, adapter=adapter, output="", **options)
    with watched(request) as monitor:  # the progress bar closes with the last tensor
        run = request.make_run(monitor)
    remote = request.located(monitor)
    paths = AdapterPaths.of_one(remote.path(adapter))
    (mitigation,) = request.mitigations(remote.path(base), paths, run)
    monitor.warn(mitigation.plan.warnings)
    return merged_tensors(mitigation, request.form, monitor, request.tensors)
