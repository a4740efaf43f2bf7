"""Offer an evaluation: the losses of an adapted model's variants, the suggestion, the JSON, and the text for people."""

import json
import math
from pathlib import Path
from typing import Annotated, Final, Literal, NotRequired, Self, TypedDict, cast

import numpy as np

from streamer.detection.options import OptionsRecord
from streamer.errors import FormatError, UnknownNameError
from streamer.evaluation.curve import Verdict
from streamer.evaluation.judgement import Reason, Suggestion, suggest
from streamer.evaluation.words import command_of, commands, figures, reasons, verdict
from streamer.json_types import (
    Count,
    Difference,
    JsonObject,
    KeptShare,
    Keywords,
    Mean,
    Selection,
    Sha256,
    State,
    Version,
    check,
)
from streamer.measuring.facts import Configs, ProductDtype
from streamer.measuring.sequences import GENERAL, TASK, TextFacts
from streamer.measuring.statistics import (
    MEASURES,
    Effect,
    EvaluatedVariant,
    Measured,
    SequenceSums,
    Sums,
    defined,
    flattened,
)
from streamer.methods import MethodName
from streamer.methods.files import CoefficientsRecord, MapRecord
from streamer.plan.side_files import AdapterSource, BaseSource
from streamer.storage.files import read_regular, strict_json
from streamer.streaming.variants import ADAPTER_ROW, BASE_ROW
from streamer.tables import table
from streamer.units import listed, quoted

EVALUATION_SCHEMA: Final = "streamer.evaluation/1"

LARGEST_SUM = 1e100
"""Sums above this are damaged; their squares might overflow."""

MOST_LOSS = 700.0
"""Largest loss whose perplexity fits in a float."""


# fmt: off
Lambda = Annotated[float | None, "Share to keep: of an intruder, of the delta (shrink), or of its energy on general inputs (nullspace); "
    "null for base, adapter and regmean."]

class _Texts(TypedDict):
    general: Annotated[TextFacts, "What the base can do and should not forget."]
    task: Annotated[TextFacts, "What the adapter was trained for."]
    others: NotRequired[Annotated[list[TextFacts], "Other texts, if any; they affect no suggestion."]]

class _SequenceTokens(TypedDict):
    general: Annotated[list[float], "Of the general text."]
    task: Annotated[list[float], "Of the task's text."]

_Sums = list[float | None]

class _SumsRecord(TypedDict):
    loss: Annotated[_Sums, "Of the negative log likelihood, in nats."]
    kl: Annotated[_Sums, "Of the divergence from the base, in nats."]
    kl_from_adapter: NotRequired[Annotated[_Sums, "Of the divergence from the adapter, in nats."]]
    agree: Annotated[_Sums, "Counts of tokens whose most likely token is the base's."]
    right: Annotated[_Sums, "Counts of tokens that the variant finds most likely."]

class TextFigures(TypedDict):
    """Figures of a variant on one text."""
    loss: Annotated[Mean, "Mean negative log likelihood over the tokens that count, in nats."]
    perplexity: Annotated[float | None, "exp(loss); null if it exceeds the range of a double."]
    kl: Annotated[Mean, "Mean divergence KL(base || variant) of the next-token distribution, in nats."]
    agreement: Annotated[Mean, "Share of counted tokens for which the most likely next token is the base's."]
    top1: Annotated[Mean | None, "Share of counted tokens that are the variant's most likely token."]
    sequences: Annotated[Count, "Sequences that it ran on."]
    sums: Annotated[_SumsRecord, "Sums over the counted tokens of each sequence, from which all figures follow."]

class OtherFigures(TextFigures):
    """Figures of a variant on another text."""
    name: Annotated[str, "Name of the text's file."]
    share: Annotated[Mean | None, "(variant - base) / (adapter - base) of the losses; null if undefined."]

class OtherText(TypedDict):
    """Effect of the unchanged adapter on another text."""
    name: Annotated[str, "Name of its file."]
    effect: Annotated[Effect, "Whether the adapter's loss is above the base's or below it, by two standard errors."]
    change: Annotated[Difference, "The adapter's mean loss minus the base's, in nats per token."]
    reliable: Annotated[bool, "Whether the change is over four standard errors, so that shares of it are meaningful."]
    tokens: Annotated[list[float], "Counted tokens of each sequence."]

class Against(TypedDict):
    """Differences to another variant."""
    general_loss: Annotated[Difference, "Difference of the mean losses on the general text."]
    general_kl: Annotated[Difference, "Difference of the mean divergences on the general text."]
    task_loss: Annotated[Difference, "Difference of the mean losses on the task's text."]
    task_top1: Annotated[Difference | None, "Difference of the top-1 on the task's text."]

VariantRecord = TypedDict("VariantRecord", {
    "name": Annotated[str, "`base`, `adapter`, or method and lambda, such as `paper 0.5`; for a fit, method and share."],
    "method": Annotated[MethodName | None, "The method; null for base and adapter."],
    "lambda": Lambda,
    "keep": NotRequired[Annotated[float, "With method regmean: share of the learning that the set was fitted to keep."]],
    "general": Annotated[TextFigures, "On the general text."],
    "task": Annotated[TextFigures, "On the task's text."],
    "others": NotRequired[Annotated[list[OtherFigures], "On the other texts, in the order of `texts.others`."]],
    "kept": Annotated[Mean | None, "Share of the learning: (base - variant) / (base - adapter) of the task's losses; null if undefined."],
    "behaviour_kept": NotRequired[Annotated[Mean | None, "1 - KL(adapter || variant) / KL(adapter || base) on the task's text; null if "
        "undefined, absent from files of earlier versions."]],
    "top1_kept": Annotated[Mean | None, "Share of the adapter's gain in top-1 on the task's text; null if undefined."],
    "forgetting": Annotated[Mean | None, "Share of the rise of the general loss: (variant - base) / (adapter - base); null if undefined."],
    "divergence": Annotated[Mean | None, "Mean divergence on the general text as a share of the adapter's; null if that is 0."],
    "against_adapter": Annotated[Against, "Differences from the unchanged adapter."],
    "against_base": Annotated[Against, "Differences from the base; PEFT's method comparison calls `general_loss` forgetting."],
})
VariantRecord.__doc__ = "A variant that was evaluated."

ShrinkRecord = TypedDict("ShrinkRecord", {
    "lambda": Annotated[float, "Lambda of that shrink."],
    "between": Annotated[list[float], "The neighbouring lambdas that were evaluated; 1 is the unchanged adapter."],
    "loss": Annotated[Difference, "Difference of the mean losses on the general text; below 0, the variant forgets less. This error and "
        "the next ones include the uncertainty of the share kept and of the interpolation."],
    "kl": Annotated[Difference, "Difference of the mean divergences on the general text."],
    "top1": Annotated[Difference | None, "Difference of the top-1 on the task's text."],
    "verdict": Annotated[Verdict, "By the divergence, and more than two standard errors."],
})
ShrinkRecord.__doc__ = "A shrink of the whole adapter."

class TradeRecord(TypedDict):
    """What a variant gives up and regains, compared with the unchanged adapter."""
    name: Annotated[str, "Its name."]
    regained: Annotated[Difference, "Mean divergence of the adapter on the general text minus the variant's, in nats per token."]
    given_up: Annotated[Difference, "Mean loss of the variant on the task's text minus the adapter's, in nats per token."]
    worth: Annotated[float, "A variant is worth it if it regains more than this factor times what it gives up, by two standard errors."]
    worth_it: Annotated[bool, "Whether it is worth it."]

class ReliableRecord(TypedDict):
    """Whether shares are meaningful: their denominators are over four standard errors (more with few sequences); tables show no others."""
    kept: Annotated[bool, "Shares of the learning."]
    forgetting: Annotated[bool, "Shares of the rise of the general loss."]
    top1_kept: Annotated[bool, "Shares of the gain in top-1 on the task's text; false if there is no gain."]

SuggestionRecord = TypedDict("SuggestionRecord", {
    "name": Annotated[str | None, "Its name; null if nothing can be suggested."],
    "method": Annotated[MethodName | None, "The method; null for base and adapter."],
    "lambda": Lambda,
    "reason": Annotated[Reason, "not learned: the adapter's task loss is not below the base's by two standard errors (more with few "
        "sequences, by Student's quantile), and nothing is suggested; not forgotten: its divergence is not above 0 by two, and the "
        "unchanged adapter is suggested; none better: no variant that keeps enough forgets less; not worth it: none of these regains "
        "enough for what it gives up; forgets least: the best of the others; a shrink is better: one that was not measured beats it."],
    "keep": Annotated[KeptShare, "Share of the learning to keep."],
    "swapped": Annotated[bool, "Whether the texts may be swapped: the adapter's task loss is above the base's by two standard errors."],
    "command": Annotated[list[str] | None, "Command and options that make it; add base, adapter, output and findings."],
    "shrink": Annotated[ShrinkRecord | None, "The variant that forgets least, compared with the interpolated shrink that keeps the same "
        "share; null if the variant is a shrink or the adapter, or if no evaluated shrinks enclose the share."],
    "trade": Annotated[TradeRecord | None, "What the suggested variant, or the one not worth it, gives up and regains."],
})
SuggestionRecord.__doc__ = "The variant to use."

class EvaluationHead(TypedDict):
    """The first keys."""
    schema: Literal["streamer.evaluation/1"]
    verdict: Annotated[str, "Which variant to use, in one line."]

class EvaluationFacts(TypedDict):
    """Inputs and options of an evaluation."""
    version: Version
    transformers: Annotated[str, "Version of transformers."]
    base: Annotated[BaseSource, "The base model: its name, and what identifies it, wherever it is stored."]
    adapter: Annotated[AdapterSource, "The adapter, or the fine-tuned model in its place, described in the same way."]
    factored: Annotated[bool, "Whether all deltas are products of LoRA factors, so that mitigate can write them."]
    quantized: Annotated[bool, "Whether a merge must write a quantized base as a plain one (--dequantize)."]
    configs: NotRequired[Configs]
    detection: Annotated[OptionsRecord | None, "How the intruders were found; null if none were needed (only method shrink)."]
    scale: Annotated[Selection, "Which intruders are scaled: all, or the highest-ranked one of each matrix."]
    findings: NotRequired[Annotated[Sha256, "Digest of the decisions in the findings, if findings were given (SHA-256, hexadecimal)."]]
    intruders: NotRequired[Annotated[Count, "Intruders that were found, if variants should scale them; if 0, these variants are not run."]]
    projected: Annotated[bool, "Whether deltas were projected onto the adapter's rank, as mitigate does, or complete, as in a merge."]
    dtype: Annotated[ProductDtype, "Dtype to which base weights, and inputs and results of their products, are rounded; else float32."]
    texts: Annotated[_Texts, "The texts."]
    coefficients: NotRequired[Annotated[list[CoefficientsRecord], "The sets of coefficients that were evaluated, if any."]]
    map: NotRequired[Annotated[MapRecord, "The map of the base's inputs, if one was given."]]
    plan: Annotated[Sha256, "Digest of the keys from `transformers` on, which all variants of a comparison share (SHA-256, hexadecimal)."]

class EvaluationRecord(EvaluationHead, EvaluationFacts):
    """What `streamer evaluate` writes and prints: losses of base, adapter and variants, on a general text and on the task's."""
    tokens: Annotated[_SequenceTokens, "Counted tokens of each sequence."]
    others: NotRequired[Annotated[list[OtherText], "The other texts, if any."]]
    keep: NotRequired[Annotated[KeptShare, "Share of the learning that the suggested variant keeps."]]
    variants: Annotated[list[VariantRecord], Keywords(minItems=2), "The base, the unchanged adapter, each method from its largest lambda "
        "on, then each set of coefficients. The shrinks include the one that keeps the share asked for."]
    reliable: Annotated[ReliableRecord, "Whether the denominators of shares are large enough."]
    front: Annotated[list[str], "Names of variants that no other variant equals or beats in both the task's loss and the divergence."]
    suggestion: Annotated[SuggestionRecord, "The variant to use."]
    output: NotRequired[Annotated[str, "Path of the output, as given. Printed only."]]
    state: NotRequired[Annotated[State, "Printed only."]]
# fmt: on


FACTS = EvaluationFacts.__annotations__


def variant_record(measured: Measured, row: int) -> JsonObject:
    """Describe a variant: `VariantRecord`."""
    variant = measured.variants[row]
    others = [
        {"name": name, **_figures(sums, row), **flattened(share=sums.share("loss", row))}
        for name, sums in measured.others.items()
    ]
    return {
        "name": variant.name,
        "method": variant.method,
        "lambda": variant.mitigation_lambda,
        **({} if variant.keep is None else {"keep": variant.keep}),
        "general": _figures(measured.general, row),
        "task": _figures(measured.task, row),
        **({"others": others} if others else {}),
        **flattened(**measured.shares(row)),
        "against_adapter": _against(measured, row, ADAPTER_ROW),
        "against_base": _against(measured, row, BASE_ROW),
    }


def _figures(sums: SequenceSums, row: int) -> JsonObject:
    """Describe a variant on one text: `TextFigures`."""
    loss = sums.mean("loss", row)
    return flattened(
        loss=loss,
        perplexity=math.exp(loss.value) if loss.value < MOST_LOSS else None,
        kl=sums.mean("kl", row),
        agreement=sums.mean("agree", row),
        top1=sums.mean("right", row),
        sequences=len(sums.tokens),
        sums={name: [defined(x) for x in sums[name][row]] for name in MEASURES},
    )


def _against(measured: Measured, row: int, other: int) -> JsonObject:
    """Compare two variants: `Against`."""
    return flattened(
        general_loss=measured.general.mean("loss", row, other),
        general_kl=measured.general.mean("kl", row, other),
        task_loss=measured.task.mean("loss", row, other),
        task_top1=measured.task.mean("right", row, other),
    )


def _other_text(name: str, sums: SequenceSums) -> JsonObject:
    """Describe another text: `OtherText`."""
    return flattened(
        name=name,
        effect=sums.effect,
        change=sums.change,
        reliable=sums.change.divides,
        tokens=sums.tokens.tolist(),
    )


def _suggestion(measured: Measured, suggestion: Suggestion) -> JsonObject:
    """Describe the suggestion: `SuggestionRecord`."""
    variant = suggestion.variant
    shrink = suggestion.shrink
    return {
        "name": variant and variant.name,
        "method": variant and variant.method,
        "lambda": variant and variant.mitigation_lambda,
        "reason": suggestion.reason,
        "keep": suggestion.keep,
        "swapped": suggestion.swapped,
        "command": variant and command_of(measured, variant),
        "shrink": shrink and shrink.record(),
        "trade": suggestion.trade and suggestion.trade.record(),
    }


def _variant(tree: JsonObject) -> EvaluatedVariant:
    optional = NotRequired[float | None]
    check(tree, {"name": str, "method": str | None, "lambda": float | None, "keep": optional})
    return EvaluatedVariant(tree["name"], tree["method"], tree["lambda"], tree.get("keep"))


def _all_sums(tree: JsonObject) -> Sums:
    """Collect the sums on all texts."""
    variants = tree["variants"]
    sums = {
        text: _read_sums(text, tree["tokens"][text], [variant[text] for variant in variants])
        for text in (GENERAL, TASK)
    }
    for i, other in enumerate(tree.get("others", ())):
        figures = [variant["others"][i] for variant in variants]
        sums[other["name"]] = _read_sums(other["name"], other["tokens"], figures)
    return sums


def _read_sums(text: str, tokens: list[float], figures: list[JsonObject]) -> SequenceSums:
    """Collect the sums on a text from the variants' figures."""
    # Earlier versions did not measure the divergence from the adapter.
    unknown = {"kl_from_adapter": [None] * len(tokens)}
    arrays = {
        name: np.array([{**unknown, **f["sums"]}[name] for f in figures], np.float64)
        for name in MEASURES
    }
    shapes = {array.shape for array in arrays.values()}
    if np.isnan(arrays["loss"]).any():
        raise ValueError(f"{text}: a variant lacks sequences")
    if shapes != {(len(figures), len(tokens))} or len(figures) < 2 or len(tokens) < 2:
        raise ValueError(f"sums of {text} are {listed(map(str, sorted(shapes)))}")
    counted = all(
        type(count) in (int, float) and 0 < count <= LARGEST_SUM and count % 1 == 0
        for count in tokens
    )
    if not counted or any((np.abs(array) > LARGEST_SUM).any() for array in arrays.values()):
        raise ValueError(f"sums or token counts of {text} are impossible")
    return SequenceSums(np.array(tokens, np.float64), **arrays)


class Evaluation(Measured):
    """Losses of an adapted model's variants, shown as a table and written as JSON.

    Attributes
    ----------
    variants
        The base, the unchanged adapter, each method at each λ, and each set of coefficients.
    general, task
        Sums over each sequence of the two texts, for each variant.
    facts
        Inputs and options, as JSON: `EvaluationFacts`.
    keep
        Share of the learning that the suggested variant keeps by default.
    others
        Sums over each sequence of other texts, by file name.
    """

    def best(self, keep: float | None = None) -> Suggestion:
        """Suggest the variant that forgets least among those that keep this share of the learning; see `Suggestion`.

        Raises
        ------
        UsageError
            If `keep` is not in (0, 1].
        """
        return suggest(self, self.keep if keep is None else keep)

    def __getitem__(self, name: str) -> VariantRecord:
        """Return the figures of a variant by name, as in the JSON."""
        names = [v.name for v in self.variants]
        if name not in names:
            raise UnknownNameError(
                f"evaluation: has no variant {name!r}; it has {', '.join(names)}"
            )
        return cast(VariantRecord, variant_record(self, names.index(name)))

    def table(self, keep: float | None = None) -> str:
        """Format the verdict, the table, its legend, the reasons and the commands as text of unlimited width."""
        suggestion = self.best(keep)
        words = [*reasons(self, suggestion), *commands(self, suggestion)]
        return "\n".join([verdict(self, suggestion), "", table(figures(self)), "", *words])

    def __repr__(self) -> str:
        return f"<Evaluation: {len(self.variants)} variants, {len(self.general.tokens)} general and {len(self.task.tokens)} task sequences>"

    def to_dict(self, keep: float | None = None) -> EvaluationRecord:
        """Make the JSON object (schema ``streamer.evaluation/1``); `from_json` rebuilds the evaluation from its sums per sequence."""
        suggestion = self.best(keep)
        tree = {
            "schema": EVALUATION_SCHEMA,
            "verdict": verdict(self, suggestion),
            **{key: self.facts[key] for key in FACTS if key in self.facts},
            "tokens": {text: self.sums[text].tokens.tolist() for text in (GENERAL, TASK)},
        }
        if self.others:
            tree["others"] = [_other_text(*other) for other in self.others.items()]
        tree |= {
            "keep": self.keep,
            "variants": [variant_record(self, row) for row in range(len(self.variants))],
            "reliable": self.reliable(),
            "front": self.front(),
            "suggestion": _suggestion(self, suggestion),
        }
        return cast(EvaluationRecord, tree)

    def shown_variants(self) -> list[JsonObject]:
        """Make the JSON of all variants, with null for shares of the two texts that tables leave out."""
        unreliable = [name for name, reliable in self.reliable().items() if not reliable]
        hidden = dict.fromkeys(f"{name}{end}" for name in unreliable for end in ("", "_se"))
        return [{**variant_record(self, row), **hidden} for row in range(len(self.variants))]

    def to_json(self, keep: float | None = None) -> str:
        """Return the JSON object as text."""
        return json.dumps(self.to_dict(keep), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read an evaluation from the text that `to_json` or ``streamer evaluate`` wrote.

        Raises
        ------
        FormatError
            If the text is not an evaluation.
        """
        try:
            tree = strict_json(text.encode())
            if tree["schema"] != EVALUATION_SCHEMA:
                raise ValueError(f"the schema {tree['schema']!r}")
            variants = [_variant(variant) for variant in tree["variants"]]
            required = EvaluationFacts.__required_keys__
            facts = {key: tree[key] for key in FACTS if key in tree or key in required}
            sums = _all_sums(tree)
            keep = tree.get("keep", tree["suggestion"]["keep"])
            evaluation = cls.of(variants, sums, facts, keep)
            evaluation.to_json()  # fails for sums that no run has, such as negative squares
        except (ArithmeticError, AttributeError, ValueError, LookupError, TypeError) as e:
            raise FormatError(
                f"expected an evaluation ({EVALUATION_SCHEMA}), found: {quoted(str(e))}; evaluate again"
            ) from e
        return evaluation


def load_evaluation(path: str | Path) -> Evaluation:
    """Read an evaluation from the file that `evaluate_variants` or ``streamer evaluate`` wrote.

    Raises
    ------
    MissingInputError, FormatError
        If the file does not exist, or is not an evaluation.
    """
    raw = read_regular(Path(path), "an evaluation")
    try:
        return Evaluation.from_json(raw.decode())
    except UnicodeDecodeError as e:
        raise FormatError(
            f"{path}: expected an evaluation ({EVALUATION_SCHEMA}), found a file that is not text"
        ) from e
    except FormatError as e:
        raise FormatError(f"{path}: {e}") from e
