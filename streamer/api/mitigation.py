"""Offer mitigation of an adapter as a function of the library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Unpack, overload

from streamer.adapters.batch import named_adapters
from streamer.adapters.stated import LoraBLayout, Stated
from streamer.api.keywords import Reducing, Several, detection_options, mitigation_options, run_options
from streamer.detection.findings import Findings
from streamer.detection.selection import Selection
from streamer.events import Monitor, OnEvent
from streamer.methods import MethodName
from streamer.methods.coefficients import Coefficients
from streamer.output.prepare import OutputOptions, findings_by_name, prepare_outputs
from streamer.output.records import Written
from streamer.output.run import run_jobs
from streamer.progress import monitoring
from streamer.remote.inputs import Remote, RemoteMode
from streamer.storage.tensor_file import IOMode


@overload
def reduce_intruder_dimension(
    base: str | Path, adapter: str | Path, output: str | Path, *, findings: Findings | str | Path | None = None,
    **options: Unpack[Reducing],
) -> Written: ...  # fmt: skip
@overload
def reduce_intruder_dimension(
    base: str | Path, adapter: Several, output: str | Path, *, findings: Mapping[str, Findings] | str | Path | None = None,
    **options: Unpack[Reducing],
) -> dict[str, Written]: ...  # fmt: skip
def reduce_intruder_dimension(
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
    to_lora: int | float | None = None,
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
    """Write a new LoRA adapter whose delta has its intruders scaled by `mitigation_lambda`.

    The mitigated delta is projected onto ``lora_A``, ``lora_B`` at the adapter's own rank. The record says for each matrix what share of
    its norm is lost in projection (``dropped``); more than 1 % is a warning. Tensors of matrices without intruders are copied bit for bit.

    Parameters
    ----------
    base
        Directory of the base model, with ``model.safetensors`` or an index and its shards; or one ``.safetensors`` file.
    adapter
        Directory of a PEFT adapter, or of a fully fine-tuned model; or several, in a list or tuple, where a directory of adapters
        stands for those in it: detection then reads the base once for all.
    output
        Directory to write: a PEFT adapter. For several adapters, a directory in which each is written under its name.
    findings
        From `detect_intruder_dimensions`, or the path of their file; for several adapters a dict by name, or the directory that was
        written for them. No SVD of a weight is done then. They must be of the same base, adapter, `top_k` and `threshold_epsilon`.
        None detects first, into a findings file in the output.
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
    to_lora
        Write a LoRA adapter of this rank, whatever the kind of the given one; the record says what relative norm the rank left out. A
        float in (0, 1] is a share of the energy, the squared singular values, of each mitigated delta: each module gets the least rank
        that keeps it, as in PEFT's ``convert_to_lora``. Methods that need findings must be given them then. None writes the given
        adapter's own kind, which must be LoRA, and not DoRA.
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
        The record, as ``streamer.json`` has it, with `output` (where) and `state` (``written``, ``resumed`` or ``present``): a dict that
        is shown in a few lines. Several adapters give a dict of records by name.

    Raises
    ------
    StreamerError
        Its class says what kind of fault it is (see `streamer.errors`), and may be one of Python's: `ValueError` for options and inputs,
        `FileNotFoundError` for missing inputs, `FileExistsError` for an output that may not be replaced.
    """
    mitigation = mitigation_options(mitigation_lambda, method, scale, coefficients, keep, amplify)
    detection = detection_options(top_k, threshold_epsilon, solver, max_memory)
    form = OutputOptions(merges=False, to_lora=to_lora, model_card=model_card)
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
