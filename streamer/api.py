"""The library's functions: what the command line does, for callers in Python."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from streamer.adapted import AdapterSink
from streamer.apply import Job, ModelSink, merged_tensors, run_job
from streamer.budget import check_budget, detection_needs
from streamer.converted import LoraSink
from streamer.errors import MismatchError
from streamer.events import Event, Monitor, OnEvent
from streamer.findings import Findings, load_findings
from streamer.intruders import DetectionOptions, Method, MitigationOptions, Scale
from streamer.pipeline import choose_device, detect_all, detect_to_file
from streamer.plan import make_plan
from streamer.storage.tensorfile import IOMode


def detect_intruder_dimensions(
    base: str | Path,
    adapter: str | Path,
    output: str | Path | None = None,
    *,
    top_k: int | float = 10,
    threshold_epsilon: float = 0.5,
    solver: str = "auto",
    max_memory: int | None = None,
    device: str = "auto",
    io: IOMode = "mmap",
    base_is_residual: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    on_event: OnEvent | None = None,
    monitor: Monitor | None = None,
) -> Findings:
    """Find the intruder dimensions of ``W0 + s·B·A`` in every matrix that the adapter changes.

    Parameters
    ----------
    base
        Model directory, or one ``.safetensors`` file.
    adapter
        PEFT LoRA directory.
    output
        Findings file to write as detection goes; a killed run resumes from its journal. None keeps the findings in memory.
    top_k, threshold_epsilon, solver, max_memory
        See `streamer.intruders.DetectionOptions`.
    device
        ``auto``, ``cpu``, ``cuda`` or ``cuda:i``.
    io
        ``mmap``, or ``pread`` for network file systems.
    base_is_residual
        The base is the residual that PiSSA, OLoRA, CorDA, LoRA-GA or LoftQ left when the adapter was initialised.
    resume, overwrite
        Whether to take up an interrupted run, and whether to replace what stands at `output`.
    on_event
        Called with an `Event` for each step.
    monitor
        In place of `on_event`, for callers that also want to stop a run.

    Returns
    -------
    Findings
        One entry a matrix; `reduce_intruder_dimension` and `merge_with_reduced_intruder_dimensions` take it.

    Raises
    ------
    StreamerError
        See `streamer.errors`; the class says what kind of fault it is.
    """
    options = DetectionOptions(top_k, threshold_epsilon, solver, max_memory)
    where = choose_device(device)
    plan = make_plan(base, adapter, io, base_is_residual)
    monitor = monitor or Monitor(on_event)
    for warning in plan.warnings:
        monitor.emit(Event("warning", warning))
    if output is None:
        matrices = tuple(detect_all(plan, options, where, monitor))
        return Findings(plan.base_identity, plan.adapter_identity, options, matrices)
    return detect_to_file(plan, Path(output), options, where, monitor, resume=resume, overwrite=overwrite)


def reduce_intruder_dimension(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    findings: Findings | str | Path | None = None,
    top_k: int | float = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    method: Method = "paper",
    scale: Scale = "all",
    to_lora: int | None = None,
    solver: str = "auto",
    max_memory: int | None = None,
    device: str = "auto",
    io: IOMode = "mmap",
    base_is_residual: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    on_event: OnEvent | None = None,
    monitor: Monitor | None = None,
) -> dict[str, Any]:
    """Write a new LoRA adapter whose delta has its intruders scaled by `mitigation_lambda`.

    The mitigated delta is projected back onto ``lora_A``, ``lora_B`` at the adapter's own rank; the record says for each
    matrix what relative norm that dropped. Tensors of matrices without intruders are copied bit for bit.

    Parameters
    ----------
    base, adapter, top_k, threshold_epsilon, solver, max_memory, device, io, base_is_residual, on_event, monitor
        See `detect_intruder_dimensions`.
    output
        Directory to write: a PEFT adapter.
    findings
        From `detect_intruder_dimensions`, or their file; with them no SVD of a weight is done. Made with the same base,
        adapter and options, or refused.
    mitigation_lambda, method, scale
        See `streamer.intruders.MitigationOptions`.
    to_lora
        Write a LoRA adapter of this rank, whatever the kind of the given one; the record says what relative norm the rank left out.
        Without it the output is of the given adapter's kind, which must be LoRA, and not DoRA.
    resume, overwrite
        Whether to take up an interrupted run, and whether to replace another output.

    Returns
    -------
    dict
        The record that stands in the output as ``streamer.json``.

    Raises
    ------
    StreamerError
        See `streamer.errors`.
    """
    mitigation = MitigationOptions(mitigation_lambda, method, scale)
    detection = DetectionOptions(top_k, threshold_epsilon, solver, max_memory)
    job = prepare(base, adapter, mitigation, detection, findings, device, io, base_is_residual)
    sink = AdapterSink(job, Path(output)) if to_lora is None else LoraSink(job, Path(output), to_lora)
    return run_job(sink, _monitor(job, monitor, on_event), overwrite=overwrite, resume=resume)


def merge_with_reduced_intruder_dimensions(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    findings: Findings | str | Path | None = None,
    top_k: int | float = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    method: Method = "paper",
    scale: Scale = "all",
    dequantize: bool = False,
    solver: str = "auto",
    max_memory: int | None = None,
    device: str = "auto",
    io: IOMode = "mmap",
    base_is_residual: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    on_event: OnEvent | None = None,
    monitor: Monitor | None = None,
) -> dict[str, Any]:
    """Write the base with the mitigated delta merged in: ``W0 + Δ'``, rounded once to the base's dtype.

    Shard names, tensor order, dtypes, metadata and all other files are the base's; untouched tensors keep their bytes.
    Weights that stand as FP8 codes are coded anew, with new scales: each value is rounded to the nearest of 4 significant bits. Other
    codes are not written; with `dequantize` all codes of the model become plain tensors of its config's dtype.
    Other parameters, result and errors are those of `reduce_intruder_dimension`, but that nothing is truncated.
    """
    mitigation = MitigationOptions(mitigation_lambda, method, scale)
    detection = DetectionOptions(top_k, threshold_epsilon, solver, max_memory)
    job = prepare(base, adapter, mitigation, detection, findings, device, io, base_is_residual, dequantize)
    return run_job(ModelSink(job, Path(output)), _monitor(job, monitor, on_event), overwrite=overwrite, resume=resume)


def iter_merged(
    base: str | Path,
    adapter: str | Path,
    *,
    findings: Findings | str | Path | None = None,
    top_k: int | float = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    method: Method = "paper",
    scale: Scale = "all",
    dequantize: bool = False,
    solver: str = "auto",
    max_memory: int | None = None,
    device: str = "auto",
    io: IOMode = "mmap",
    base_is_residual: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(name, tensor)`` of the merged model in file order, one tensor in memory at a time.

    Inputs are opened and checked by the call itself, not by the first step. Without findings each matrix is detected when its
    turn comes. A tensor of a dtype that torch does not have comes as its bytes, a flat uint8 tensor. Parameters and errors are
    those of `merge_with_reduced_intruder_dimensions`.
    """
    mitigation = MitigationOptions(mitigation_lambda, method, scale)
    detection = DetectionOptions(top_k, threshold_epsilon, solver, max_memory)
    job = prepare(base, adapter, mitigation, detection, findings, device, io, base_is_residual, dequantize)
    return merged_tensors(job, Monitor())


def prepare(
    base: str | Path,
    adapter: str | Path,
    mitigation: MitigationOptions,
    detection: DetectionOptions,
    findings: Findings | str | Path | None = None,
    device: str = "auto",
    io: IOMode = "mmap",
    base_is_residual: bool = False,
    dequantize: bool = False,
) -> Job:
    """Open and check everything that a mitigation reads; nothing is written."""
    where = choose_device(device)
    loaded = load_findings(findings) if isinstance(findings, str | Path) else findings
    plan = make_plan(base, adapter, io, base_is_residual)
    if loaded is not None:
        loaded.check_matches(plan.base_identity, plan.adapter_identity, detection)
        shapes = {m.tensor: m.shape for m in loaded}
        missing = [t.tensor for t in plan.targets if shapes.get(t.tensor) != t.module.shape]
        if missing:
            name = findings if isinstance(findings, str | Path) else "findings"
            raise MismatchError(
                f"{name}: has no findings on {len(missing)} of {len(plan.targets)} matrices, {missing[0]!r} first; run detect again"
            )
    elif mitigation.needs_detection:
        check_budget(detection_needs(plan, detection), detection.max_memory)
    return Job(plan, mitigation, detection, where, loaded, dequantize)


def _monitor(job: Job, monitor: Monitor | None, on_event: OnEvent | None) -> Monitor:
    monitor = monitor or Monitor(on_event)
    for warning in job.plan.warnings:
        monitor.emit(Event("warning", warning))
    return monitor
