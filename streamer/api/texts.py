"""Offer the commands that run text as functions of the library: evaluations, fits, maps, and the repair of an adapter."""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NotRequired,
    Self,
    TypedDict,
    Unpack,
    cast,
)

from streamer.api.calls import call, explained
from streamer.api.intruders import OutputRequest
from streamer.api.records import DryRun, dry_run
from streamer.api.requests import Request, take
from streamer.errors import OutputExistsError, UsageError
from streamer.evaluation.evaluate import PreparedEvaluation, prepare
from streamer.evaluation.evaluation import Evaluation, ReliableRecord
from streamer.events import Monitor
from streamer.fitting.choice import (
    HALF_OPTIONS,
    UNCHANGED_OPTIONS,
    RepairRow,
    choose,
    repair_line,
    repair_rows,
    shown_shares,
)
from streamer.fitting.fit import PreparedFit, prepare_fit, refuse_without_factors
from streamer.fitting.mapping import PreparedMap, prepare_map
from streamer.forecast import Forecast, forecast_texts, together
from streamer.json_types import State
from streamer.measuring.facts import check_dtype
from streamer.measuring.own_text import OwnText, PreparedOwnText, prepare_own_text
from streamer.measuring.prepared import Prepared
from streamer.measuring.sequences import GENERAL, TASK
from streamer.measuring.texts import BUILT_IN, OWN_NAME
from streamer.methods import Paper, Shrink, share_name
from streamer.methods.files import MAP, InputMap
from streamer.options import (
    ONE_BASE,
    EvaluateOptions,
    MappingOptions,
    RepairOptions,
    Texts,
    VariantOptions,
    argument,
    written,
)
from streamer.output.record import Written
from streamer.plan.plan import make_plan
from streamer.storage.transaction import RECORD_NAME, check_output_path
from streamer.streaming.variants import Variant, make_variants
from streamer.units import listed, quoted

if TYPE_CHECKING:
    from streamer.api.keywords import EvaluateKeywords, MapKeywords, RepairKeywords


class VariantsRequest(Request, VariantOptions):
    """Variants that are requested to be measured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.variants
        check_dtype(self.dtype)

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """List the base, the unchanged adapter and all variants, and read the files that they use."""
        methods = self.methods
        if methods is None:  # few by default: intruders are scaled if they are known
            methods = (Shrink.name,) if self.findings is None else (Paper.name, Shrink.name)
        files = self.files()
        return make_variants(
            tuple(methods),
            tuple(self.lambdas),
            self.select,
            files.get("coefficients"),
            self.amplify,
            files.get("map"),
        )


def _forecast(command: str, prepared: Prepared[Any], output: Path | None) -> DryRun:
    """Check that a run can write its output, and forecast it unless it is complete."""
    assert output is not None
    state = prepared.inspect(output)
    forecast = None
    if state != "done":
        prepared.warn()
        forecast = forecast_texts(prepared, output)
    return dry_run(command, output, state, len(prepared.plan.targets), 1, None, forecast)


class TextsRequest(Request):
    """A request with options of two texts: for want of given ones, the built-in one, and one that the adapter writes."""

    if TYPE_CHECKING:  # a subclass has them, with its own defaults
        adapter: str | Path
        general: str | Path | None
        task: str | Path | None
        prompts: str | Path | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts is not None and self.task is not None:
            raise UsageError(
                "prompts: applies only to text that the adapter writes, found task too; leave one of them out"
            )

    @property
    def own_path(self) -> Path:
        """Return the path of the text that the adapter writes, beside the output; without an output, it is not kept."""
        file = self.file or Path("text")
        return file.with_name(f"{file.name}.own.jsonl")

    @property
    def two_texts(self) -> dict[str, Path]:
        """Return the paths of the ``general`` and the ``task`` text."""
        return {
            GENERAL: general_text(self.general),
            TASK: self.own_path if self.task is None else Path(self.task),
        }

    def own_text(self, monitor: Monitor, peek: bool = False) -> PreparedOwnText | None:
        """Return what writes the task's text; None if the user gives it."""
        if self.task is not None:
            return None
        base, adapter, _, run = self.opened(self.adapter, None, monitor, peek=peek)
        return prepare_own_text(base, adapter, cast(Texts, self), self.memory, run)

    def forecast_with_text(self, command: str, monitor: Monitor, output: Path | None) -> DryRun:
        """Forecast a run together with the text that the adapter is to write, for which a text of the same size stands in."""
        own = self.own_text(monitor, peek=True)
        text = None if own is None else _forecast(command, own, self.own_path)
        if own is None or text is None or text["state"] == "done":
            return _forecast(command, self._prepared(monitor, peek=True), output)
        with self._given(own.stand_in()) as request:
            prepared = request._prepared(monitor, peek=True)
            if output is not None and output.exists() and not self.overwrite:
                monitor.note(
                    f"forecast only of {self.own_path}: whether {output} is of this text is not known before it"
                )
                return {**text, "output": str(output)}
            run = _forecast(command, prepared, output)
        both = together([Forecast(**cast(Any, found["forecast"])) for found in (text, run)])
        run["state"] = text["state"]
        return {
            **run,
            "files": run["files"] + text["files"],
            "forecast": cast(Any, both and asdict(both)),
        }

    @contextmanager
    def _given(self, text: OwnText) -> Iterator[Self]:
        """Return the request with a text given that is not kept."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, OWN_NAME)
            path.write_text(text.to_json(), encoding="utf-8")
            yield replace(self, task=path, prompts=None)

    @abstractmethod
    def _prepared(self, monitor: Monitor, peek: bool = False) -> Prepared[Any]:
        """Open and check the inputs of the run on texts."""

    def check_rest(self, own: PreparedOwnText, output: Path | None) -> None:
        """Check what the run needs besides the text, and an output that exists, before the adapter writes."""
        with self._given(own.stand_in()) as request:
            prepared = request._prepared(Monitor(lambda event: None), peek=True)
            for work in prepared.sweeps():
                prepared.limits_of(work)
            if output is not None and output.is_file() and not self.overwrite:
                prepared.refuse_others(output, prepared.read(output).facts, except_for=TASK)

    def write_own_text(self, monitor: Monitor, output: Path) -> None:
        """Let the adapter write the task's text, unless it has, or the user gives it."""
        own = self.own_text(monitor)
        if own is not None:
            if own.inspect(self.own_path) != "done":
                self.check_rest(own, output)
            own.result(self.own_path)


class EvaluateRequest(TextsRequest, VariantsRequest, EvaluateOptions):
    """A requested evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.texts

    def _refuse_seed(self) -> None:
        """Refuse a seed that decides nothing, since the text is given."""
        if self.task is not None and self.seed != EvaluateOptions.seed:
            raise UsageError(
                "seed: decides only what the adapter writes, found task too; leave one of them out"
            )

    @cached_property
    def texts(self) -> dict[str, Path]:
        """Return the paths of the ``general`` and the ``task`` text, and of others by file name."""
        texts = self.two_texts
        for other in [self.other] if isinstance(self.other, str | Path) else self.other:
            path = Path(other)
            if path.name in texts:
                raise UsageError(
                    f"other: expected files of different names, found two named {quoted(path.name)}; rename one"
                )
            texts[path.name] = path
        return texts

    def run(self, monitor: Monitor) -> Evaluation:
        """Run the evaluation."""
        self._refuse_seed()
        if self.file is not None:
            self.write_own_text(monitor, self.file)
        elif (own := self.own_text(monitor)) is not None:
            self.check_rest(own, None)
            with self._given(own.result(None)) as request:
                return request._prepared(monitor).result(None)
        return self._prepared(monitor).result(self.file)

    def forecast(self, monitor: Monitor) -> DryRun:
        """Check everything and forecast a run, without writing anything."""
        self._refuse_seed()
        if self.file is None:
            raise UsageError("output: a forecast is for a file, found none; give one")
        return self.forecast_with_text("evaluate", monitor, self.file)

    def _prepared(self, monitor: Monitor, peek: bool = False) -> PreparedEvaluation:
        base, adapter, findings, run = self.opened(self.adapter, self.findings, monitor, peek)
        return prepare(base, adapter, self.texts, findings, self, self.variants, self.memory, run)


@explained(EvaluateOptions)
def evaluate_variants(
    base: str | Path,
    adapter: str | Path,
    output: str | Path | None = None,
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
        ``.jsonl``, each line an object with ``text``, with ``prompt`` and ``completion``, or with ``messages`` (the assistant's answers
        count); ``.npy`` with token ids. Without `general`, a built-in text of prose, chat and code; without `task`, text that base +
        adapter write, sampled from the base's tokens between texts or from `prompts`, and saved beside the output as ``NAME.own.jsonl``.
    prompts, seed
        What decides the text that the adapter writes: a file with lines with which sequences begin (``.txt``, or ``.jsonl`` with ``prompt``
        or ``messages``), and the seed.
    other
        One or more other texts with different file names. They show what each variant does to text that no fit or suggestion uses.
    findings
        Findings from `detect_intruder_dimensions`, or the path of their file; ``paper`` and ``project`` need them.
    methods, lambdas
        Methods to evaluate, each at each λ: ``paper``, ``project``, ``shrink`` (see `merge_with_reduced_intruder_dimensions`); by default
        ``shrink``, and ``paper`` if findings are given. ``regmean`` alone evaluates only the coefficients. With ``shrink``, one more shrink
        is measured, at the λ that keeps the share `keep`.
    coefficients
        Coefficients, or the path of the file that `repair_adapter` writes: one more variant, such as ``regmean 0.9``. A warning names texts
        to which they were fitted.
    map
        Map from `map_inputs`, or the path of its file: ``nullspace`` is then evaluated at each λ too.
    sequences, length
        Most sequences of each text, and most tokens of each sequence; fewer sequences are used once the suggestion is clear.
    keep
        Least share of the learning that the suggested variant keeps.
    projected
        Evaluate deltas projected onto the adapter's rank, as `reduce_intruder_dimension` writes them, instead of complete deltas.
    dtype
        ``bf16`` rounds base weights, their inputs and outputs to bfloat16, on processors with instructions for it; means change by up to
        1e-3. Deltas, norms and the softmax stay float32.

    Returns
    -------
    Evaluation
        Measures with their errors, by variant; `Evaluation.best` chooses one.

    Raises
    ------
    MissingPackageError
        If transformers is not installed.
    UnsupportedError
        If the model or the adapter cannot be evaluated.
    NumericError
        If a sweep did not use everything that the adapter changes.
    """
    return call(EvaluateRequest(base=base, adapter=adapter, output=output, **options))


def general_text(path: str | Path | None) -> Path:
    """Return the user's text, or the built-in one for None alone: an empty name is a mistake, such as an unset variable in a shell."""
    return BUILT_IN if path is None else Path(path)


class MapRequest(Request, MappingOptions):
    """A requested map; without a general text, of the built-in one."""

    base: str | Path = argument("", ONE_BASE)  # several texts would look like several bases

    def __post_init__(self) -> None:
        super().__post_init__()
        if MAP.is_at(Path(self.base)):
            raise UsageError(f"{self.base}: is a map; name the base to map")
        check_dtype(self.dtype)

    def run(self, monitor: Monitor) -> InputMap:
        """Make the map."""
        return self._prepared(monitor).result(self.file)

    def forecast(self, monitor: Monitor) -> DryRun:
        """Check everything and forecast a run, without writing anything."""
        return _forecast("map", self._prepared(monitor, peek=True), self.file)

    def _prepared(self, monitor: Monitor, peek: bool = False) -> PreparedMap:
        base = self.located(monitor, peek).path(self.base)
        return prepare_map(
            base, general_text(self.general), self, self.memory, self.make_run(monitor)
        )


@explained(MappingOptions)
def map_inputs(
    base: str | Path,
    output: str | Path | None = None,
    *,
    general: str | Path | None = None,
    **options: Unpack[MapKeywords],
) -> InputMap:
    """Map the inputs of a base's modules on general text, in one sweep: the leading eigenvectors of each input's second moments.

    With the map, `reduce_intruder_dimension` and the other functions with the keyword `map` reduce any adapter's response to general inputs
    on this base. They then need only files: no text of the task, no sweep, no detection. Making the map needs transformers with its
    tokenizers: ``pip install 'intruder-streamer[evaluate]'``.

    Parameters
    ----------
    base
        Directory of the base model: its ``config.json``, its weights and, unless the text is token ids, its tokenizer.
    output
        Safetensors file to write; a killed run starts over. None keeps the map in memory.
    general
        Text that shows what the model can do, in a format of `evaluate_variants`. None uses the built-in text:
        prose, chat and code.
    vectors
        Number of vectors to keep for each input.
    sequences, length
        Most sequences of the text, and most tokens of each sequence.
    dtype, device
        As for `evaluate_variants`.

    Returns
    -------
    InputMap
        Map for all matrices of the base that multiply inputs, and for its embeddings.

    Raises
    ------
    MissingPackageError
        If transformers is not installed.
    """
    return call(MapRequest(base=base, output=output, general=general, **options))


# fmt: off
class RepairRecord(TypedDict):
    """What `repair_adapter` returns and `streamer repair --json` prints: the measurements, the choice, and the files."""
    schema: Literal["streamer.repair/1"]
    chosen: Annotated[Literal["repair", "shrink", "adapter"], "What was written."]
    why: Annotated[str, "The reason, in one line."]
    rows: Annotated[list[RepairRow], "What was measured: the adapter, shrinks, the repair."]
    reliable: Annotated[ReliableRecord, "Which shares have a meaning: their denominators are large enough, and kept and top1_kept were not "
        "measured on text that the adapter wrote."]
    fit: Annotated[str, "The file of the fit, beside the output."]
    lora: NotRequired[Annotated[str, "With --to-lora: the adapter as a LoRA adapter, beside the output, which was repaired in its place."]]
    own_text: NotRequired[Annotated[str, "Without --task: the file of the text that the adapter wrote, beside the output."]]
    samples: NotRequired[Annotated[list[str], "Of a text that the adapter wrote: its first sequences."]]
    output: Annotated[str, "Path of the output, as given."]
    state: State
# fmt: on


@dataclass(frozen=True)
class Repaired:
    """The record of a repair, with the choice, and the record of the output."""

    record: RepairRecord
    written: Written


class RepairRequest(TextsRequest, RepairOptions):
    """A requested repair; with `to_lora` the adapter is converted first.

    Attributes
    ----------
    lora
        Path of the converted adapter, if this is its repair.
    """

    output: str | Path = written("", "DIR")
    lora: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if share_name(self.keep) == "1":
            raise UsageError(
                f"keep: {self.keep!r} is the unchanged adapter, which needs no fit; give a smaller share"
            )
        check_dtype(self.dtype)
        if self.for_server and self.merge:
            raise UsageError(
                "for_server: applies only to an adapter, found merge=True too; leave one of them out"
            )
        if self.dequantize and not self.merge:
            raise UsageError(
                "dequantize: applies only to a model, which `merge=True` writes, found dequantize alone; pass both, or neither"
            )

    @property
    def directory(self) -> Path:
        """Return the path of the output."""
        return Path(self.output)

    @property
    def fit_path(self) -> Path:
        """Return the path of the fit, beside the output."""
        return self.directory.with_name(f"{self.directory.name}.fit.safetensors")

    def run(self, monitor: Monitor) -> Repaired:
        """Convert the adapter if requested, fit, choose, and write."""
        if self.to_lora is not None:
            self._refuse_foreign_directory()
            self._conversion_request.run(monitor)
            return self._repair_of_converted.run(monitor)
        self._check(monitor)
        self.write_own_text(monitor, self.fit_path)
        fit = self._prepared(monitor).result(self.fit_path)
        choice = choose(fit)
        rows = repair_rows(fit)
        reliable = shown_shares(fit)
        samples = fit.facts["texts"][TASK].get("samples", [])
        measured = {
            "measured": [choice.why, *(repair_line(row, reliable) for row in rows)],
            "repair": {"rows": rows, "reliable": reliable, "keep": self.keep, "samples": samples},
        }
        output = self._output(measured=measured, **choice.options).run(monitor)
        written = cast(Written, output)  # of one adapter
        record: RepairRecord = {
            "schema": "streamer.repair/1",
            "chosen": choice.what,
            "why": choice.why,
            "rows": rows,
            "reliable": cast(Any, reliable),
            "fit": str(self.fit_path),
            "output": str(self.output),
            "state": written["state"],
        }
        if self.lora is not None:
            record["lora"] = self.lora
        if self.task is None:
            record["own_text"] = str(self.own_path)
        if samples:
            record["samples"] = samples
        return Repaired(record, written)

    def _output(self, **changes: Any) -> OutputRequest:
        """Return a request that writes the adapter mitigated as the changes say."""
        command = "merge" if self.merge else "mitigate"
        unset = {"to_lora": None, "device": "cpu", "dtype": None, "command": command}
        return take(OutputRequest, vars(self), **{**unset, **changes})

    @property
    def _conversion_request(self) -> OutputRequest:
        """Return the request that writes the adapter as a LoRA adapter beside the output."""
        path = self.directory.with_name(f"{self.directory.name}.lora")
        return self._output(
            **UNCHANGED_OPTIONS,
            output=path,
            to_lora=self.to_lora,
            command="mitigate",
            dequantize=False,
            for_server=False,
            model_card=True,
        )

    @property
    def _repair_of_converted(self) -> RepairRequest:
        """Return the repair of the adapter that the conversion writes."""
        lora = self._conversion_request.output
        return replace(self, adapter=lora, to_lora=None, lora=str(lora))

    def _check(self, monitor: Monitor) -> None:
        """Refuse, before the fit, an adapter that cannot be fitted, and an output that could not be written after it."""
        base, adapter = self.located(monitor, True).paths(self.base, self.adapter)
        plan = make_plan(base, adapter, self.io, self.stated, self.architecture)
        refuse_without_factors(plan, self.merge)
        self._output(**HALF_OPTIONS).open(monitor)
        self._refuse_foreign_directory()

    def _refuse_foreign_directory(self) -> None:
        """Refuse a file, and a directory that no repair made."""
        check_output_path(self.directory, ())
        names = sorted(path.name for path in self.directory.glob("*"))
        if names and not self.overwrite and not self.fit_path.exists():
            raise OutputExistsError(
                f"{self.directory}: holds {listed(names)}, and {self.fit_path}, the fit of a repair, does not exist; choose another "
                "directory, or pass --overwrite, which leaves foreign files there",
                self.directory,
            )

    def forecast(self, monitor: Monitor) -> DryRun:
        """Check everything, and forecast the fit, which needs nearly all the time, and the output, without writing anything.

        An adapter that is not yet converted shows only what its conversion needs.
        """
        if self.to_lora is not None:
            first = cast(DryRun, self._conversion_request.forecast(monitor))
            if first["state"] == "done":
                return self._repair_of_converted.forecast(monitor)
            monitor.note(f"forecast only of {self._conversion_request.output}, which the fit needs")
            return {**first, "command": "repair", "output": str(self.output)}
        self._check(monitor)
        dry = self.forecast_with_text("repair", monitor, self.fit_path)
        if dry["state"] == "done" and not (self.directory / RECORD_NAME).exists():
            dry["state"] = "resume"  # the fit exists, but not its output
        if not self.directory.exists() and (forecast := dry["forecast"]) is not None:
            # Every possible output has the same size.
            output = cast(DryRun, self._output(**HALF_OPTIONS).forecast(monitor))
            dry["files"] += output["files"]
            forecast["write_bytes"] += output["bytes"] or 0
        return {**dry, "output": str(self.output)}

    def _prepared(self, monitor: Monitor, peek: bool = False) -> PreparedFit:
        base, adapter, _, run = self.opened(self.adapter, None, monitor, peek)
        return prepare_fit(base, adapter, self.two_texts, self, self.memory, run)


@explained(RepairOptions)
def repair_adapter(
    base: str | Path, adapter: str | Path, output: str | Path, **options: Unpack[RepairKeywords]
) -> RepairRecord:
    """Write an adapter that forgets less: fit it to texts, measure it, and write it if it is better than a shrink.

    Forgetting is the divergence from the base on held-out sequences of general text. If the repair does not diverge less than the shrink of
    the whole adapter that keeps the same share, by two standard errors, that shrink is written. The unchanged adapter is written if it does
    not forget, if the gain is not worth the loss, or if no measured shrink keeps the same share. The fit is written to
    ``OUTPUT.fit.safetensors`` beside the output. This needs transformers: ``pip install 'intruder-streamer[evaluate]'``.

    Parameters
    ----------
    base
        Directory of the base model: its ``config.json``, its weights and, unless all texts are token ids, its tokenizer.
    adapter
        Directory of a PEFT adapter, or of a fully fine-tuned model; without LoRA factors it needs `to_lora`.
    output
        Directory to write: a PEFT adapter, or a model with `merge`.
    task
        Text of the kind that the adapter was trained for, but not used in training, in a format of `evaluate_variants`. Without it, the
        adapter writes a text, which is saved beside the output as ``OUTPUT.own.jsonl``; see `evaluate_variants`.
    prompts
        Lines with which the text that the adapter writes begins.
    general
        Text that shows what the model could do before. None uses the built-in text (prose, chat, code); your own is better.
    keep
        Share of the learning to keep, below 1.
    merge
        Write the model with the repaired adapter merged in, instead of an adapter.
    dequantize
        With `merge`: write all quantized weights as plain tensors of the config's dtype.
    to_lora
        Write the adapter first as a LoRA adapter of this rank, as for `reduce_intruder_dimension`, into ``OUTPUT.lora`` beside the output,
        and repair that one: for DoRA, LoHa, LoKr, a fine-tuned model and all other adapters without LoRA factors.
    weights
        Weights μ of the general text against the task's, in rising order: the candidates that are fitted and measured.
    holdout, seed
        Share of each text's sequences to hold out, and the seed for choosing them; they choose among the candidates, and give the figures.
    sequences, length
        Most sequences of each text, and most tokens of each sequence.
    dtype, device
        As for `evaluate_variants`.

    Returns
    -------
    RepairRecord
        What was measured and written, as ``streamer repair --json`` prints it.

    Raises
    ------
    MissingPackageError
        If transformers is not installed.
    """
    return call(RepairRequest(base=base, adapter=adapter, output=output, **options)).record
