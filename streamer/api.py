"""The library's functions: what the command line does, for callers in Python."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypedDict, Unpack, overload

from torch import Tensor

from streamer.adapted import AdapterSink
from streamer.apply import Job, ModelSink, merged_tensors
from streamer.converted import LoraSink
from streamer.errors import MismatchError, UsageError
from streamer.events import Monitor, OnEvent, warn
from streamer.findings import Findings, load_findings
from streamer.intruders import DetectionOptions, Method, MitigationOptions, Scale
from streamer.outputs import run_jobs
from streamer.pipeline import choose_device, detect_in_memory, detect_to_files
from streamer.plan import Plan, make_plans
from streamer.records import Written
from streamer.several import findings_of, given_findings, model_of, named_adapters
from streamer.storage.tensorfile import IOMode
from streamer.units import parse_size
from streamer.verification.result import Verification
from streamer.verification.run import verify

Several = Sequence[Path] | list[str] | list[str | Path] | tuple[str | Path, ...]
"""Adapters on one base; a directory of adapters among them stands for those in it."""


class Detecting(TypedDict, total=False):
    """Options of `detect_intruder_dimensions`."""

    top_k: int | float
    threshold_epsilon: float
    solver: str
    max_memory: int | str | None
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
    max_memory: int | str | None = None,
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
        Directory of the base model, with ``model.safetensors`` or an index and its shards; or one ``.safetensors`` file.
    adapter
        Directory of a PEFT adapter, or of a fully fine-tuned model; or several, in a list or tuple, where a directory of adapters
        stands for those in it: each matrix of the base is then read once for all.
    output
        Findings file to write as detection goes; a killed run resumes from the journal beside it. None keeps the findings in
        memory. Of several adapters a directory, where ``NAME.safetensors`` is written for the adapter in ``…/NAME``.
    top_k
        How many leading singular directions of each matrix are judged: a count from 1, or a share of min(rows, columns) as a float
        in (0, 1].
    threshold_epsilon
        A direction is an intruder if its similarity, the largest |cosine| to any left singular vector of the base, is below this;
        in (0, 1].
    solver
        ``certified``: block Krylov with proven bounds, and the dense solver where these settle nothing; ``dense``: LAPACK's full
        SVD; ``auto``: the cheaper one for each matrix.
    max_memory
        Anonymous memory of the whole process, in bytes or as a size like ``"600M"`` or ``"4G"`` (powers of 1024); None takes what
        is needed. Under a budget large matrices are multiplied as they are stored, and what only a full SVD could settle stays
        open. One that is too small is refused, with the smallest that would do.
    device
        ``cpu``, ``cuda``, ``cuda:i``, or ``auto``: CUDA where there is one.
    io
        How tensors are read: ``mmap``, or ``pread`` for network file systems, where it takes a copy of each matrix in memory.
    base_is_residual
        True if `base` is what PiSSA, OLoRA, CorDA, LoRA-GA or LoftQ left of the model when the adapter was initialised. Adapters of
        these kinds are refused without it.
    resume
        Whether to take up an interrupted run with the same inputs and options; False starts it over.
    overwrite
        Whether to replace what stands at `output`: findings or an interrupted run of other inputs or options, and nothing else.
    on_event
        Called with an `Event` at each step, warnings included. Where neither this nor `monitor` is given, warnings go through the
        `warnings` module, as `StreamerWarning`.
    monitor
        In place of `on_event`, a `Monitor`, for callers that also want to stop a run at its next safe point.

    Returns
    -------
    Findings
        One entry a matrix; `reduce_intruder_dimension` and `merge_with_reduced_intruder_dimensions` take it.
        Of several adapters a dict of them by the adapters' names.

    Raises
    ------
    StreamerError
        Of the class that says what kind of fault it is, with a message of one line (see `streamer.errors`). Some are Python's own
        kinds as well: `ValueError` for options, broken files and inputs that do not belong together, `FileNotFoundError` for missing
        inputs, `FileExistsError` for an output that may not be replaced.
    """
    options = DetectionOptions(top_k, threshold_epsilon, solver, _bytes(max_memory))
    where = choose_device(device)
    adapters = named_adapters(adapter)
    plans = make_plans(base, list(adapters.values()), io, base_is_residual)
    monitor = _monitor(plans, monitor, on_event)
    if output is None:
        found = detect_in_memory(plans, options, where, monitor)
    else:
        paths = [findings_of(output, name) for name in adapters]
        found = detect_to_files(plans, paths, options, where, monitor, resume=resume, overwrite=overwrite)
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
    max_memory: int | str | None = None,
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
    base
        Directory of the base model, with ``model.safetensors`` or an index and its shards; or one ``.safetensors`` file.
    adapter
        Directory of a PEFT adapter, or of a fully fine-tuned model.
    output
        Directory to write: a PEFT adapter.
    findings
        From `detect_intruder_dimensions`, or the path of their file: no SVD of a weight is done then. They must be of the same base,
        adapter, `top_k` and `threshold_epsilon`. None detects first, into a findings file in the output.
    top_k
        How many leading singular directions of each matrix are judged: a count from 1, or a share of min(rows, columns) as a float
        in (0, 1].
    threshold_epsilon
        A direction is an intruder if its similarity, the largest |cosine| to any left singular vector of the base, is below this;
        in (0, 1].
    mitigation_lambda
        What is left of an intruder: 1 changes nothing, 0 removes it.
    method
        ``paper`` scales the whole direction, ``Δ' = Δ + (λ − 1) U Σ Vᵀ`` of the intruders; ``project`` only what the adapter put
        there, ``Δ' = (I − (1 − λ) U Uᵀ) Δ``; ``shrink`` the whole adapter, ``Δ' = λ Δ``, without detection.
    scale
        ``all``: every intruder among the top k; ``first``: the highest-ranked one of each matrix.
    to_lora
        Write a LoRA adapter of this rank, whatever the kind of the given one; the record says what relative norm the rank left out.
        None writes the given adapter's own kind, which must be LoRA, and not DoRA.
    model_card
        Put how it was made in front of the ``README.md``, and base and tags into its head. False leaves that file as it is.
    solver
        ``certified``: block Krylov with proven bounds, and the dense solver where these settle nothing; ``dense``: LAPACK's full
        SVD; ``auto``: the cheaper one for each matrix.
    max_memory
        Anonymous memory of the whole process, in bytes or as a size like ``"600M"`` or ``"4G"`` (powers of 1024); None takes what
        is needed. Under a budget large matrices are multiplied as they are stored, and what only a full SVD could settle stays
        open. One that is too small is refused, with the smallest that would do.
    device
        ``cpu``, ``cuda``, ``cuda:i``, or ``auto``: CUDA where there is one.
    io
        How tensors are read: ``mmap``, or ``pread`` for network file systems, where it takes a copy of each matrix in memory.
    base_is_residual
        True if `base` is what PiSSA, OLoRA, CorDA, LoRA-GA or LoftQ left of the model when the adapter was initialised. Adapters of
        these kinds are refused without it.
    resume
        Whether to take up an interrupted run with the same inputs and options; False starts it over.
    overwrite
        Whether to replace what stands at `output`: an output or an interrupted run of other inputs or options. Files that are not
        its own are never replaced.
    on_event
        Called with an `Event` at each step, warnings included. Where neither this nor `monitor` is given, warnings go through the
        `warnings` module, as `StreamerWarning`.
    monitor
        In place of `on_event`, a `Monitor`, for callers that also want to stop a run at its next safe point.

    Returns
    -------
    Written
        The record, as ``streamer.json`` has it, with `output` (where) and `state` (``written``, ``resumed`` or ``present``).

    Raises
    ------
    StreamerError
        Of the class that says what kind of fault it is, with a message of one line (see `streamer.errors`). Some are Python's own
        kinds as well: `ValueError` for options, broken files and inputs that do not belong together, `FileNotFoundError` for missing
        inputs, `FileExistsError` for an output that may not be replaced.
    """
    mitigation = MitigationOptions(mitigation_lambda, method, scale)
    detection = DetectionOptions(top_k, threshold_epsilon, solver, _bytes(max_memory))
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
    max_memory: int | str | None = None,
    device: str = "auto",
    io: IOMode = "mmap",
    base_is_residual: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    on_event: OnEvent | None = None,
    monitor: Monitor | None = None,
) -> Written | dict[str, Written]:
    """Write the base with the mitigated delta merged in: ``W0 + Δ'``, summed in float32 and rounded once to the base's dtype.

    Shard names, tensor order, dtypes, metadata and all other files are the base's; untouched tensors keep their bytes. Nothing is
    truncated. Weights that stand as FP8 codes are coded anew, with new scales: each value is rounded to the nearest of 4 significant
    bits. Other quantized weights are refused without `dequantize`.

    Parameters
    ----------
    base
        Directory of the base model, with ``model.safetensors`` or an index and its shards; or one ``.safetensors`` file.
    adapter
        Directory of a PEFT adapter, or of a fully fine-tuned model; or several, in a list or tuple, where a directory of adapters
        stands for those in it: the base is then read once for all.
    output
        Directory to write: a model. Of several adapters one where a model is written for each, under the adapter's name.
    findings
        From `detect_intruder_dimensions`, or the path of their file; of several adapters a dict of them by name, or the directory
        that was written for them. No SVD of a weight is done then. They must be of the same base, adapter, `top_k` and
        `threshold_epsilon`. None detects first, into a findings file in the output.
    top_k
        How many leading singular directions of each matrix are judged: a count from 1, or a share of min(rows, columns) as a float
        in (0, 1].
    threshold_epsilon
        A direction is an intruder if its similarity, the largest |cosine| to any left singular vector of the base, is below this;
        in (0, 1].
    mitigation_lambda
        What is left of an intruder: 1 changes nothing, 0 removes it.
    method
        ``paper`` scales the whole direction, ``Δ' = Δ + (λ − 1) U Σ Vᵀ`` of the intruders; ``project`` only what the adapter put
        there, ``Δ' = (I − (1 − λ) U Uᵀ) Δ``; ``shrink`` the whole adapter, ``Δ' = λ Δ``, without detection.
    scale
        ``all``: every intruder among the top k; ``first``: the highest-ranked one of each matrix.
    dequantize
        Write all that is quantized as plain tensors of the config's dtype, and take the quantization out of ``config.json``.
    model_card
        Put how it was made in front of the ``README.md``, and base and tags into its head. False leaves that file as it is.
    solver
        ``certified``: block Krylov with proven bounds, and the dense solver where these settle nothing; ``dense``: LAPACK's full
        SVD; ``auto``: the cheaper one for each matrix.
    max_memory
        Anonymous memory of the whole process, in bytes or as a size like ``"600M"`` or ``"4G"`` (powers of 1024); None takes what
        is needed. Under a budget large matrices are multiplied as they are stored, and what only a full SVD could settle stays
        open. One that is too small is refused, with the smallest that would do.
    device
        ``cpu``, ``cuda``, ``cuda:i``, or ``auto``: CUDA where there is one.
    io
        How tensors are read: ``mmap``, or ``pread`` for network file systems, where it takes a copy of each matrix in memory.
    base_is_residual
        True if `base` is what PiSSA, OLoRA, CorDA, LoRA-GA or LoftQ left of the model when the adapter was initialised. Adapters of
        these kinds are refused without it.
    resume
        Whether to take up an interrupted run with the same inputs and options; False starts it over.
    overwrite
        Whether to replace what stands at `output`: an output or an interrupted run of other inputs or options. Files that are not
        its own are never replaced.
    on_event
        Called with an `Event` at each step, warnings included. Where neither this nor `monitor` is given, warnings go through the
        `warnings` module, as `StreamerWarning`.
    monitor
        In place of `on_event`, a `Monitor`, for callers that also want to stop a run at its next safe point.

    Returns
    -------
    dict
        The record that stands in the output as ``streamer.json``; of several adapters a dict of records by name.

    Raises
    ------
    StreamerError
        Of the class that says what kind of fault it is, with a message of one line (see `streamer.errors`). Some are Python's own
        kinds as well: `ValueError` for options, broken files and inputs that do not belong together, `FileNotFoundError` for missing
        inputs, `FileExistsError` for an output that may not be replaced.
    """
    mitigation = MitigationOptions(mitigation_lambda, method, scale)
    detection = DetectionOptions(top_k, threshold_epsilon, solver, _bytes(max_memory))
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
    max_memory: int | str | None = None,
    device: str = "auto",
    io: IOMode = "mmap",
    base_is_residual: bool = False,
    on_event: OnEvent | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(name, tensor)`` of the merged model in file order, one tensor in memory at a time; nothing is written.

    Inputs are opened and checked by the call itself, not by the first step.

    Parameters
    ----------
    base
        Directory of the base model, with ``model.safetensors`` or an index and its shards; or one ``.safetensors`` file.
    adapter
        Directory of a PEFT adapter, or of a fully fine-tuned model.
    findings
        From `detect_intruder_dimensions`, or the path of their file: no SVD of a weight is done then. They must be of the same base,
        adapter, `top_k` and `threshold_epsilon`. None detects first, each matrix when its turn comes.
    top_k
        How many leading singular directions of each matrix are judged: a count from 1, or a share of min(rows, columns) as a float
        in (0, 1].
    threshold_epsilon
        A direction is an intruder if its similarity, the largest |cosine| to any left singular vector of the base, is below this;
        in (0, 1].
    mitigation_lambda
        What is left of an intruder: 1 changes nothing, 0 removes it.
    method
        ``paper`` scales the whole direction, ``Δ' = Δ + (λ − 1) U Σ Vᵀ`` of the intruders; ``project`` only what the adapter put
        there, ``Δ' = (I − (1 − λ) U Uᵀ) Δ``; ``shrink`` the whole adapter, ``Δ' = λ Δ``, without detection.
    scale
        ``all``: every intruder among the top k; ``first``: the highest-ranked one of each matrix.
    dequantize
        Yield all that is quantized as plain tensors of the config's dtype.
    solver
        ``certified``: block Krylov with proven bounds, and the dense solver where these settle nothing; ``dense``: LAPACK's full
        SVD; ``auto``: the cheaper one for each matrix.
    max_memory
        Anonymous memory of the whole process, in bytes or as a size like ``"600M"`` or ``"4G"`` (powers of 1024); None takes what
        is needed. Under a budget large matrices are multiplied as they are stored, and what only a full SVD could settle stays
        open. One that is too small is refused, with the smallest that would do.
    device
        ``cpu``, ``cuda``, ``cuda:i``, or ``auto``: CUDA where there is one.
    io
        How tensors are read: ``mmap``, or ``pread`` for network file systems, where it takes a copy of each matrix in memory.
    base_is_residual
        True if `base` is what PiSSA, OLoRA, CorDA, LoRA-GA or LoftQ left of the model when the adapter was initialised. Adapters of
        these kinds are refused without it.
    on_event
        Called with an `Event` as each tensor is begun, which counts bytes, and for each warning. Without it warnings go
        through the `warnings` module, as `StreamerWarning`.

    Yields
    ------
    name, tensor
        In the dtype that `merge_with_reduced_intruder_dimensions` would write. A tensor of a dtype that torch does not have comes as
        its bytes, a flat uint8 tensor.

    Raises
    ------
    StreamerError
        Of the class that says what kind of fault it is, with a message of one line (see `streamer.errors`). Some are Python's own
        kinds as well: `ValueError` for options, broken files and inputs that do not belong together, `FileNotFoundError` for missing
        inputs.
    """
    mitigation = MitigationOptions(mitigation_lambda, method, scale)
    detection = DetectionOptions(top_k, threshold_epsilon, solver, _bytes(max_memory))
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
    return [given_findings(findings, name) for name in names]


def _check_findings(plan: Plan, findings: Findings, name: str | Path, options: DetectionOptions) -> None:
    findings.check_matches(plan.base_identity, plan.adapter_identity, options)
    shapes = {m.tensor: m.shape for m in findings}
    missing = [t.tensor for t in plan.targets if shapes.get(t.tensor) != t.module.shape]
    if missing:
        raise MismatchError(
            f"{name}: has no findings on {len(missing)} of {len(plan.targets)} matrices, {missing[0]!r} first; "
            "pass those on all matrices, or run detect again"
        )


def _monitor(plans: Sequence[Plan], monitor: Monitor | None, on_event: OnEvent | None) -> Monitor:
    monitor = monitor or Monitor(on_event or warn)
    monitor.warn(warning for plan in plans for warning in plan.warnings)
    return monitor


def verify_output(
    output: str | Path,
    base: str | Path | None = None,
    adapter: str | Path | None = None,
    *,
    sample: int | Literal["all"] = 3,
    max_memory: int | str | None = None,
    on_event: OnEvent | None = None,
    monitor: Monitor | None = None,
) -> Verification:
    """Compare an output with its record and, given its inputs, with what they give, by other code than wrote it.

    Files are hashed, opened with the safetensors library and compared with ``streamer.json`` and the index; findings are compared
    with the digest that they hold. Of base and adapter a sample of matrices is recomputed in float64 by numpy and scipy.

    Parameters
    ----------
    output
        Directory of a merged model or a mitigated adapter, or a findings file.
    base, adapter
        What it was made from; both, or neither.
    sample
        How many matrices are recomputed, spread over their kinds, the same of the same output; or ``all``.
    max_memory
        Matrices that take more memory, in bytes or as a size like ``"4G"``, are not recomputed.
    on_event
        Called with an `Event` at each step.
    monitor
        In place of `on_event`, a `Monitor`, for callers that also want to stop at the next safe point.

    Returns
    -------
    Verification
        What was compared, and which matrices could not be recomputed, and why.

    Raises
    ------
    VerificationError
        If anything differs: its `verification` has the same object, with the differences.
    StreamerError
        If the output has no record, or the inputs are others than it was made from (see `streamer.errors`).
    """
    return verify(output, base, adapter, sample, _bytes(max_memory), _monitor([], monitor, on_event))


def _bytes(max_memory: int | str | None) -> int | None:
    """Read a budget as the command line does."""
    if not isinstance(max_memory, str):
        return max_memory
    try:
        return parse_size(max_memory)
    except ValueError as e:
        raise UsageError(f"max_memory: {e}") from None
