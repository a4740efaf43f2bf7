"""Offer detection as a function of the library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack, overload

from streamer.adapters.finetuned import ByName, One, Several, each
from streamer.api.keywords import DetectKeywords, explained, watched
from streamer.api.options import Adapters, Inputs, Judged, Settings, SeveralAdapters, given_workers, take
from streamer.api.records import DryRun, SeveralRecord, dry_run, dry_runs
from streamer.detection.detect import detect_in_memory, detect_to_files, inspect_detections
from streamer.detection.findings import Findings
from streamer.detection.matrices import shared
from streamer.detection.options import DetectionOptions, Run
from streamer.events import Monitor, OutputState
from streamer.forecast import forecast_detection, measure_rates, on_workers, shared_by_detections, together
from streamer.plan.plan import AdapterBatch, make_batch, resident_bytes
from streamer.workers import Workers


@dataclass(frozen=True)
class Detected:
    """Findings, with their file and what the run did with it; both None if the findings are only in memory."""

    findings: Findings
    path: Path | None
    state: OutputState | None


@dataclass(frozen=True)
class DetectRequest:
    """A requested detection.

    Attributes
    ----------
    output
        Findings file, or a directory for several adapters; None keeps findings in memory.
    """

    inputs: Inputs
    output: Path | None
    judged: Judged
    settings: Settings

    @classmethod
    def of(
        cls, base: str | Path, adapter: Adapters, output: str | Path | None, keywords: Mapping[str, Any]
    ) -> DetectRequest:
        """Make a request from keywords of `detect_intruder_dimensions`, or from options of the command line."""
        where = None if output is None else Path(output)
        return cls(Inputs(base, adapter), where, take(Judged, keywords), take(Settings, keywords))

    def run(self, monitor: Monitor, workers: Workers | None = None) -> Detected | ByName[Detected]:
        """Run the detection."""
        opened = self._opened(monitor, workers)
        found = opened.detected()
        outputs: Sequence[Path | None] = opened.paths or [None] * len(found)
        return opened.adapters.collected(
            [Detected(f, p, None if p is None else monitor.outputs[p]) for f, p in zip(found, outputs, strict=True)]
        )

    def forecast(self, monitor: Monitor, workers: Workers | None = None) -> DryRun | SeveralRecord:
        """Check everything and forecast a run, without writing anything."""
        return self._opened(monitor, workers, peek=True).forecast()

    def _opened(self, monitor: Monitor, workers: Workers | None, peek: bool = False) -> _Opened:
        base, adapters = self.inputs.located(self.settings.located(monitor, peek))
        run, options = self.settings.make_run(monitor, workers), self.judged.options(self.settings.memory)
        paths = [] if self.output is None else adapters.findings_files(self.output)
        batch = make_batch(base, adapters.paths, run.io, run.stated, run.architecture)
        monitor.warn(batch.warnings)
        resident = resident_bytes(batch)
        if workers is not None:
            options = shared(workers, batch, options, resident)
        return _Opened(adapters, batch, self.output, paths, options, run, resident)


@dataclass(frozen=True)
class _Opened:
    """A detection whose inputs are open."""

    adapters: One | Several
    batch: AdapterBatch
    output: Path | None
    paths: Sequence[Path]
    options: DetectionOptions
    run: Run
    resident: int

    def detected(self) -> list[Findings]:
        if self.output is None:
            return detect_in_memory(self.batch, self.options, self.run)
        return detect_to_files(self.batch, self.paths, self.options, self.run, self.resident)

    def forecast(self) -> DryRun | SeveralRecord:
        assert self.output is not None
        plans, run = self.batch.plans, self.run
        states = inspect_detections(self.batch, self.paths, self.options, run)
        done = all(state == "done" for state, _ in states)
        rates = None if done else measure_rates(self.batch.base, run.monitor)
        forecasts = [
            None
            if state == "done"
            else on_workers(
                forecast_detection(plan, self.options, run.device, self.resident, size, rates),
                run.workers, self.resident,
            )
            for plan, (state, size) in zip(plans, states, strict=True)
        ]  # fmt: skip
        found = [
            dry_run("detect", path, state, len(plan.targets), 1, None, forecast)
            for plan, path, (state, _), forecast in zip(plans, self.paths, states, forecasts, strict=True)
        ]
        todo = tuple(plan for plan, (state, _) in zip(plans, states, strict=True) if state != "done")
        shared = shared_by_detections(AdapterBatch(self.batch.base, todo))
        return dry_runs(self.adapters, self.output, found, together(forecasts, shared))


@overload
def detect_intruder_dimensions(
    base: str | Path, adapter: str | Path, output: str | Path | None = None, **options: Unpack[DetectKeywords]
) -> Findings: ...
@overload
def detect_intruder_dimensions(
    base: str | Path, adapter: SeveralAdapters, output: str | Path | None = None, **options: Unpack[DetectKeywords]
) -> dict[str, Findings]: ...
@explained(DetectKeywords, Settings, Judged)
def detect_intruder_dimensions(
    base: str | Path, adapter: Adapters, output: str | Path | None = None, **options: Unpack[DetectKeywords]
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

    Raises
    ------
    StreamerError
        Its class names the kind of error (see `streamer.errors`). Some classes are also Python's own: `ValueError` for options and inputs,
        `FileNotFoundError` for missing inputs, `FileExistsError` for an output that is not replaced.
    """
    request = DetectRequest.of(base, adapter, output, options)
    with watched(options) as monitor:
        found = request.run(monitor, given_workers(options))
        return each(found, lambda one: one.findings)
