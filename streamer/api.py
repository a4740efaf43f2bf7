"""The library's functions: what the command line does, for callers in Python."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict, Unpack, overload

from torch import Tensor

from streamer.adapted import AdapterSink
from streamer.apply import Job, ModelSink, merged_tensors
from streamer.converted import LoraSink
from streamer.errors import MismatchError, UsageError
from streamer.events import Event, Monitor, OnEvent
from streamer.findings import Findings, load_findings
from streamer.intruders import DetectionOptions, Method, MitigationOptions, Scale
from streamer.outputs import run_jobs
from streamer.pipeline import choose_device, detect_in_memory, detect_to_files
from streamer.plan import Plan, make_plans
from streamer.records import Written
from streamer.several import findings_of, model_of, named_adapters
from streamer.storage.tensorfile import IOMode

Several = Sequence[Path] | list[str] | list[str | Path] | tuple[str | Path, ...]
"""Adapters on one base; a directory of adapters among them stands for those in it."""


class Detecting(TypedDict, total=False):
    """Options of `detect_intruder_dimensions`."""

    top_k: int | float
    threshold_epsilon: float
    solver: str
    max_memory: int | None
    device: str
    io: IOMode
    base_is_residual: bool
    resume: bool
    overwrite: bool
    on_event: OnEvent | None
    monitor: Monitor | None


class Merging(Detecting, total=False):
    """Options of `merge_with_reduced_intruder_dimensions`."""

    mitigation_lambda: float
    method: Method
    scale: Scale
    dequantize: bool
    model_card: bool


@overload
def detect_intruder_dimensions(
    base: str | Path, adapter: str | Path, output: str | Path | None = None, **options: Unpack[Detecting]
) -> Findings: ...
@overload
def detect_intruder_dimensions(
    base: str | Path, adapter: Several, output: str | Path | None = None, **options: Unpack[Detecting]
) -> dict[str, Findings]: ...
def detect_intruder_dimensions(
    base: str | Path,
    adapter: str | Path | Several,
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
) -> Findings | dict[str, Findings]:
    """Find the intruder dimensions of ``W0 + s·B·A`` in every matrix that the adapter changes.

    Parameters
    ----------
    base
        Model directory, or one ``.safetensors`` file.
    adapter
        PEFT adapter's directory; or several of them, in a list: each base matrix is then read once for all.
    output
        Findings file to write as detection goes; a killed run resumes from its journal. None keeps the findings in memory.
        Of several adapters a directory, where ``NAME.safetensors`` is written for the adapter in ``…/NAME``.
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
        Of several adapters a dict of them by the adapters' names.

    Raises
    ------
    StreamerError
        See `streamer.errors`; the class says what kind of fault it is.
    """
    options = DetectionOptions(top_k, threshold_epsilon, solver, max_memory)
    where = choose_device(device)
    adapters = named_adapters(adapter)
    plans = make_plans(base, list(adapters.values()), io, base_is_residual)
    monitor = _monitor(plans, monitor, on_event)
    if output is None:
        found = detect_in_memory(plans, options, where, monitor)
    else:
        paths = [findings_of(output, name) for name in adapters]
        found = detect_to_files(
            plans, paths, options, where, monitor, resume=resume, overwrite=overwrite, make_parent="" not in adapters
        )
    return found[0] if "" in adapters else dict(zip(adapters, found, strict=True))


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
    model_card: bool = True,
    solver: str = "auto",
    max_memory: int | None = None,
    device: str = "auto",
    io: IOMode = "mmap",
    base_is_residual: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    on_event: OnEvent | None = None,
    monitor: Monitor | None = None,
) -> Written:
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
    model_card
        Put how it was made in front of the ``README.md``, and base and tags into its head. False leaves that file as it is.
    resume, overwrite
        Whether to take up an interrupted run, and whether to replace another output.

    Returns
    -------
    Written
        The record, as ``streamer.json`` has it, with `output` (where) and `state` (``written``, ``resumed`` or ``present``).

    Raises
    ------
    StreamerError
        See `streamer.errors`.
    """
    mitigation = MitigationOptions(mitigation_lambda, method, scale)
    detection = DetectionOptions(top_k, threshold_epsilon, solver, max_memory)
    jobs = prepare(base, [adapter], mitigation, detection, [findings], device, io, base_is_residual, False, model_card)
    sink = AdapterSink(jobs[0], Path(output)) if to_lora is None else LoraSink(jobs[0], Path(output), to_lora)
    (record,) = run_jobs([sink], _monitor([jobs[0].plan], monitor, on_event), overwrite=overwrite, resume=resume)
    return record


@overload
def merge_with_reduced_intruder_dimensions(
    base: str | Path, adapter: str | Path, output: str | Path, *, findings: Findings | str | Path | None = None,
    **options: Unpack[Merging],
) -> Written: ...  # fmt: skip
@overload
def merge_with_reduced_intruder_dimensions(
    base: str | Path, adapter: Several, output: str | Path, *, findings: Mapping[str, Findings] | str | Path | None = None,
    **options: Unpack[Merging],
) -> dict[str, Written]: ...  # fmt: skip
def merge_with_reduced_intruder_dimensions(
    base: str | Path,
    adapter: str | Path | Several,
    output: str | Path,
    *,
    findings: Findings | Mapping[str, Findings] | str | Path | None = None,
    top_k: int | float = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    method: Method = "paper",
    scale: Scale = "all",
    dequantize: bool = False,
    model_card: bool = True,
    solver: str = "auto",
    max_memory: int | None = None,
    device: str = "auto",
    io: IOMode = "mmap",
    base_is_residual: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    on_event: OnEvent | None = None,
    monitor: Monitor | None = None,
) -> Written | dict[str, Written]:
    """Write the base with the mitigated delta merged in: ``W0 + Δ'``, rounded once to the base's dtype.

    Shard names, tensor order, dtypes, metadata and all other files are the base's; untouched tensors keep their bytes.
    Weights that stand as FP8 codes are coded anew, with new scales: each value is rounded to the nearest of 4 significant bits. Other
    codes are not written; with `dequantize` all codes of the model become plain tensors of its config's dtype.
    Of several adapters `output` is a directory where a model is written for each, under the adapter's name, while the base is read once;
    `findings` are those that `detect_intruder_dimensions` gave for them, or their directory; and the result is a dict of records by name.
    Other parameters, result and errors are those of `reduce_intruder_dimension`, but that nothing is truncated.
    """
    mitigation = MitigationOptions(mitigation_lambda, method, scale)
    detection = DetectionOptions(top_k, threshold_epsilon, solver, max_memory)
    adapters = named_adapters(adapter)
    given = findings_by_name(findings, adapters)
    jobs = prepare(
        base,
        list(adapters.values()),
        mitigation,
        detection,
        given,
        device,
        io,
        base_is_residual,
        dequantize,
        model_card,
    )
    sinks = [ModelSink(job, model_of(output, name)) for job, name in zip(jobs, adapters, strict=True)]
    monitor = _monitor([job.plan for job in jobs], monitor, on_event)
    records = run_jobs(sinks, monitor, overwrite=overwrite, resume=resume)
    return records[0] if "" in adapters else dict(zip(adapters, records, strict=True))


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
    on_event: OnEvent | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(name, tensor)`` of the merged model in file order, one tensor in memory at a time.

    Inputs are opened and checked by the call itself, not by the first step. Without findings each matrix is detected when its
    turn comes. A tensor of a dtype that torch does not have comes as its bytes, a flat uint8 tensor. `on_event` is told of each tensor
    as it is begun, in bytes. Other parameters and errors are those of `merge_with_reduced_intruder_dimensions`.
    """
    mitigation = MitigationOptions(mitigation_lambda, method, scale)
    detection = DetectionOptions(top_k, threshold_epsilon, solver, max_memory)
    (job,) = prepare(base, [adapter], mitigation, detection, [findings], device, io, base_is_residual, dequantize)
    return merged_tensors(job, _monitor([job.plan], None, on_event))


def prepare(
    base: str | Path,
    adapters: Sequence[str | Path],
    mitigation: MitigationOptions,
    detection: DetectionOptions,
    findings: Sequence[Findings | str | Path | None],
    device: str = "auto",
    io: IOMode = "mmap",
    base_is_residual: bool = False,
    dequantize: bool = False,
    model_card: bool = True,
) -> list[Job]:
    """Open and check everything that mitigations read; nothing is written. `findings` are given for each adapter, or none."""
    where = choose_device(device)
    loaded = [load_findings(one) if isinstance(one, str | Path) else one for one in findings]
    plans = make_plans(base, adapters, io, base_is_residual)
    for plan, found, given in zip(plans, loaded, findings, strict=True):
        if found is not None:
            _check_findings(plan, found, given if isinstance(given, str | Path) else "findings", detection)
    return [
        Job(plan, mitigation, detection, where, found, dequantize, model_card)
        for plan, found in zip(plans, loaded, strict=True)
    ]


def findings_by_name(
    findings: Findings | Mapping[str, Findings] | str | Path | None, adapters: Iterable[str]
) -> list[Findings | Path | None]:
    """The findings for each adapter, by its name: those given, or where their file is."""
    names = list(adapters)
    if findings is None:
        return [None for _ in names]
    if names == [""] and not isinstance(findings, Mapping):
        return [findings if isinstance(findings, Findings) else Path(findings)]
    if isinstance(findings, Mapping):
        lacking = [name for name in names if name not in findings]
        if lacking:
            raise UsageError(f"findings: has none for adapter {lacking[0]!r}; run detect on it")
        return [findings[name] for name in names]
    if isinstance(findings, Findings) or not Path(findings).is_dir():
        where = "findings" if isinstance(findings, Findings) else findings
        raise UsageError(f"{where}: expected findings on several adapters: the directory that detect wrote for them")
    return [findings_of(findings, name) for name in names]


def _check_findings(plan: Plan, findings: Findings, name: str | Path, options: DetectionOptions) -> None:
    findings.check_matches(plan.base_identity, plan.adapter_identity, options)
    shapes = {m.tensor: m.shape for m in findings}
    missing = [t.tensor for t in plan.targets if shapes.get(t.tensor) != t.module.shape]
    if missing:
        raise MismatchError(
            f"{name}: has no findings on {len(missing)} of {len(plan.targets)} matrices, {missing[0]!r} first; run detect again"
        )


def _monitor(plans: Sequence[Plan], monitor: Monitor | None, on_event: OnEvent | None) -> Monitor:
    monitor = monitor or Monitor(on_event)
    for warning in dict.fromkeys(warning for plan in plans for warning in plan.warnings):
        monitor.emit(Event("warning", warning))
    return monitor
