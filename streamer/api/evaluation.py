"""Offer the evaluation of variants as a function of the library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from streamer.adapters.finetuned import One
from streamer.api.keywords import EvaluateKeywords, explained, watched
from streamer.api.options import Judged, Settings, read_coefficients, read_map, read_path, take
from streamer.api.records import DryRun, dry_run
from streamer.detection.findings import Findings
from streamer.errors import UsageError
from streamer.evaluation.evaluate import Prepared, evaluate, inspect, measured_before, prepare
from streamer.evaluation.evaluation import Evaluation
from streamer.evaluation.losses import EvaluationOptions
from streamer.events import Monitor
from streamer.forecast import forecast_evaluation
from streamer.methods import Paper, Shrink
from streamer.output.write import load_given
from streamer.units import quoted


@dataclass(frozen=True)
class EvaluateRequest:
    """A requested evaluation.

    Attributes
    ----------
    output
        File to write; None keeps the evaluation in memory.
    texts
        Paths of the ``general`` and the ``task`` text, and of others by file name.
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
        """Make a request from keywords of `evaluate_variants`, or from options of the command line."""
        if keywords.get("methods") is None:  # few by default: intruders are scaled if they are known
            methods = (Shrink.name,) if keywords.get("findings") is None else (Paper.name, Shrink.name)
            keywords = {**keywords, "methods": methods}
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

    def run(self, monitor: Monitor) -> Evaluation:
        """Run the evaluation."""
        return evaluate(self._prepared(monitor), self.output)

    def forecast(self, monitor: Monitor) -> DryRun:
        """Check everything and forecast a run, without writing anything."""
        assert self.output is not None
        prepared = self._prepared(monitor, peek=True)
        state = inspect(prepared, self.output)
        known = None if state == "done" else measured_before(prepared, self.output)
        forecast = None if state == "done" else forecast_evaluation(prepared, known)
        return dry_run("evaluate", self.output, state, len(prepared.plan.targets), 1, None, forecast)

    def _prepared(self, monitor: Monitor, peek: bool = False) -> Prepared:
        base, adapter = self.settings.located(monitor, peek).paths(self.base, self.adapter)
        run = self.settings.make_run(monitor)
        (found,) = load_given(self.findings, One(Path(adapter)))
        detection = self.judged.options(self.settings.memory, found)
        return prepare(base, Path(adapter), self.texts, found, self.options, detection, run)


def evaluation_options(keywords: Mapping[str, Any]) -> EvaluationOptions:
    """Make the options from keywords, and read the files that they name."""
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
    """Measure the losses of the base, the unchanged adapter, and each method at each λ, on texts, in sweeps over the base's layers.

    No merged model is built: each weight is read once in a sweep, for all variants. Sweeps over more sequences follow until the suggestion
    is clear. This needs transformers with its tokenizers: ``pip install 'intruder-streamer[evaluate]'``.

    Parameters
    ----------
    base
        Directory of the base model: its ``config.json``, its weights and, unless all texts are token ids, its tokenizer.
    adapter
        Directory of a PEFT adapter, or of a fully fine-tuned model.
    output
        JSON file to write. Sweeps are recorded in a journal beside it, so that a killed run resumes. If the file holds an evaluation of the
        same inputs, texts and options, only the missing variants are measured and added. None keeps the result in memory.
    general, task
        Two texts that were not used in training: what the model could do before, and what the adapter was trained for. Formats: ``.txt``;
        ``.jsonl``, each line an object with ``text``, with ``prompt`` and ``completion``, with ``messages`` (the assistant's answers
        count), or with ``question``, ``choices`` and ``answer`` (accuracies are measured as well); ``.npy`` with token ids.
    other
        One or more other texts with different file names. They show what each variant does to text that no fit or suggestion uses.
    findings
        Findings from `detect_intruder_dimensions`, or the path of their file. None detects first, in memory.
    methods, lambdas
        Methods to evaluate, each at each λ: ``paper``, ``project``, ``shrink`` (see `merge_with_reduced_intruder_dimensions`); by default
        ``shrink``, and ``paper`` if findings are given. ``regmean`` alone evaluates only the coefficients. With ``shrink``, one more shrink
        is measured, at the λ that keeps the share `keep`.
    coefficients
        Coefficients from `fit_coefficients`, or the path of their file: each set is one more variant, such as ``regmean 0.9``. A warning
        names texts to which they were fitted.
    map
        Map from `map_inputs`, or the path of its file: ``nullspace`` is then evaluated at each λ too.
    sequences, length
        Most sequences of each text, and most tokens of each sequence; fewer sequences are used once the suggestion is clear.
    keep
        Least share of the learning that the suggested variant keeps.
    projected
        Evaluate deltas projected onto the adapter's rank, as `reduce_intruder_dimension` writes them, instead of complete deltas.
    dtype
        ``bf16`` rounds base weights and activations to bfloat16 before they are multiplied, on processors with fast bfloat16 (AMX); means
        change by up to 1e-3. Deltas, norms, the softmax and all sums stay float32.
    device
        ``cpu``, ``cuda`` or ``cuda:i`` for the model, and for detection if it runs first; no GPU has been tried yet. ``auto`` runs the
        model on the CPU, and detection on CUDA if a GPU is available.
    max_memory
        Budget of anonymous memory, in bytes or as a size like ``"4G"``, counted as in `detect_intruder_dimensions`; it limits how many
        sequences run together. None uses what a block of sequences under all variants needs.

    Returns
    -------
    Evaluation
        Measures with their errors, by variant; `Evaluation.best` chooses one.

    Raises
    ------
    MissingPackageError
        If transformers is not installed.
    StreamerError
        Its class names the kind of error (see `streamer.errors`): `UnsupportedError` for a model or adapter that cannot be evaluated,
        `NumericError` if a sweep did not use everything that the adapter changes.
    """
    request = EvaluateRequest.of(base, adapter, output, {**options, "general": general, "task": task})
    with watched(options) as monitor:
        return request.run(monitor)
