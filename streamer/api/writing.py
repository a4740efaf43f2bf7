"""Offer mitigation of an adapter, and merging, as functions of the library: into files, or tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack, overload

from torch import Tensor

from streamer.adapters.one_or_several import ByName, One, Several
from streamer.api.inputs import Inputs
from streamer.api.keywords import IterateKeywords, MergeKeywords, ReduceKeywords, explained, watched
from streamer.api.options import Adapters, Judged, MethodChoice, Settings, SeveralAdapters, given_workers, take
from streamer.api.records import DryRun, SeveralRecord, dry_run, dry_runs
from streamer.detection.options import Run
from streamer.events import Monitor
from streamer.forecast.forecast import forecast_output, on_workers, shared_by_merges, together
from streamer.methods.method import Method
from streamer.output.iterate import merged_tensors
from streamer.output.output_spec import Writer
from streamer.output.prepare import FindingsOrPath, OutputOptions, load_given, open_jobs, prepare_outputs
from streamer.output.records import Written
from streamer.output.run import inspect_jobs, resident_of, run_jobs, shared_memory
from streamer.workers.engine import Workers


@dataclass(frozen=True)
class OutputRequest:
    """A mitigation or a merge as it is asked for.

    Attributes
    ----------
    output
        Directory of the adapter or model, or of several adapters the directory of those.
    findings
        None detects first, if the method needs findings.
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
        """Make it of keywords of the library's functions, or of the command line's options."""
        method, form = take(MethodChoice, keywords).make(), take(OutputOptions, keywords, merges=merges)
        judged, settings = take(Judged, keywords), take(Settings, keywords)
        return cls(Inputs(base, adapter), Path(output), keywords.get("findings"), judged, method, form, settings)

    @property
    def detects(self) -> bool:
        """Test whether detection runs first."""
        return self.method.needs_detection and self.findings is None

    def open(self, monitor: Monitor) -> None:
        """Open the inputs and plan the outputs, which refuses what cannot be written."""
        self._opened(monitor, peek=True)

    def run(self, monitor: Monitor, workers: Workers | None = None) -> Written | ByName[Written]:
        """Write the output of each adapter, and return its record."""
        adapters, writers, run = self._opened(monitor, workers)
        return adapters.collected(run_jobs(writers, run))

    def forecast(self, monitor: Monitor, workers: Workers | None = None) -> DryRun | SeveralRecord:
        """Check all, and say what a run would do and take; nothing is written."""
        adapters, writers, run = self._opened(monitor, workers, peek=True)
        states, resident = inspect_jobs(writers, run), resident_of(writers)
        pairs = list(zip(writers, states, strict=True))
        forecasts = [
            None
            if state == "done"
            else on_workers(forecast_output(writer, resident, monitor=monitor), workers, resident)
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
        run, given = self.settings.run_options(monitor, workers), load_given(self.findings, adapters)
        detection = self.judged.options(self.settings.memory, given[0])
        writers = prepare_outputs(base, adapters, self.output, given, self.method, detection, self.form, run)
        if workers is not None and workers.processes is not None and detection.max_memory is not None:
            share = replace(detection, max_memory=shared_memory(writers, workers))
            writers = prepare_outputs(base, adapters, self.output, given, self.method, share, self.form, run)
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

    The mitigated delta is projected onto ``lora_A``, ``lora_B`` at the adapter's own rank. The record says for each matrix what share of
    its norm is lost in projection (``dropped``); more than 1 % is a warning. Tensors of matrices without intruders are copied bit for bit.

    Parameters
    ----------
    output
        Directory to write: a PEFT adapter. For several adapters, a directory in which each is written under its name.
    findings
        From `detect_intruder_dimensions`, or the path of their file; for several adapters a dict by name, or the directory that was
        written for them. No SVD of a weight is done then. They must be of the same base and adapter.
        None detects first, into a findings file in the output.
    to_lora
        Write a LoRA adapter of this rank, whatever the kind of the given one; the record says what relative norm the rank left out. A
        float in (0, 1] is a share of the energy, the squared singular values, of each mitigated delta: each module gets the least rank
        that keeps it, as in PEFT's ``convert_to_lora``. Methods that need findings must be given them then. None writes the given
        adapter's own kind, which must be LoRA, and not DoRA.

    Returns
    -------
    Written
        The record, as ``streamer.json`` has it, with `output` (where) and `state` (``written``, ``resumed`` or ``present``): a dict that
        is shown in a few lines. Several adapters give a dict of records by name.

    Raises
    ------
    StreamerError
        Its class says what kind of fault it is (see `streamer.errors`), and may be one of Python's: `ValueError` for options and inputs,
        `FileNotFoundError` for missing inputs, `FileExistsError` for an output that may not be replaced.
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

    Shard names, tensor order, dtypes, metadata and all other files are the base's; untouched tensors keep their bytes. Nothing is
    truncated. Weights in FP8 are quantized anew, with new scales: each value is rounded to the nearest of 4 significant
    bits. Other quantized weights are refused without `dequantize`. Several adapters share one pass over the base.

    Parameters
    ----------
    output
        Directory to write: a model. Of several adapters a directory in which a model is written for each, under the adapter's name.
    findings
        From `detect_intruder_dimensions`, or the path of their file; of several adapters a dict of them by name, or the directory
        that was written for them. No SVD of a weight is done then. They must be of the same base and adapter.
        None detects first, into a findings file in the output.
    dequantize
        Write all that is quantized as plain tensors of the config's dtype, and take the quantization out of ``config.json``.
    executor
        Workers that write shards, as `detect_intruder_dimensions` has them; they see the output at the same path. The bytes are the same.

    Returns
    -------
    Written
        The record, as ``streamer.json`` has it, with `output` and `state`: a dict that is shown in a few lines. Several adapters give a
        dict of records by name.

    Raises
    ------
    StreamerError
        Its class says what kind of fault it is (see `streamer.errors`), and may be one of Python's: `ValueError` for options and inputs,
        `FileNotFoundError` for missing inputs, `FileExistsError` for an output that may not be replaced.
    """
    request = OutputRequest.of(True, base, adapter, output, options)
    with watched(options) as monitor:
        return request.run(monitor, given_workers(options))


@explained(IterateKeywords, Settings, MethodChoice, OutputOptions)
def iter_merged(
    base: str | Path, adapter: str | Path, **options: Unpack[IterateKeywords]
) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(name, tensor)`` of the merged model in file order, one tensor in memory at a time; nothing is written.

    Inputs are opened and checked by the call itself, not by the first step.

    Parameters
    ----------
    adapter
        Directory of a PEFT adapter, or of a fully fine-tuned model.
    findings
        From `detect_intruder_dimensions`, or the path of their file: no SVD of a weight is done then. They must be of the same base and
        adapter. None detects first, each matrix when its turn comes.
    dequantize
        Yield all that is quantized as plain tensors of the config's dtype.

    Yields
    ------
    name, tensor
        In the dtype that `merge_with_reduced_intruder_dimensions` would write. A tensor of a dtype that torch does not have comes as
        its bytes, a flat uint8 tensor.

    Raises
    ------
    StreamerError
        Its class says what kind of fault it is (see `streamer.errors`), and may be one of Python's: `ValueError` for options and inputs,
        `FileNotFoundError` for missing inputs.
    """
    method, form = take(MethodChoice, options).make(), take(OutputOptions, options, merges=True)
    judged, settings = take(Judged, options), take(Settings, options)
    with watched(options) as monitor:  # its bar closes with the last tensor
        run = settings.run_options(monitor)
    remote = settings.located(monitor)
    base, only = remote.path(base), One(Path(remote.path(adapter)))
    given = load_given(options.get("findings"), only)
    (job,) = open_jobs(base, only, given, method, judged.options(settings.memory, given[0]), form, run)
    monitor.warn(job.plan.warnings)
    return merged_tensors(job, monitor)
