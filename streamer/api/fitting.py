"""Offer the fit of coefficients as a function of the library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Unpack

from streamer.adapters.one_or_several import One
from streamer.api.keywords import FitKeywords, explained, watched
from streamer.api.options import Settings, given_workers, read_path, take
from streamer.api.records import DryRun, dry_run
from streamer.detection.findings import Findings
from streamer.events import Monitor
from streamer.fitting.options import FitOptions
from streamer.fitting.prepare import PreparedFit, prepare_fit
from streamer.fitting.records import inspect
from streamer.fitting.run import fit
from streamer.fitting.tasks import shared
from streamer.forecast.forecast import on_workers
from streamer.forecast.passes import forecast_fit
from streamer.methods.coefficients import Coefficients
from streamer.output.prepare import load_given
from streamer.workers.engine import Workers


@dataclass(frozen=True)
class FitRequest:
    """A fit as it is asked for.

    Attributes
    ----------
    output
        File of coefficients; None keeps them in memory.
    texts
        Paths of the ``general`` and the ``task`` text.
    findings
        Those whose intruders are scaled, to measure that beside; None if that is not asked for.
    """

    base: str | Path
    adapter: str | Path
    output: Path | None
    texts: Mapping[str, Path]
    options: FitOptions
    settings: Settings
    findings: Findings | str | Path | None = None

    @classmethod
    def of(
        cls, base: str | Path, adapter: str | Path, output: str | Path | None, keywords: Mapping[str, Any]
    ) -> FitRequest:
        """Make it of keywords of `fit_coefficients`, or of the command line's options."""
        keep = keywords.get("keep", FitOptions.keep)
        several = keep if isinstance(keep, Iterable) and not isinstance(keep, str) else [keep]
        shares = tuple(float(one) if isinstance(one, Real) else one for one in several)
        texts = {name: read_path(name, keywords[name]) for name in ("general", "task")}
        where = None if output is None else read_path("output", output)
        for name, given in (("base", base), ("adapter", adapter)):
            read_path(name, given)
        settings = take(Settings, keywords)
        return cls(
            base, adapter, where, texts, take(FitOptions, keywords, keep=shares), settings, keywords.get("findings")
        )

    def run(self, monitor: Monitor, workers: Workers | None = None) -> Coefficients:
        """Fit."""
        return fit(self._prepared(monitor, workers), self.output)

    def forecast(self, monitor: Monitor, workers: Workers | None = None) -> DryRun:
        """Check all, and say what a run would do and take; nothing is written."""
        assert self.output is not None
        prepared = self._prepared(monitor, workers, peek=True)
        state = inspect(prepared, self.output)
        if state != "done":
            prepared.warn()
        forecast = None if state == "done" else on_workers(forecast_fit(prepared), workers, prepared.resident)
        return dry_run("fit", self.output, state, len(prepared.plan.targets), 1, None, forecast)

    def _prepared(self, monitor: Monitor, workers: Workers | None, peek: bool = False) -> PreparedFit:
        base, adapter = self.settings.located(monitor, peek).pair(self.base, self.adapter)
        run, memory = self.settings.run_options(monitor, workers), self.settings.memory
        (found,) = load_given(self.findings, One(Path(adapter)))
        return shared(prepare_fit(Path(base), Path(adapter), self.texts, self.options, memory, run, found))


@explained(FitKeywords, Settings, FitOptions)
def fit_coefficients(
    base: str | Path,
    adapter: str | Path,
    output: str | Path | None = None,
    *,
    general: str | Path,
    task: str | Path,
    **options: Unpack[FitKeywords],
) -> Coefficients:
    """Fit an adapter to texts, in passes over the base: new right factors, or a coefficient for each of its own directions.

    As much of what the adapter learned as is to be kept, by its loss on the task's text, with as little forgetting as that allows. With
    ``Δ = L Rᵀ`` new right factors R' make ``Δ' = L R'ᵀ`` answer the task's inputs as Δ does, and general ones as little as possible; with
    ``Δ = U diag(s) Vᵀ`` its SVD, coefficients c in [0, 1] make it ``Δ' = U diag(c·s) Vᵀ``, by the divergence from the base on general
    text. No model is built: each weight is read when its module runs, and once more where the gradient passes through it. It needs
    transformers, with its tokenizers: ``pip install 'intruder-streamer[evaluate]'``.

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
        ``inputs``: right factors. ``direction``: a coefficient for each direction; ``matrix``: for each matrix; ``all``: one, a shrink
        whose λ is chosen by data. A delta that comes without factors, of DoRA or a fine-tuned model, has one coefficient in any case.
        None: inputs, or direction if a delta has no factors.
    holdout
        Share of each text's sequences that is held apart: by them the weight between the texts is chosen, and figures are measured.
    sequences, length
        Sequences of each text, and tokens of a sequence, at most.
    seed
        Decides which sequences are held apart.
    steps
        Points at which gradients of both texts are taken, beside the base and the adapter as it is; more take longer.
        None takes two for each share, and 3 at least.
    dtype, device
        As `evaluate_variants` has them.
    max_memory
        Anonymous memory as `detect_intruder_dimensions` counts it, in bytes or as a size like ``"4G"``; it decides how many
        sequences go together.
    executor
        Workers that compute gradients, run layers and measure, as `detect_intruder_dimensions` has them: the result is byte for byte that
        of this process.

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
    request = FitRequest.of(base, adapter, output, {**options, "general": general, "task": task})
    with watched(options) as monitor:
        return request.run(monitor, given_workers(options))
