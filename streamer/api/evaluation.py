"""Offer the evaluation of variants as a function of the library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from streamer.adapters.one_or_several import One
from streamer.api.keywords import EvaluateKeywords, explained, watched
from streamer.api.options import Judged, Settings, given_workers, read_coefficients, read_map, read_path, take
from streamer.api.records import DryRun, dry_run
from streamer.detection.findings import Findings
from streamer.errors import UsageError
from streamer.evaluation.evaluation import Evaluation
from streamer.evaluation.options import EvaluationOptions
from streamer.evaluation.prepare import Prepared, prepare
from streamer.evaluation.records import inspect, measured_before
from streamer.evaluation.run import evaluate
from streamer.events import Monitor
from streamer.forecast.forecast import on_workers
from streamer.forecast.passes import forecast_evaluation
from streamer.output.prepare import load_given
from streamer.units import quoted
from streamer.workers.engine import Workers


@dataclass(frozen=True)
class EvaluateRequest:
    """An evaluation as it is asked for.

    Attributes
    ----------
    output
        Its file; None keeps it in memory.
    texts
        Paths of the ``general`` and the ``task`` text, and of others by the names of their files.
    """

    base: str | Path
    adapter: str | Path
    output: Path | None
    texts: Mapping[str, Path]
    findings: Findings | str | Path | None
    options: EvaluationOptions
    judged: Judged
    settings: Settings

    @classmethod
    def of(
        cls, base: str | Path, adapter: str | Path, output: str | Path | None, keywords: Mapping[str, Any]
    ) -> EvaluateRequest:
        """Make it of keywords of `evaluate_variants`, or of the command line's options."""
        options = evaluation_options(keywords)
        texts = {name: read_path(name, keywords[name]) for name in ("general", "task")}
        others = keywords.get("other") or ()
        for one in [others] if isinstance(others, str | Path) else others:
            path = read_path("other", one)
            if path.name in texts:
                raise UsageError(
                    f"other: expected files of different names, found two named {quoted(path.name)}; rename one"
                )
            texts[path.name] = path
        where = None if output is None else read_path("output", output)
        judged, settings = take(Judged, keywords), take(Settings, keywords)
        return cls(base, adapter, where, texts, keywords.get("findings"), options, judged, settings)

    def run(self, monitor: Monitor, workers: Workers | None = None) -> Evaluation:
        """Evaluate."""
        return evaluate(self._prepared(monitor, workers), self.output)

    def forecast(self, monitor: Monitor, workers: Workers | None = None) -> DryRun:
        """Check all, and say what a run would do and take; nothing is written."""
        assert self.output is not None
        prepared = self._prepared(monitor, workers, peek=True)
        state = inspect(prepared, self.output)
        known = None if state == "done" else measured_before(prepared, self.output)
        forecast = None
        if state != "done":
            forecast = on_workers(forecast_evaluation(prepared, known), workers, prepared.resident)
        return dry_run("evaluate", self.output, state, len(prepared.plan.targets), 1, None, forecast)

    def _prepared(self, monitor: Monitor, workers: Workers | None, peek: bool = False) -> Prepared:
        base, adapter = self.settings.located(monitor, peek).pair(self.base, self.adapter)
        run = self.settings.run_options(monitor, workers)
        (found,) = load_given(self.findings, One(Path(adapter)))
        detection = self.judged.options(self.settings.memory, found)
        return prepare(base, Path(adapter), self.texts, found, self.options, detection, run)


def evaluation_options(keywords: Mapping[str, Any]) -> EvaluationOptions:
    """Make the options of keywords, and read the files that they name."""
    given = keywords.get("coefficients")
    fitted = None if given is None else read_coefficients(given)
    several = {name: tuple(keywords[name]) for name in ("methods", "lambdas") if name in keywords}
    mapped = None if keywords.get("map") is None else read_map(keywords["map"])
    return take(EvaluationOptions, keywords, coefficients=fitted, map=mapped, **several)


@explained(EvaluateKeywords, Settings, EvaluationOptions)
def evaluate_variants(
    base: str | Path,
    adapter: str | Path,
    output: str | Path | None = None,
    *,
    general: str | Path,
    task: str | Path,
    **options: Unpack[EvaluateKeywords],
) -> Evaluation:
    """Measure the losses of the base, the adapter as it is, and every method at every λ, on texts, in passes over the base.

    No merged model is built: each weight is read when its module runs, and used for all variants at once. It needs transformers, with
    its tokenizers: ``pip install 'intruder-streamer[evaluate]'``.

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
        ``.jsonl`` with an object a line that has ``text``, ``prompt`` and ``completion``, or ``messages``, of which the answers count, or
        ``question``, ``choices`` and ``answer``, of which accuracies are measured; or ``.npy`` of token ids.
    other
        A further text, or several, of different file names: what each variant does to text by which nothing is fitted or suggested.
    findings
        From `detect_intruder_dimensions`, or the path of their file. None detects first, into memory.
    methods, lambdas
        Every method is evaluated at every λ: ``paper``, ``project``, ``shrink`` (see `merge_with_reduced_intruder_dimensions`).
        ``fitted`` alone evaluates the coefficients, and no other method. With ``shrink``, up to four more shrinks are measured to find
        the λ that keeps the share `keep`.
    coefficients
        From `fit_coefficients`, or the path of their file: each set of them is one more variant, ``fitted 0.9``. Of text that they were
        fitted to there is a warning.
    map
        From `map_inputs`, or the path of its file: ``nullspace`` is evaluated at every λ as well.
    sequences, length
        Sequences of each text, and tokens of a sequence, at most.
    keep
        Share of what the adapter learned that the suggested variant keeps at least.
    race
        Drop variants that have lost on an eighth, a quarter or a half of the sequences: they keep too little, or another or the shrink
        that keeps as much forgets less, by two standard errors. By default two shrinks run at first, not one at every λ. False runs all
        on all sequences.
    projected
        Evaluate what `reduce_intruder_dimension` writes, projected onto the adapter's rank, in place of complete deltas.
    dtype
        ``bf16``: products of the base's weights with activations are of factors rounded to bfloat16, on a processor that is fast at it
        (AMX); means move by up to 1e-3. Deltas, norms, the softmax and all sums stay float32.
    device
        ``cpu``, ``cuda`` or ``cuda:i``: where the model runs, and a detection that comes first; not yet run on a GPU. ``auto`` is the CPU
        for the model, and CUDA for the detection if a GPU is there.
    max_memory
        Anonymous memory as `detect_intruder_dimensions` counts it, in bytes or as a size like ``"4G"``; it decides how many
        sequences and variants go together. None takes what 4,096 tokens, of all variants together, or one sequence need.
    executor
        Workers that run passes, as `detect_intruder_dimensions` has them: the result is byte for byte that of this process.

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
    request = EvaluateRequest.of(base, adapter, output, {**options, "general": general, "task": task})
    with watched(options) as monitor:
        return request.run(monitor, given_workers(options))
