"""Offer mitigation and merging of adapters as functions of the library: into files, or tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack, overload

from torch import Tensor

from streamer.adapters.finetuned import ByName, One, Several
from streamer.api.keywords import IterateKeywords, MergeKeywords, ReduceKeywords, explained, watched
from streamer.api.options import Adapters, Inputs, Judged, MethodChoice, Settings, SeveralAdapters, given_workers, take
from streamer.api.records import DryRun, SeveralRecord, dry_run, dry_runs
from streamer.detection.options import Run
from streamer.events import Monitor
from streamer.forecast import forecast_output, measure_rates, on_workers, shared_by_merges, together
from streamer.methods import Method
from streamer.output.job import Written
from streamer.output.model_writer import merged_tensors
from streamer.output.output_spec import Writer
from streamer.output.write import (
    FindingsOrPath,
    OutputOptions,
    inspect_jobs,
    load_given,
    open_jobs,
    prepare_outputs,
    resident_of,
    run_jobs,
    shared_memory,
)
from streamer.workers import Workers


@dataclass(frozen=True)
class OutputRequest:
    """A requested mitigation or merge.

    Attributes
    ----------
    output
        Directory of the adapter or model to write; for several adapters, the directory that will contain these.
    findings
        If None, detection runs first if the method needs findings.
    """

    inputs: Inputs
    output: Path
    findings: FindingsOrPath
    judged: Judged
    method: Method
    form: OutputOptions
    settings: Settings

    @classmethod
    def of(
        cls, merges: bool, base: str | Path, adapter: Adapters, output: str | Path, keywords: Mapping[str, Any]
    ) -> OutputRequest:
        """Make a request from keywords of the library's functions, or from options of the command line."""
        method, form = take(MethodChoice, keywords).make(), take(OutputOptions, keywords, merges=merges)
        judged, settings = take(Judged, keywords), take(Settings, keywords)
        return cls(Inputs(base, adapter), Path(output), keywords.get("findings"), judged, method, form, settings)

    @property
    def detects(self) -> bool:
        """Test whether detection runs first."""
        return self.method.needs_detection and self.findings is None

    def open(self, monitor: Monitor) -> None:
        """Open the inputs and plan the outputs; this refuses outputs that cannot be written."""
        self._opened(monitor, peek=True)

    def run(self, monitor: Monitor, workers: Workers | None = None) -> Written | ByName[Written]:
        """Write the output of each adapter and return its record."""
        adapters, writers, run = self._opened(monitor, workers)
        return adapters.collected(run_jobs(writers, run))

    def forecast(self, monitor: Monitor, workers: Workers | None = None) -> DryRun | SeveralRecord:
        """Check everything and forecast a run, without writing anything."""
        adapters, writers, run = self._opened(monitor, workers, peek=True)
        states, resident = inspect_jobs(writers, run), resident_of(writers)
        pairs = list(zip(writers, states, strict=True))
        rates = measure_rates(writers[0].spec.job.plan.base, monitor) if set(states) != {"done"} else None
        forecasts = [
            None if state == "done" else on_workers(forecast_output(writer, resident, rates), workers, resident)
            for writer, state in pairs
        ]
        found = []
        for (writer, state), forecast in zip(pairs, forecasts, strict=True):
            out, matrices = writer.spec.output, len(writer.spec.job.plan.targets)
            command = "merge" if self.form.merges else "mitigate"
            found.append(dry_run(command, out.path, state, matrices, len(out.files), out.total_bytes, forecast))
        shared = shared_by_merges([writer for writer, state in pairs if state != "done"])
        return dry_runs(adapters, self.output, found, together(forecasts, shared))

    def _opened(
        self, monitor: Monitor, workers: Workers | None = None, peek: bool = False
    ) -> tuple[One | Several, list[Writer], Run]:
        base, adapters = self.inputs.located(self.settings.located(monitor, peek))
        run, given = self.settings.make_run(monitor, workers), load_given(self.findings, adapters)
        detection = self.judged.options(self.settings.memory, given[0])
        writers = prepare_outputs(base, adapters, self.output, given, self.method, detection, self.form, run)
        if workers is not None and workers.processes is not None and detection.max_memory is not None:
            limited = replace(detection, max_memory=shared_memory(writers, workers))
            writers = prepare_outputs(base, adapters, self.output, given, self.method, limited, self.form, run)
        return adapters, writers, run


@overload
def reduce_intruder_dimension(
    base: str | Path, adapter: str | Path, output: str | Path, **options: Unpack[ReduceKeywords]
) -> Written: ...
@overload
def reduce_intruder_dimension(
    base: str | Path, adapter: SeveralAdapters, output: str | Path, **options: Unpack[ReduceKeywords]
) -> dict[str, Written]: ...
@explained(ReduceKeywords, Settings, MethodChoice, OutputOptions)
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

    Raises
    ------
    StreamerError
        Its class names the kind of error (see `streamer.errors`). Some classes are also Python's own: `ValueError` for options and inputs,
        `FileNotFoundError` for missing inputs, `FileExistsError` for an output that is not replaced.
    """
    request = OutputRequest.of(False, base, adapter, output, options)
    with watched(options) as monitor:
        return request.run(monitor)


@overload
def merge_with_reduced_intruder_dimensions(
    base: str | Path, adapter: str | Path, output: str | Path, **options: Unpack[MergeKeywords]
) -> Written: ...
@overload
def merge_with_reduced_intruder_dimensions(
    base: str | Path, adapter: SeveralAdapters, output: str | Path, **options: Unpack[MergeKeywords]
) -> dict[str, Written]: ...
@explained(MergeKeywords, Settings, MethodChoice, OutputOptions)
def merge_with_reduced_intruder_dimensions(
    base: str | Path, adapter: Adapters, output: str | Path, **options: Unpack[MergeKeywords]
) -> Written | dict[str, Written]:
    """Write the base with the mitigated delta merged in: ``W0 + Δ'``, summed in float32 and rounded once to the base's dtype.

    Shard names, tensor order, dtypes, metadata and all other files are the base's; unchanged tensors keep their bytes. The delta is not
    truncated. FP8 weights are quantized again with new scales: each value is rounded to 4 significant bits. Other quantized weights need
    `dequantize`. Several adapters share one pass over the base.

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
    executor
        Workers that write shards, as for `detect_intruder_dimensions`; they need the output at the same path. The bytes are the same.

    Returns
    -------
    Written
        The record, as in ``streamer.json``, with `output` and `state`: a dict that prints as a few lines. For several adapters, a dict of
        records by name.

    Raises
    ------
    StreamerError
        Its class names the kind of error (see `streamer.errors`). Some classes are also Python's own: `ValueError` for options and inputs,
        `FileNotFoundError` for missing inputs, `FileExistsError` for an output that is not replaced.
    """
    request = OutputRequest.of(True, base, adapter, output, options)
    with watched(options) as monitor:
        return request.run(monitor, given_workers(options))


@explained(IterateKeywords, Settings, MethodChoice, OutputOptions)
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
        Tensors in the dtype that `merge_with_reduced_intruder_dimensions` would write. If torch lacks a dtype, the tensor is its bytes, as
        flat uint8.

    Raises
    ------
    StreamerError
        Its class names the kind of error (see `streamer.errors`). Some classes are also Python's own: `ValueError` for options and inputs,
        `FileNotFoundError` for missing inputs.
    """
    method, form = take(MethodChoice, options).make(), take(OutputOptions, options, merges=True)
    judged, settings = take(Judged, options), take(Settings, options)
    with watched(options) as monitor:  # the progress bar closes with the last tensor
        run = settings.make_run(monitor)
    remote = settings.located(monitor)
    base, only = remote.path(base), One(Path(remote.path(adapter)))
    given = load_given(options.get("findings"), only)
    (job,) = open_jobs(base, only, given, method, judged.options(settings.memory, given[0]), form, run)
    monitor.warn(job.plan.warnings)
    return merged_tensors(job, monitor)
