"""Offer the fit of coefficients as a function of the library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path

from streamer.adapters.stated import LoraBLayout, Stated
from streamer.api.keywords import read_path, read_size, run_options
from streamer.evaluation.options import ProductDtype
from streamer.events import Monitor, OnEvent
from streamer.fitting.options import FitOptions, Grain, Objective
from streamer.fitting.prepare import prepare_fit
from streamer.fitting.run import fit
from streamer.methods.coefficients import Coefficients
from streamer.progress import monitoring
from streamer.remote.inputs import Remote, RemoteMode
from streamer.storage.tensor_file import IOMode


def fit_coefficients(
    base: str | Path,
    adapter: str | Path,
    output: str | Path | None = None,
    *,
    general: str | Path,
    task: str | Path,
    keep: float | Sequence[float] = 0.9,
    objective: Objective = "divergence",
    grain: Grain = "direction",
    holdout: float = 0.25,
    sequences: int = 64,
    length: int = 512,
    seed: int = 0,
    steps: int | None = None,
    dtype: ProductDtype = "float32",
    max_memory: int | str | None = None,
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
) -> Coefficients:
    """Fit a coefficient in [0, 1] for each singular direction of the adapter's own deltas, in passes over the base.

    With ``Δ = U diag(s) Vᵀ`` the SVD of a matrix' delta, the fitted one is ``Δ' = U diag(c·s) Vᵀ``: as much of what the adapter learned as
    is to be kept, by its loss on the task's text, with as little forgetting as that allows, by the divergence from the base on general
    text. No model is built: each weight is read when its module runs, and once more where the gradient passes through it. It takes
    transformers, with its tokenizers: ``pip install 'intruder-streamer[evaluate]'``. All is on the CPU.

    Parameters
    ----------
    base
        Directory of the base model: its ``config.json``, its weights and, unless texts are token ids, its tokenizer.
    adapter
        Directory of a PEFT adapter, or of a fully fine-tuned model. Modules that it saves whole, biases and tokens stay as they are.
    output
        File of coefficients to write; each step is journalled beside it, so that a killed run resumes. None keeps the result in memory.
    general, task
        Texts, in the forms that `evaluate_variants` takes: of what the model could do before, and of what the adapter was trained for.
    keep
        Share of what the adapter learned that is to stay, below 1; several give several sets of coefficients.
    objective
        ``divergence``: ``KL(base ‖ fitted)`` on the general text and ``KL(adapter ‖ fitted)`` on the task's are made small, which takes
        no labels; ``loss``: the losses of the two.
    grain
        ``direction``: a coefficient for each direction; ``matrix``: for each matrix; ``all``: one, a shrink whose λ is chosen by data. A
        delta that comes without factors, of DoRA or a fine-tuned model, has one coefficient in any case.
    holdout
        Share of each text's sequences that is held apart: by them the weight between the texts is chosen, and figures are measured.
    sequences, length
        Sequences of each text, and tokens of a sequence, at most.
    seed
        Decides which sequences are held apart.
    steps
        Points at which gradients of both texts are taken, beside the base and the adapter as it is; more take longer.
        None takes two for each share, and 3 at least.
    dtype
        As `evaluate_variants` has it.
    max_memory
        Anonymous memory as `detect_intruder_dimensions` counts it, in bytes or as a size like ``"4G"``; it decides how many
        sequences go together.
    io, base_is_residual, lora_b_layout, ignore_keys, architecture, remote
        How tensors are read, what the base is, its class, and how inputs at addresses are read, as `detect_intruder_dimensions` has them.
    resume
        Whether to take up an interrupted run with the same inputs and options; False starts it over.
    overwrite
        Whether to replace coefficients, or an interrupted fit, of other inputs or options.
    on_event
        Called with an `Event` at each step, warnings included.
    monitor
        In place of `on_event`, a `Monitor`, for callers that also want to stop a run at its next safe point.
    progress
        True draws tqdm bars. None draws them in a notebook if there is neither `on_event` nor `monitor`.

    Returns
    -------
    Coefficients
        A set for each share; the figures measured on the sequences held apart are in its `facts`.

    Raises
    ------
    MissingPackageError
        If transformers is not installed.
    StreamerError
        Of the class that says what kind of fault it is (see `streamer.errors`): `UnsupportedError` for a model or adapter that this
        cannot fit, `FormatError` for a text too short to hold sequences apart, `NumericError` where a loss is NaN.
    """
    several = keep if isinstance(keep, Iterable) and not isinstance(keep, str) else [keep]
    shares = tuple(float(one) if isinstance(one, Real) else one for one in several)
    options = FitOptions(shares, objective, grain, holdout, sequences, length, seed, steps, dtype)
    with monitoring(on_event, monitor, progress) as watcher:
        run = run_options(
            "cpu", io, Stated(base_is_residual, lora_b_layout, ignore_keys), architecture, watcher, resume, overwrite
        )
        texts = {"general": read_path("general", general), "task": read_path("task", task)}
        written = None if output is None else read_path("output", output)
        for name, given in (("base", base), ("adapter", adapter)):
            read_path(name, given)
        base, adapter = Remote(remote, monitor=run.monitor).pair(base, adapter)
        prepared = prepare_fit(Path(base), Path(adapter), texts, options, read_size(max_memory), run)
        return fit(prepared, written)
