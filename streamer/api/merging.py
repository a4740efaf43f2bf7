"""Offer merging as functions of the library: into files, or tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Unpack, overload

from torch import Tensor

from streamer.adapters.batch import named_adapters
from streamer.adapters.stated import LoraBLayout, Stated
from streamer.api.keywords import Merging, Several, detection_options, mitigation_options, run_options
from streamer.detection.findings import Findings
from streamer.detection.selection import Selection
from streamer.events import Monitor, OnEvent
from streamer.methods import MethodName
from streamer.methods.coefficients import Coefficients
from streamer.output.iterate import merged_tensors
from streamer.output.prepare import OutputOptions, findings_by_name, open_jobs, prepare_outputs
from streamer.output.records import Written
from streamer.output.run import run_jobs
from streamer.progress import monitoring
from streamer.remote.inputs import Remote, RemoteMode
from streamer.storage.tensor_file import IOMode


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
    mitigation_lambda: float | None = None,
    amplify: bool = False,
    method: MethodName | None = None,
    scale: Selection = "all",
    coefficients: Coefficients | str | Path | None = None,
    keep: float | None = None,
    dequantize: bool = False,
    model_card: bool = True,
    solver: str = "auto",
    max_memory: int | str | None = None,
    device: str = "auto",
    io: IOMode = "mmap",
    base_is_residual: bool = False,
    lora_b_layout: LoraBLayout | None = None,
    ignore_keys: Sequence[str] = (),
    architecture: str | None = None,
    remote: RemoteMode | None = None,
    resume: bool = True,
    overwrite: bool = False,
    on_event: OnEvent | None = None,
    monitor: Monitor | None = None,
    progress: bool | None = None,
) -> Written | dict[str, Written]:
    """Write the base with the mitigated delta merged in: ``W0 + Δ'``, summed in float32 and rounded once to the base's dtype.

    Shard names, tensor order, dtypes, metadata and all other files are the base's; untouched tensors keep their bytes. Nothing is
    truncated. Weights that stand in FP8 are quantized anew, with new scales: each value is rounded to the nearest of 4 significant
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
        Leading singular directions of each matrix that are judged: a count from 1, or a share of min(rows, columns), a float in (0, 1].
    threshold_epsilon
        An intruder is a direction whose similarity, its largest |cosine| to a left singular vector of the base, is below this, in (0, 1].
    mitigation_lambda
        Share of an intruder that is kept, from 0 (removed) to 1 (unchanged). None is 0.75, and no λ if there are `coefficients`.
    amplify
        Allow λ outside [0, 1]: above 1 an intruder grows, below 0 its sign changes.
    method
        ``paper`` scales the whole direction, ``Δ' = Δ + (λ − 1) U Σ Vᵀ`` of the intruders; ``project`` only what the adapter put there,
        ``Δ' = (I − (1 − λ) U Uᵀ) Δ``. Without detection ``shrink`` scales the whole adapter, ``Δ' = λ Δ``, and ``fitted`` each singular
        direction of Δ by its coefficient, ``Δ' = U diag(c) Uᵀ Δ``. None is ``fitted`` where there are coefficients, else ``paper``.
    scale
        ``all``: every intruder among the top k; ``first``: the highest-ranked one of each matrix.
    coefficients
        From `fit_coefficients`, or the path of their file, for the method ``fitted``: fitted to this base and adapter.
    keep
        Which coefficients, where there are several sets: those that keep this share of what the adapter learned.
    dequantize
        Write all that is quantized as plain tensors of the config's dtype, and take the quantization out of ``config.json``.
    model_card
        Put how it was made in front of the ``README.md``, and base and tags into its head. False leaves that file as it is.
    solver
        ``certified``: block Krylov with proven bounds, and the dense solver where these settle nothing; ``dense``: LAPACK's full
        SVD; ``auto``: the cheaper one for each matrix.
    max_memory
        Anonymous memory of Python, torch and streamer (200M, or 350M with a GPU's torch, before any matrix), without your program's data,
        in bytes or as a size like ``"4G"`` (powers of 1024); None takes what is needed. Under a budget large matrices are multiplied as
        they are stored, and what only a full SVD could settle stays open. Too small a one is refused.
    device
        ``cpu``, ``cuda``, ``cuda:i``, or ``auto``: CUDA where there is one.
    io
        How tensors are read: ``mmap``, or ``pread`` for network file systems, where it takes a copy of each matrix in memory.
    base_is_residual
        True if `base` is what PiSSA, OLoRA, CorDA, LoRA-GA or LoftQ left of the model; their adapters are refused without it.
    lora_b_layout
        Order of ``lora_B``'s columns on stacked experts, if not in the config: ``rank_major`` (PEFT) or ``grouped_by_expert`` (older
        Unsloth).
    ignore_keys
        Keys of ``adapter_config.json`` that are not known and have no effect, as you say: they are refused otherwise.
    architecture
        Class of the base in transformers, like ``"GPT2LMHeadModel"``, if its ``config.json`` is missing or names one that is not known.
    remote
        For inputs at addresses: ``cache`` downloads them first, ``stream`` reads ranges; None: ``cache`` from the hub, else ``stream``.
    resume
        Whether to take up an interrupted run with the same inputs and options; False starts it over.
    overwrite
        Whether to replace an output or an interrupted run of other inputs or options, or to write into a directory of other files.
        Files that are not the output's own are never replaced.
    on_event
        Called with an `Event` at each step, warnings included. Without it and `monitor`, Python warns, with `StreamerWarning`.
    monitor
        In place of `on_event`, a `Monitor`, for callers that also want to stop a run at its next safe point.
    progress
        True draws tqdm bars. None draws them in a notebook if there is neither `on_event` nor `monitor`.

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
    mitigation = mitigation_options(mitigation_lambda, method, scale, coefficients, keep, amplify)
    detection = detection_options(top_k, threshold_epsilon, solver, max_memory)
    form = OutputOptions(merges=True, dequantize=dequantize, model_card=model_card)
    with monitoring(on_event, monitor, progress) as watcher:
        run = run_options(
            device, io, Stated(base_is_residual, lora_b_layout, ignore_keys), architecture, watcher, resume, overwrite
        )
        inputs = Remote(remote, monitor=run.monitor)
        base = inputs.path(base)
        adapters = named_adapters(inputs.path(adapter) if isinstance(adapter, str | Path) else inputs.paths(adapter))
        given = findings_by_name(findings, adapters)
        records = run_jobs(prepare_outputs(base, adapters, output, given, mitigation, detection, form, run), run)
        return records[0] if "" in adapters else dict(zip(adapters, records, strict=True))


def iter_merged(
    base: str | Path,
    adapter: str | Path,
    *,
    findings: Findings | str | Path | None = None,
    top_k: int | float = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float | None = None,
    amplify: bool = False,
    method: MethodName | None = None,
    scale: Selection = "all",
    coefficients: Coefficients | str | Path | None = None,
    keep: float | None = None,
    dequantize: bool = False,
    solver: str = "auto",
    max_memory: int | str | None = None,
    device: str = "auto",
    io: IOMode = "mmap",
    base_is_residual: bool = False,
    lora_b_layout: LoraBLayout | None = None,
    ignore_keys: Sequence[str] = (),
    architecture: str | None = None,
    remote: RemoteMode | None = None,
    on_event: OnEvent | None = None,
    progress: bool | None = None,
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
    top_k, threshold_epsilon, mitigation_lambda, amplify, method, scale, coefficients, keep
        What an intruder is and what becomes of it, as `merge_with_reduced_intruder_dimensions` has them.
    dequantize
        Yield all that is quantized as plain tensors of the config's dtype.
    solver, max_memory, device, io, base_is_residual, lora_b_layout, ignore_keys, architecture, remote
        How detection computes, and how inputs are read, as `merge_with_reduced_intruder_dimensions` has them.
    on_event
        Called with an `Event` as each tensor is begun, which counts bytes, and for each warning. Without it warnings go
        through the `warnings` module, as `StreamerWarning`.
    progress
        True draws a tqdm bar. None draws it in a notebook if there is no `on_event`.

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
    mitigation = mitigation_options(mitigation_lambda, method, scale, coefficients, keep, amplify)
    detection = detection_options(top_k, threshold_epsilon, solver, max_memory)
    form = OutputOptions(merges=True, dequantize=dequantize)
    with monitoring(on_event, None, progress) as monitor:  # its bar closes with the last tensor
        run = run_options(device, io, Stated(base_is_residual, lora_b_layout, ignore_keys), architecture, monitor)
    base, adapter = Remote(remote, monitor=run.monitor).pair(base, adapter)
    adapters = {"": Path(adapter)}
    (job,) = open_jobs(base, adapters, findings_by_name(findings, adapters), mitigation, detection, form, run)
    run.monitor.warn(job.plan.warnings)
    return merged_tensors(job, run.monitor)
