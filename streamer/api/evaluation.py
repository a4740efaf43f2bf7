"""Offer the evaluation of variants as a function of the library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from streamer.adapters.stated import LoraBLayout, Stated
from streamer.api.keywords import detection_options, read_coefficients, run_options
from streamer.detection.findings import Findings
from streamer.detection.selection import Selection
from streamer.evaluation.evaluation import Evaluation
from streamer.evaluation.options import LAMBDAS, EvaluationOptions, ProductDtype
from streamer.evaluation.prepare import prepare
from streamer.evaluation.run import evaluate
from streamer.events import Monitor, OnEvent
from streamer.methods import BY_LAMBDA, MethodName
from streamer.methods.coefficients import Coefficients
from streamer.progress import monitoring
from streamer.remote.inputs import Remote, RemoteMode
from streamer.storage.tensor_file import IOMode


def evaluate_variants(
    base: str | Path,
    adapter: str | Path,
    output: str | Path | None = None,
    *,
    general: str | Path,
    task: str | Path,
    findings: Findings | str | Path | None = None,
    methods: Sequence[MethodName] = BY_LAMBDA,
    lambdas: Sequence[float] = LAMBDAS,
    amplify: bool = False,
    scale: Selection = "all",
    coefficients: Coefficients | str | Path | None = None,
    sequences: int = 64,
    length: int = 512,
    keep: float = 0.9,
    projected: bool = False,
    dtype: ProductDtype = "float32",
    top_k: int | float = 10,
    threshold_epsilon: float = 0.5,
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
) -> Evaluation:
    """Measure the losses of the base, the adapter as it is, and every method at every λ, on two texts, in passes over the base.

    No merged model is built: each weight is read when its module runs, and used for all variants at once. It takes transformers, with
    its tokenizers: ``pip install 'intruder-streamer[evaluate]'``. All but a detection that runs first is on the CPU.

    Parameters
    ----------
    base
        Directory of the base model: its ``config.json``, its weights and, unless texts are token ids, its tokenizer.
    adapter
        Directory of a PEFT adapter, or of a fully fine-tuned model.
    output
        File to write as JSON; passes are journalled beside it, so that a killed run resumes. If it holds an evaluation of the same inputs,
        texts and options, only the variants that it lacks are measured and added. None keeps the result in memory.
    general, task
        Texts: of what the model could do before, and of what the adapter was trained for; neither of them trained on. ``.txt``;
        ``.jsonl`` with an object a line that has ``text``, ``prompt`` and ``completion``, or ``messages``, of which the answers count;
        or ``.npy`` of token ids.
    findings
        From `detect_intruder_dimensions`, or the path of their file. None detects first, into memory.
    methods, lambdas
        Every method is evaluated at every λ: ``paper``, ``project``, ``shrink`` (see `merge_with_reduced_intruder_dimensions`).
        ``fitted`` alone evaluates the coefficients, and no other method. With ``shrink``, up to three more shrinks are measured to find
        the λ that keeps the share `keep`.
    amplify
        Allow λ outside [0, 1].
    scale
        ``all``: every intruder among the top k; ``first``: the highest-ranked one of each matrix.
    coefficients
        From `fit_coefficients`, or the path of their file: each set of them is one more variant, ``fitted 0.9``. Of text that they were
        fitted to there is a warning.
    sequences, length
        Sequences of each text, and tokens of a sequence, at most.
    keep
        Share of what the adapter learned that the suggested variant keeps at least.
    projected
        Evaluate what `reduce_intruder_dimension` writes, projected onto the adapter's rank, in place of complete deltas.
    dtype
        ``bf16``: products of the base's weights with activations are of factors rounded to bfloat16, on a processor that is fast at it
        (AMX); means move by up to 1e-3. Deltas, norms, the softmax and all sums stay float32.
    top_k, threshold_epsilon, solver, device
        Options of a detection that runs first, as `detect_intruder_dimensions` has them.
    max_memory
        Anonymous memory as `detect_intruder_dimensions` counts it, in bytes or as a size like ``"4G"``; it decides how many
        sequences and variants go together. None takes what 4,096 tokens, of all variants together, or one sequence need.
    io, base_is_residual, lora_b_layout, ignore_keys, architecture, remote
        How tensors are read, what the base is, its class, and how inputs at addresses are read, as `detect_intruder_dimensions` has them.
    resume
        Whether to take up an interrupted run with the same inputs and options; False starts it over.
    overwrite
        Whether to replace an evaluation, or an interrupted one, of other inputs or options.
    on_event
        Called with an `Event` at each step, warnings included.
    monitor
        In place of `on_event`, a `Monitor`, for callers that also want to stop a run at its next safe point.
    progress
        True draws tqdm bars. None draws them in a notebook if there is neither `on_event` nor `monitor`.

    Returns
    -------
    Evaluation
        Measures with their errors, by variant; `Evaluation.best` chooses one.

    Raises
    ------
    MissingPackageError
        If transformers is not installed.
    StreamerError
        Of the class that says what kind of fault it is (see `streamer.errors`): `UnsupportedError` for a model or adapter that this
        cannot evaluate, `NumericError` where a pass did not use all that the adapter changes.
    """
    given = None if coefficients is None else read_coefficients(coefficients)
    options = EvaluationOptions(
        tuple(methods), tuple(lambdas), scale, sequences, length, keep, projected, dtype, given, amplify
    )
    detection = detection_options(top_k, threshold_epsilon, solver, max_memory)
    with monitoring(on_event, monitor, progress) as watcher:
        run = run_options(
            device, io, Stated(base_is_residual, lora_b_layout, ignore_keys), architecture, watcher, resume, overwrite
        )
        found = findings if findings is None or isinstance(findings, Findings) else Path(findings)
        texts = {"general": Path(general), "task": Path(task)}
        base, adapter = Remote(remote, monitor=run.monitor).pair(base, adapter)
        prepared = prepare(base, Path(adapter), texts, found, options, detection, run)
        return evaluate(prepared, None if output is None else Path(output))
