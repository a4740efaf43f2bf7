"""Hold the losses of a model's variants, and what follows: the suggestion, the comparison with a shrink, the JSON, and the text for people.

The learning is the fall of the loss on the task's text from the base to the unchanged adapter. A variant keeps the share
``(base − variant) / (base − adapter)`` of it. Forgetting is the divergence from the base, ``KL(base ‖ variant)``, on general text. The
loss on that text is shown but decides nothing: instruction-tuned and quantized bases often gain on plain text, whatever they forget, and
on other bases divergence ranks variants as the loss does, but separates more of them.

The suggestion is the variant that forgets least among those that keep enough of the learning. It must also be worth it (`Trade`), and must
not diverge more than the shrink of the whole adapter that keeps the same share (`ShrinkComparison`). Few shrinks are measured: between
their λ, a cubic in λ through the four nearest interpolates what a shrink keeps and forgets. The interpolation is linear in the losses, so
the same weights apply to every loss and every sequence, and errors stay paired.

The JSON has the schema ``streamer.evaluation/1``. The text has the verdict, a table of the variants, the reasons, and the commands to run
next.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NotRequired, Self, TypedDict, cast

import numpy as np

from streamer.detection.options import DetectionOptions, OptionsRecord
from streamer.errors import FormatError, UnknownNameError, UsageError
from streamer.json_types import (
    Count,
    Difference,
    KeptShare,
    Keywords,
    Mean,
    Selection,
    Sha256,
    State,
    Version,
    check,
)
from streamer.linalg.torch_state import has_fast_bfloat16
from streamer.measuring import statistics
from streamer.measuring.runs import Configs, EvaluatedVariant, Facts, Sums, input_options
from streamer.measuring.statistics import (
    ADAPTER_ROW,
    BASE_ROW,
    MEASURES,
    Estimate,
    Floats,
    SequenceSums,
    record,
)
from streamer.measuring.texts import GENERAL, TASK
from streamer.methods import METHODS, MethodName, NullSpace, RegMean, Shrink, takes_findings
from streamer.methods.files import CoefficientsRecord, MapRecord
from streamer.options import SHARE, EvaluateOptions
from streamer.plan.side_files import AdapterSource, BaseSource
from streamer.storage.files import open_regular, strict_json
from streamer.tables import Column, table
from streamer.units import listed, quoted

NODES = 4
"""Number of nearest shrinks through which a cubic in λ interpolates."""

EXCESS = 0.002
"""A λ is well placed if it keeps the requested share and at most `EXCESS` more, which is a fraction of the share's standard error."""

STEPS = 1000
"""A placed λ is a multiple of 1 / STEPS, so that a command can name it."""

Node = tuple[float, int]
"""A variant's λ, to `DIGITS` decimals, and its row."""

DIGITS = 5
"""The losses of two λ that are closer differ by their rounding, and a curve through both is steep or NaN."""


@dataclass(frozen=True)
class ShrinkComparison:
    """A variant's differences from the equal shrink: the whole adapter times the λ that keeps the same share of the learning.

    λ is interpolated, and the errors of the differences are paired; see `ShrinkRecord`.
    """

    mitigation_lambda: float
    between: tuple[float, float]
    loss: Estimate
    kl: Estimate
    top1: Estimate

    @property
    def verdict(self) -> Literal["better", "worse", "not told apart"]:
        """Judge the variant by its divergence; only a difference beyond the error counts."""
        return (
            "better"
            if self.kl.is_negative
            else "worse"
            if self.kl.is_positive
            else "not told apart"
        )


def against_shrink(evaluation: Evaluation, variant: int) -> ShrinkComparison | None:
    """Compare a variant with the shrink that keeps the same share of the learning; see `ShrinkComparison`.

    A variant that keeps more than every measured shrink is compared with the one that keeps most. Return None if the variant is the base,
    the adapter or a shrink, or if the measured shrinks do not enclose its share.

    The error of a difference on general text combines three errors as independent: the difference's own error over sequences; the error
    of the variant's loss on the task's text, times the slope of the general loss against the task's loss along the shrinks; and the
    interpolation's error, estimated by its change without the farthest node.
    """
    variants, general, task = evaluation.variants, evaluation.general, evaluation.task
    if variants[variant].method in (None, Shrink.name):
        return None
    nodes = _by_lambda(variants)
    if len(nodes) < NODES and nodes[0][0] > 0:
        nodes.insert(0, (0.0, BASE_ROW))  # an approximation if the adapter has more than deltas
    losses = task.loss.sum(axis=1)
    above = [losses[row] - losses[variant] for _, row in nodes]
    if min(above) > 0:  # it keeps more than every shrink
        lam, row = min(nodes, key=lambda node: losses[node[1]])
        loss, kl = (general.mean(name, variant, row) for name in ("loss", "kl"))
        return ShrinkComparison(lam, (lam, lam), loss, kl, task.mean("right", variant, row))
    at = next((k for k in range(len(nodes) - 1) if above[k] * above[k + 1] <= 0), None)
    if at is None or len(nodes) < 3:
        return None
    between, near = (nodes[at][0], nodes[at + 1][0]), _nearest(nodes, at)
    lam = _crossing(near, between, losses, losses[variant])
    farthest = max((n for n in near if n[0] not in between), key=lambda n: abs(n[0] - lam))
    others = [n for n in near if n != farthest]
    shrink, slope = _weights(near, lam, len(losses))
    fewer, _ = _weights(others, _crossing(others, between, losses, losses[variant]), len(losses))
    unit = np.eye(len(variants))[variant]
    share_error, task_slope = task.of("loss", unit - shrink).error, task.of("loss", slope).value

    def estimate(sums: SequenceSums, name: str) -> Estimate:
        difference, interpolated = sums.of(name, unit - shrink), sums.of(name, shrink - fewer).value
        from_share = sums.of(name, slope).value / task_slope * share_error
        return Estimate(
            difference.value,
            math.hypot(difference.error, from_share, interpolated),
            difference.sequences,
        )

    return ShrinkComparison(
        lam, between, estimate(general, "loss"), estimate(general, "kl"), estimate(task, "right")
    )


def lambda_to_place(evaluation: Evaluation, keep: float) -> float | None:
    """Choose the λ of a shrink that keeps a share of the learning and little more, by interpolation between the measured shrinks.

    Returns
    -------
    float or None
        λ, rounded up; None if a measured shrink is well placed, none was measured, or none keeps the share.
    """
    nodes = [node for node in _by_lambda(evaluation.variants) if 0 <= node[0] <= 1]
    if len(nodes) < 2:
        return None
    if nodes[0][0] > 0:
        nodes.insert(0, (0.0, BASE_ROW))  # approximately: an adapter may have more than deltas
    kept = [evaluation.task.share("loss", row).value for _, row in nodes]
    values = np.zeros(len(evaluation.variants))
    values[[row for _, row in nodes]] = kept
    first = next((k for k, share in enumerate(kept) if share >= keep), 0)
    above = kept[first] - keep
    if first == 0 or above <= EXCESS:
        return None
    between = nodes[first - 1][0], nodes[first][0]
    lam = rounded_up(
        _crossing(_nearest(nodes, first - 1), between, values, keep + min(EXCESS, above) / 2)
    )
    return lam if lam < nodes[first][0] else None


def rounded_up(lam: float) -> float:
    """Round λ up to a multiple of 1 / `STEPS`, so that no less is kept."""
    return math.ceil(lam * STEPS - 1e-6) / STEPS


def _by_lambda(variants: Sequence[EvaluatedVariant]) -> list[Node]:
    """List the shrinks in order of λ, including the unchanged adapter; of equal λ, one."""
    shrinks = (
        (v.mitigation_lambda, row) for row, v in enumerate(variants) if v.method == Shrink.name
    )
    rows = {round(lam, DIGITS): row for lam, row in shrinks if lam is not None}
    return sorted({**rows, 1.0: ADAPTER_ROW}.items())


def _nearest(nodes: Sequence[Node], at: int) -> Sequence[Node]:
    """Choose the nodes nearest to the interval between node `at` and the next."""
    first = max(0, min(at - (NODES - 2) // 2, len(nodes) - NODES))
    return nodes[first : first + NODES]


def _crossing(
    nodes: Sequence[Node], between: tuple[float, float], losses: Floats, target: float
) -> float:
    """Find the λ between two neighbouring nodes at which the interpolated loss equals the target."""
    from scipy.optimize import brentq

    known = {lam: float(losses[row]) for lam, row in nodes}

    def above(lam: float) -> float:
        return (
            known[lam] if lam in known else float(_weights(nodes, lam, len(losses))[0] @ losses)
        ) - target

    return float(brentq(above, *between))


def _weights(nodes: Sequence[Node], lam: float, count: int) -> tuple[Floats, Floats]:
    """Return the weights of the variants (count,) that interpolate any of their sums at λ, and the weights' derivatives by λ."""
    from scipy.interpolate import KroghInterpolator

    polynomial = KroghInterpolator(
        [node for node, _ in nodes], np.eye(count)[[row for _, row in nodes]]
    )
    weights, slope = polynomial(lam), polynomial.derivative(lam)
    return weights, slope


Reason = Literal[
    "not learned",
    "not forgotten",
    "none better",
    "not worth it",
    "forgets least",
    "a shrink is better",
]

WORTH = 0.5
"""Nats of divergence on general text that a suggested variant must regain, at least, for each nat of loss that it gives up on the task's.
General text represents every other use of the model, and the share to keep already permits some loss on the task; so one nat on general
text counts as two on the task's. This guards against trades that nobody wants; the share decides the rest."""


@dataclass(frozen=True)
class Trade:
    """What a variant regains of the divergence and gives up on the task's text, relative to the unchanged adapter, in nats per token."""

    regained: Estimate
    given_up: Estimate

    @classmethod
    def of(cls, evaluation: Evaluation, variant: int) -> Trade:
        """Estimate the trade of the variant with this row number."""
        general, task = evaluation.general, evaluation.task
        return cls(
            general.mean("kl", ADAPTER_ROW, variant), task.mean("loss", variant, ADAPTER_ROW)
        )

    @property
    def worth_it(self) -> bool:
        """Test whether the gain exceeds `WORTH` times the loss beyond the error; the errors of the two texts are independent."""
        error = math.hypot(self.regained.error, WORTH * self.given_up.error)
        few = min(self.regained.sequences, self.given_up.sequences)
        return Estimate(self.regained.value - WORTH * self.given_up.value, error, few).is_positive


@dataclass(frozen=True)
class Suggestion:
    """The variant to use; `SuggestionRecord` explains the attributes and describes `variant` by name, method and lambda.

    Attributes
    ----------
    declined
        The variant that was not suggested only because it is not worth it.
    """

    variant: EvaluatedVariant | None
    reason: Reason
    keep: float
    shrink: ShrinkComparison | None = None
    swapped: bool = False
    declined: EvaluatedVariant | None = None


def ask_swapped(task: SequenceSums) -> str:
    """Ask whether the texts are swapped, because the adapter has a higher loss on the task's text than the base."""
    loss = task.mean("loss", ADAPTER_ROW, BASE_ROW)
    return f"the adapter's loss on the task's text is above the base's, by {loss.value:.4f} ± {loss.error:.4f}: are the two texts swapped?"


ProductDtype = Literal["float32", "bf16"]
"""Dtype to which base weights, and the inputs and results of their products, are rounded; see `has_fast_bfloat16`."""


def check_dtype(dtype: str) -> None:
    """Refuse a dtype in which this processor multiplies slowly."""
    if dtype == "bf16" and not has_fast_bfloat16():
        raise UsageError(
            "dtype: bf16 needs a processor that multiplies bfloat16 matrices (AVX512-BF16 or AMX); use float32 here"
        )


# fmt: off
Lambda = Annotated[float | None, "Share to keep: of an intruder, of the delta (shrink), or of its energy on general inputs (nullspace); "
    "null for base, adapter and regmean."]

class TextFacts(TypedDict):
    """A text."""
    name: Annotated[str, "Name of the file; never a path."]
    sequences: Annotated[Count, "Sequences taken from it."]
    tokens: Annotated[Count, "Their tokens that count, never the first of a sequence."]
    length: Annotated[Count, "Tokens of the longest sequence."]
    sha256: Annotated[Sha256, "Digest of the token ids and of the positions that count (SHA-256, hexadecimal)."]
    drawn: NotRequired[Annotated[Literal[True], "That base + adapter wrote it; `loss` is then its expectation over their distribution."]]
    samples: NotRequired[Annotated[list[str], "Of such a text: its first sequences."]]

class _Texts(TypedDict):
    general: Annotated[TextFacts, "What the base can do and should not forget."]
    task: Annotated[TextFacts, "What the adapter was trained for."]
    others: NotRequired[Annotated[list[TextFacts], "Other texts, if any; they affect no suggestion."]]

class _SequenceTokens(TypedDict):
    general: Annotated[list[float], "Of the general text."]
    task: Annotated[list[float], "Of the task's text."]

class _SumsRecord(TypedDict):
    loss: Annotated[list[float | None], "Of the negative log likelihood, in nats."]
    kl: Annotated[list[float | None], "Of the divergence from the base, in nats."]
    kl_from_adapter: NotRequired[Annotated[list[float | None], "Of the divergence from the adapter, in nats."]]
    agree: Annotated[list[float | None], "Counts of tokens whose most likely token is the base's."]
    right: Annotated[list[float | None], "Counts of tokens that the variant finds most likely."]

class TextFigures(TypedDict):
    """Figures of a variant on one text."""
    loss: Annotated[Mean, "Mean negative log likelihood over the tokens that count, in nats.", lambda sums, row: sums.mean("loss", row)]
    perplexity: Annotated[float | None, "exp(loss); null if it exceeds the range of a double.",
        lambda sums, row: math.exp(loss) if (loss := sums.mean("loss", row).value) < statistics.MOST_LOSS else None]
    kl: Annotated[Mean, "Mean divergence KL(base || variant) of the next-token distribution, in nats.",
        lambda sums, row: sums.mean("kl", row)]
    agreement: Annotated[Mean, "Share of counted tokens for which the most likely next token is the base's.",
        lambda sums, row: sums.mean("agree", row)]
    top1: Annotated[Mean | None, "Share of counted tokens that are the variant's most likely token.",
        lambda sums, row: sums.mean("right", row)]
    sequences: Annotated[Count, "Sequences that it ran on.", lambda sums, row: len(sums.tokens)]
    sums: Annotated[_SumsRecord, "Sums over the counted tokens of each sequence, from which all figures follow.",
        lambda sums, row: {name: [statistics.defined(x) for x in getattr(sums, name)[row]] for name in MEASURES}]

class OtherFigures(TextFigures):
    """Figures of a variant on another text."""
    name: Annotated[str, "Name of the text's file."]
    share: Annotated[Mean | None, "(variant - base) / (adapter - base) of the losses; null if undefined."]

class OtherText(TypedDict):
    """Effect of the unchanged adapter on another text."""
    name: Annotated[str, "Name of its file.", lambda _, name: name]
    effect: Annotated[statistics.Effect, "Whether the adapter's loss is above the base's or below it, by two standard errors."]
    change: Annotated[Difference, "The adapter's mean loss minus the base's, in nats per token."]
    reliable: Annotated[bool, "Whether the change is over four standard errors, so that shares of it are meaningful.",
        lambda sums, _: sums.change.divides]
    tokens: Annotated[list[float], "Counted tokens of each sequence.", lambda sums, _: sums.tokens.tolist()]

class Against(TypedDict):
    """Differences to another variant."""
    general_loss: Annotated[Difference, "Difference of the mean losses on the general text.",
        lambda evaluation, row, other: evaluation.general.mean("loss", row, other)]
    general_kl: Annotated[Difference, "Difference of the mean divergences on the general text.",
        lambda evaluation, row, other: evaluation.general.mean("kl", row, other)]
    task_loss: Annotated[Difference, "Difference of the mean losses on the task's text.",
        lambda evaluation, row, other: evaluation.task.mean("loss", row, other)]
    task_top1: Annotated[Difference | None, "Difference of the top-1 on the task's text.",
        lambda evaluation, row, other: evaluation.task.mean("right", row, other)]

VariantRecord = TypedDict("VariantRecord", {
    "name": Annotated[str, "`base`, `adapter`, or method and lambda, such as `paper 0.5`; for a fit, method and share."],
    "method": Annotated[MethodName | None, "The method; null for base and adapter."],
    "lambda": Annotated[Lambda, lambda variant, *_: variant.mitigation_lambda],
    "keep": NotRequired[Annotated[float, "With method regmean: share of the learning that the set was fitted to keep."]],
    "general": Annotated[TextFigures, "On the general text.", lambda _, evaluation, row: record(TextFigures, evaluation.general, row)],
    "task": Annotated[TextFigures, "On the task's text.", lambda _, evaluation, row: record(TextFigures, evaluation.task, row)],
    "others": NotRequired[Annotated[list[OtherFigures], "On the other texts, in the order of `texts.others`.",
        lambda _, evaluation, row: [
            {"name": name, **record(TextFigures, sums, row), **statistics.flat("share", sums.share("loss", row))}
            for name, sums in evaluation.others.items()] or None]],
    "kept": Annotated[Mean | None, "Share of the learning: (base - variant) / (base - adapter) of the task's losses; null if undefined.",
        lambda _, evaluation, row: evaluation.task.share("loss", row)],
    "behaviour_kept": NotRequired[Annotated[Mean | None, "1 - KL(adapter || variant) / KL(adapter || base) on the task's text; null if "
        "undefined, absent from files of earlier versions.", lambda _, evaluation, row: evaluation.task.share("kl_from_adapter", row)]],
    "top1_kept": Annotated[Mean | None, "Share of the adapter's gain in top-1 on the task's text; null if undefined.",
        lambda _, evaluation, row: evaluation.task.share("right", row)],
    "forgetting": Annotated[Mean | None, "Share of the rise of the general loss: (variant - base) / (adapter - base); null if undefined.",
        lambda _, evaluation, row: evaluation.general.share("loss", row)],
    "divergence": Annotated[Mean | None, "Mean divergence on the general text as a share of the adapter's; null if that is 0.",
        lambda _, evaluation, row: evaluation.general.share("kl", row)],
    "against_adapter": Annotated[Against, "Differences from the unchanged adapter.",
        lambda _, evaluation, row: record(Against, evaluation, row, ADAPTER_ROW)],
    "against_base": Annotated[Against, "Differences from the base; PEFT's method comparison calls `general_loss` forgetting.",
        lambda _, evaluation, row: record(Against, evaluation, row, BASE_ROW)],
})
VariantRecord.__doc__ = "A variant that was evaluated."

ShrinkRecord = TypedDict("ShrinkRecord", {
    "lambda": Annotated[float, "Lambda of that shrink.", lambda comparison: comparison.mitigation_lambda],
    "between": Annotated[list[float], "The neighbouring lambdas that were evaluated; 1 is the unchanged adapter."],
    "loss": Annotated[Difference, "Difference of the mean losses on the general text; below 0, the variant forgets less. This error and "
        "the next ones include the uncertainty of the share kept and of the interpolation."],
    "kl": Annotated[Difference, "Difference of the mean divergences on the general text."],
    "top1": Annotated[Difference | None, "Difference of the top-1 on the task's text."],
    "verdict": Annotated[Literal["better", "worse", "not told apart"], "By the divergence, and more than two standard errors."],
})
ShrinkRecord.__doc__ = "A shrink of the whole adapter."

class TradeRecord(TypedDict):
    """What a variant gives up and regains, compared with the unchanged adapter."""
    name: Annotated[str, "Its name.", lambda _, name: name]
    regained: Annotated[Difference, "Mean divergence of the adapter on the general text minus the variant's, in nats per token."]
    given_up: Annotated[Difference, "Mean loss of the variant on the task's text minus the adapter's, in nats per token."]
    worth: Annotated[float, "A variant is worth it if it regains more than this factor times what it gives up, by two standard errors.",
        lambda *_: WORTH]
    worth_it: Annotated[bool, "Whether it is worth it."]

class ReliableRecord(TypedDict):
    """Whether shares are meaningful: their denominators are over four standard errors (more with few sequences); tables show no others."""
    kept: Annotated[bool, "Shares of the learning.", lambda evaluation: evaluation.task.change.divides]
    forgetting: Annotated[bool, "Shares of the rise of the general loss.", lambda evaluation: evaluation.general.change.divides]
    top1_kept: Annotated[bool, "Shares of the gain in top-1 on the task's text; false if there is no gain.",
        lambda evaluation: (gain := evaluation.task.mean("right", ADAPTER_ROW, BASE_ROW)).divides and gain.value > 0]

SuggestionRecord = TypedDict("SuggestionRecord", {
    "name": Annotated[str | None, "Its name; null if nothing can be suggested.",
        lambda suggestion, evaluation: suggestion.variant and suggestion.variant.name],
    "method": Annotated[MethodName | None, "The method; null for base and adapter.",
        lambda suggestion, evaluation: suggestion.variant and suggestion.variant.method],
    "lambda": Annotated[Lambda, lambda suggestion, evaluation: suggestion.variant and suggestion.variant.mitigation_lambda],
    "reason": Annotated[Reason, "not learned: the adapter's task loss is not below the base's by two standard errors (more with few "
        "sequences, by Student's quantile), and nothing is suggested; not forgotten: its divergence is not above 0 by two, and the "
        "unchanged adapter is suggested; none better: no variant that keeps enough forgets less; not worth it: none of these regains "
        "enough for what it gives up; forgets least: the best of the others; a shrink is better: one that was not measured beats it."],
    "keep": Annotated[KeptShare, "Share of the learning to keep."],
    "swapped": Annotated[bool, "Whether the texts may be swapped: the adapter's task loss is above the base's by two standard errors."],
    "command": Annotated[list[str] | None, "Command and options that make it; add base, adapter, output and findings.",
        lambda suggestion, evaluation: suggestion.variant and evaluation.command(suggestion.variant)],
    "shrink": Annotated[ShrinkRecord | None, "The variant that forgets least, compared with the interpolated shrink that keeps the same "
        "share; null if the variant is a shrink or the adapter, or if no evaluated shrinks enclose the share.",
        lambda suggestion, evaluation: suggestion.shrink and record(ShrinkRecord, suggestion.shrink)],
    "trade": Annotated[TradeRecord | None, "What the suggested variant, or the one not worth it, gives up and regains.",
        lambda suggestion, evaluation: evaluation.trade(
            suggestion.declined or (suggestion.variant if suggestion.reason == "forgets least" else None))],
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


@dataclass(frozen=True, repr=False)
class Evaluation:
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

    variants: tuple[EvaluatedVariant, ...]
    general: SequenceSums
    task: SequenceSums
    facts: Mapping[str, Any]
    keep: float = EvaluateOptions.keep
    others: Mapping[str, SequenceSums] = field(default_factory=dict)

    @classmethod
    def of(cls, variants: Sequence[EvaluatedVariant], sums: Sums, facts: Facts, keep: float) -> Self:
        """Make an object of this class from the sums on each text, by name."""
        others = {name: s for name, s in sums.items() if name not in (GENERAL, TASK)}
        return cls(tuple(variants), sums[GENERAL], sums[TASK], facts, keep, others)

    @property
    def sums(self) -> Sums:
        """Return the sums on each text, by name."""
        return {GENERAL: self.general, TASK: self.task, **self.others}

    def best(self, keep: float | None = None) -> Suggestion:
        """Suggest the variant that forgets least among those that keep this share of the learning; see `Suggestion`.

        Raises
        ------
        UsageError
            If `keep` is not in (0, 1].
        """
        keep, variants, general, task = self.keep if keep is None else keep, self.variants, self.general, self.task
        if not SHARE.holds(keep):
            raise UsageError(f"keep: expected {SHARE.words}, found {keep!r}")
        adapter, learning = variants[ADAPTER_ROW], task.mean("loss", BASE_ROW, ADAPTER_ROW)
        if not learning.is_positive:
            return Suggestion(None, "not learned", keep, swapped=learning.is_negative)
        if not general.mean("kl", ADAPTER_ROW, BASE_ROW).is_positive:
            return Suggestion(adapter, "not forgotten", keep)

        def share_kept(row: int) -> float:
            """Return the share that a variant keeps; if it was fitted to keep it on other text, two standard errors more."""
            share, fitted = task.share("loss", row), variants[row].keep
            return share.value + (2 * share.error if fitted is not None and fitted >= keep else 0.0)

        def least(rows: Sequence[int]) -> int:
            return min(rows, key=lambda row: np.nansum(general.kl[row]))

        keeping = [row for row in range(ADAPTER_ROW, len(variants)) if share_kept(row) >= keep]
        forgets_less = [row for row in keeping if general.mean("kl", row, ADAPTER_ROW).is_negative]
        if not forgets_less:
            return Suggestion(adapter, "none better", keep)
        worth_it = [row for row in forgets_less if Trade.of(self, row).worth_it]
        if not worth_it:
            return Suggestion(adapter, "not worth it", keep, declined=variants[least(forgets_less)])
        best = least(worth_it)
        comparison = against_shrink(self, best)
        if comparison is not None and comparison.verdict == "worse":
            shrinks = [row for row in worth_it if variants[row].method == Shrink.name]
            if not shrinks or lambda_to_place(self, keep) is not None:
                return Suggestion(None, "a shrink is better", keep, shrink=comparison)
            best, comparison = least(shrinks), None
        return Suggestion(variants[best], "forgets least", keep, comparison)

    def reliable(self) -> ReliableRecord:
        """Return which shares have a large enough denominator; see `ReliableRecord`."""
        return cast(ReliableRecord, record(ReliableRecord, self))

    def front(self) -> list[str]:
        """Name the variants that no other equals or beats in both the task's loss, by which they are ordered, and the divergence."""
        loss, divergence = self.task.loss, self.general.kl
        points = sorted((loss[v].sum(), np.nansum(divergence[v]), v) for v in range(len(self.variants)))
        best = [v for i, (_, kl, v) in enumerate(points) if all(kl < other for _, other, _ in points[:i])]
        return [self.variants[v].name for v in best]

    def command(self, variant: EvaluatedVariant, merges: bool = False) -> list[str]:
        """Return the command that makes a variant, with its options; the caller adds inputs, output and files.

        The command is `mitigate` if the variant can be written as an adapter without loss; else `merge`.

        Parameters
        ----------
        variant
            One of the `variants`.
        merges
            Return `merge` for every variant.
        """
        facts, lam = self.facts, variant.mitigation_lambda
        exact = facts["projected"] or (variant.method in METHODS and METHODS[variant.method].keeps_rank)
        mitigates = variant.method is not None and exact and facts["factored"] and not merges
        words = ["mitigate" if mitigates else "merge"]
        words += [] if variant.keep is None and lam is None else ["--method", str(variant.method)]
        words += ["--lambda", repr(1 if lam is None else lam)] if variant.keep is None else []
        if takes_findings(variant.method):
            words += ["--select", "first"] if facts["scale"] == "first" else []
            default, used = DetectionOptions(), facts["detection"]
            for option, key in (("--top-k", "top_k"), ("--epsilon", "threshold_epsilon")):
                words += [option, f"{used[key]}"] if used[key] != getattr(default, key) else []
        if lam is not None and not 0 <= lam <= 1:
            words.append("--amplify")
        words += input_options(facts)
        return [*words, "--dequantize"] if facts["quantized"] and not mitigates else words

    def __getitem__(self, name: str) -> VariantRecord:
        """Return the figures of a variant by name, as in the JSON."""
        names = [v.name for v in self.variants]
        if name not in names:
            raise UnknownNameError(f"evaluation: has no variant {name!r}; it has {', '.join(names)}")
        return self._record(names.index(name))

    def _record(self, row: int) -> VariantRecord:
        return cast(VariantRecord, record(VariantRecord, self.variants[row], self, row))

    def table(self, keep: float | None = None) -> str:
        """Format the verdict, the table, its legend, the reasons and the commands as text of unlimited width."""
        suggestion = self.best(keep)
        words = *reasons(self, suggestion), *commands(self, suggestion)
        return "\n".join([verdict(self, suggestion), "", table(figures(self)), "", *words])

    def __repr__(self) -> str:
        return f"<Evaluation: {len(self.variants)} variants, {len(self.general.tokens)} general and {len(self.task.tokens)} task sequences>"

    def to_dict(self, keep: float | None = None) -> EvaluationRecord:
        """Make the JSON object (schema ``streamer.evaluation/1``); `from_json` rebuilds the evaluation from its sums per sequence."""
        best = self.best(keep)
        others = [record(OtherText, sums, name) for name, sums in self.others.items()]
        return cast(EvaluationRecord, {
            "schema": SCHEMA,
            "verdict": verdict(self, best),
            **{key: self.facts[key] for key in statistics.keys_of(EvaluationFacts) if key in self.facts},
            "tokens": {"general": self.general.tokens.tolist(), "task": self.task.tokens.tolist()},
            **({"others": others} if others else {}),
            "keep": self.keep,
            "variants": [self._record(row) for row in range(len(self.variants))],
            "reliable": self.reliable(),
            "front": self.front(),
            "suggestion": record(SuggestionRecord, best, self),
        })

    def shown_variants(self) -> list[dict[str, Any]]:
        """Make the JSON of all variants, with null for shares of the two texts that tables leave out."""
        shares = self.reliable().items()
        hidden = (f"{name}{end}" for name, reliable in shares if not reliable for end in ("", "_se"))
        no_shares = dict.fromkeys(hidden)
        return [{**self._record(row), **no_shares} for row in range(len(self.variants))]

    def to_json(self, keep: float | None = None) -> str:
        """Return the JSON object as text."""
        return json.dumps(self.to_dict(keep), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """Read an evaluation from the text that `to_json` or ``streamer evaluate`` wrote.

        Raises
        ------
        FormatError
            If the text is not an evaluation.
        """
        try:
            tree = strict_json(text.encode())
            if tree["schema"] != SCHEMA:
                raise ValueError(f"the schema {tree['schema']!r}")
            variants = tuple(map(_variant, tree["variants"]))
            keys = statistics.keys_of(EvaluationFacts)
            facts = {key: tree[key] for key in keys if key in tree or not keys[key][1]}
            texts = {text: (tree["tokens"][text], [v[text] for v in tree["variants"]]) for text in (GENERAL, TASK)}
            for i, other in enumerate(tree.get("others", ())):
                texts[other["name"]] = other["tokens"], [v["others"][i] for v in tree["variants"]]
            sums = {text: _sums(text, *figures) for text, figures in texts.items()}
            evaluation = cls.of(variants, sums, facts, tree.get("keep", tree["suggestion"]["keep"]))
            evaluation.to_json()  # fails for sums that no run has, such as negative squares
            return evaluation
        except (ArithmeticError, AttributeError, ValueError, LookupError, TypeError) as e:
            raise FormatError(f"expected an evaluation ({SCHEMA}), found: {quoted(str(e))}; evaluate again") from e

    def trade(self, variant: EvaluatedVariant | None) -> dict[str, Any] | None:
        """Make the `TradeRecord` of a variant, if there is one."""
        if variant is None:
            return None
        return record(TradeRecord, Trade.of(self, self.variants.index(variant)), variant.name)


def figures(evaluation: Evaluation) -> list[Column]:
    """Make the columns of an evaluation's table, names first; a star marks variants on the front."""
    general, task, best = evaluation.general, evaluation.task, set(evaluation.front())
    return [
        Column("variant", [v.name + " *" * (v.name in best) for v in evaluation.variants],
                "* no other variant has both a lower task loss and a lower divergence", 9, left=True),
        Column("general", _losses(general), "mean loss in nats on general text", 4),
        Column("vs adapter", _means(general, "loss", ADAPTER_ROW),
                "this loss minus the adapter's, ± the standard error, paired by sequence", 5),
        Column("loss left", _shares(general), "where the general loss lies between the base's (0%) and the adapter's (100%)", 2),
        Column("KL", _means(general, "kl"), "divergence from the base on general text, in nats", 6),
        Column("KL left", _shares(general, "kl", True), "this divergence as a share of the adapter's: the forgetting that is left", 8),
        Column("same top", _parts(general, "agree"),
                "tokens of general text for which the variant and the base have the same most likely token", 2),
        Column("task", _losses(task), "mean loss in nats on the task's text", 3),
        Column("kept", _shares(task), "where the task loss lies between the base's (0%) and the adapter's (100%)", 8),
        Column("behaviour kept", _shares(task, "kl_from_adapter", True),
                "1 - KL(adapter ‖ variant) / KL(adapter ‖ base) on the task's text, which needs no labels", 5),
        Column("top-1", _parts(task, "right"), "tokens of the task's text that are the variant's most likely token", 1),
        Column("top-1 kept", _shares(task, "right", evaluation.reliable()["top1_kept"]),
                "where top-1 lies between the base's (0%) and the adapter's (100%)", 5),
        *(column for name, sums in evaluation.others.items() for column in _other(name, sums)),
    ]


def _other(name: str, sums: SequenceSums) -> list[Column]:
    """Make the columns of another text."""
    left = sums.effect != "improves"
    return [
        Column(name, _losses(sums), "mean loss in nats on this text", 2),
        Column(f"{name} {'left' if left else 'kept'}", _shares(sums),
                "where the loss on this text lies between the base's (0%) and the adapter's (100%)", 4),
        Column(f"{name} KL", _means(sums, "kl"), "divergence from the base on this text, in nats", 1),
    ]


def _losses(sums: SequenceSums) -> list[str]:
    """Write the mean losses of variants."""
    return [f"{sums.mean('loss', v).value:.4f}" for v in range(len(sums.loss))]


def _means(sums: SequenceSums, name: str, *other: int) -> list[str]:
    """Write the means of variants, or their differences from another's."""
    return cells([sums.mean(name, v, *other) for v in range(len(sums.loss))])


def _parts(sums: SequenceSums, name: str) -> list[str]:
    """Write fractions of all tokens in percent, without their errors."""
    parts = (sums.mean(name, v).value for v in range(len(sums.loss)))
    return [f"{100 * part:.1f}%" if math.isfinite(part) else "-" for part in parts]


def _shares(sums: SequenceSums, name: str = "loss", shown: bool | None = None) -> list[str]:
    """Write the shares of variants; a dash if they are not shown: by default, if the denominator is too small."""
    shown = sums.change.divides if shown is None else shown
    return [percent(sums.share(name, v)) if shown else "-" for v in range(len(sums.loss))]


def cell(estimate: Estimate) -> str:
    """Write a figure with two digits of its error."""
    return cells([estimate])[0]


def cells(estimates: Sequence[Estimate]) -> list[str]:
    """Write figures of one kind with as many decimals as show two digits of the largest error."""
    error = max(e.error for e in estimates)
    digits = min(6, max(2, 1 - math.floor(math.log10(error)))) if 0 < error < math.inf else 4
    return [f"{e.value:.{digits}f} ± {e.error:.{digits}f}" if math.isfinite(e.value) else "-" for e in estimates]


def percent(share: Estimate) -> str:
    """Write a share with its error in percent; a dash if undefined."""
    return f"{100 * share.value + 0.0:.1f}% ± {100 * share.error:.1f}" if math.isfinite(share.value) else "-"


@dataclass(frozen=True)
class Names:
    """Words of the commands to show, quoted for a shell.

    Attributes
    ----------
    inputs, general, task, output
        Base and adapter, the two texts, and the file of the evaluation.
    findings, coefficients, mapped
        Files of findings, coefficients and map; empty if unknown.
    reading
        Options that set how much of the texts is read, each with a space before it.
    others
        Options that name the other texts, in the same form.
    mitigated
        Whether the adapter already is the output of `mitigate` or `repair`, so that a merge comes next.
    """

    inputs: str = "BASE ADAPTER"
    general: str = "GENERAL"
    task: str = "TASK"
    output: str = "EVALUATION"
    findings: str = ""
    coefficients: str = ""
    mapped: str = ""
    reading: str = ""
    others: str = ""
    mitigated: bool = field(default=False, kw_only=True)


VERDICTS: Mapping[Reason, str] = {
    "not learned": "no suggestion: there is no evidence that the adapter learned the task's text",
    "not forgotten": "use the adapter as it is: there is no evidence that it diverges from the base",
    "none better": "use the adapter as it is: no variant that keeps {} of what it learned diverges measurably less from the base",
    "not worth it": "use the adapter as it is: no variant that keeps {} of what it learned is worth what it gives up",
    "a shrink is better": "no suggestion yet: a shrink that was not measured is better than the measured variants",
}
"""What to say if no method is suggested, with the share to keep."""


def gain_of(text: Mapping[str, Any]) -> str:
    """Name what is kept of an adapter on a text of its task."""
    return "its behaviour on text that it wrote" if text.get("drawn") else "what the adapter learned"


def verdict(evaluation: Evaluation, suggestion: Suggestion) -> str:
    """Say in one line which variant to use."""
    variant, reason = suggestion.variant, suggestion.reason
    if suggestion.swapped:
        return "no suggestion: the adapter's loss on the task's text is above the base's; are the two texts swapped?"
    if variant is None or reason in VERDICTS:
        return VERDICTS[reason].format(f"{100 * suggestion.keep:g}%")
    v = evaluation.variants.index(variant)
    if not evaluation.task.change.divides:
        return f"use {variant.name}: it {_trade(Trade.of(evaluation, v))}"
    kept, left = percent(evaluation.task.share("loss", v)), percent(evaluation.general.share("kl", v))
    gain = gain_of(evaluation.facts["texts"]["task"])
    return f"use {variant.name}: it keeps {kept} of {gain} and leaves {left} of its divergence from the base"


def _trade(trade: Trade) -> str:
    return traded(cell(trade.regained), cell(trade.given_up))


def traded(regained: str, given_up: str) -> str:
    """Say what a variant regains and gives up."""
    return f"regains {regained} nats of KL per token of general text and gives up {given_up} of loss on the task's"


VERDICT_ON_SHRINK = {
    "better": "it is better than",
    "worse": "the variant with the least divergence is worse than",
    "not told apart": "it cannot be told apart from",
}


def reasons(evaluation: Evaluation, suggestion: Suggestion) -> list[str]:
    """Explain the suggestion, its cost, its comparison with the equal shrink, and what the table leaves out."""
    general, task, variant = evaluation.general, evaluation.task, suggestion.variant
    lines, declined, shrink = [], suggestion.declined, suggestion.shrink
    if suggestion.reason == "not learned" and task.change.divides:  # a change that is too small to divide is explained below
        lines.append(f"the adapter's loss on the task's text minus the base's is {cell(task.change)}")
    if declined is not None:
        trade = Trade.of(evaluation, evaluation.variants.index(declined))
        rule = f"a suggested variant regains over {WORTH:g} of what it gives up, by two standard errors"
        lines.append(f"{declined.name}, which diverges least, {_trade(trade)}; {rule}")
    if suggestion.reason == "forgets least" and variant is not None:
        v = evaluation.variants.index(variant)
        within = ", a fit within two standard errors" if any(v.keep is not None for v in evaluation.variants) else ""
        lines.append(
            f"of the variants that keep {100 * suggestion.keep:g}% of what was learned{within}, {variant.name} has the least divergence "
            f"from the base, {percent(general.share('kl', v))} of the adapter's; it {_trade(Trade.of(evaluation, v))}"
        )
        if variant.method == Shrink.name:
            lines.append("it is a shrink of the whole adapter")
        elif shrink is None:
            lines.append(
                "it was not compared with a shrink of the whole adapter: that needs --method shrink at two values of lambda"
            )
    if shrink is not None:
        low, high = shrink.between
        equal = f"a shrink that keeps the same share (lambda {shrink.mitigation_lambda:.3f}, interpolated between {low:g} and {high:g})"
        most = f"shrink {low:g}, which keeps the most"
        other = most if low == high else equal
        lines.append(f"{VERDICT_ON_SHRINK[shrink.verdict]} {other}: general loss {cell(shrink.loss)}, KL {cell(shrink.kl)}")
    if evaluation.facts["dtype"] != "float32":
        lines.append(f"base weights, and the inputs and results of their products, were rounded to {evaluation.facts['dtype']}")
    if evaluation.facts.get("intruders") == 0:
        epsilon = evaluation.facts["detection"]["threshold_epsilon"]
        lines.append(f"no intruder was found (epsilon {epsilon:g}): paper and project change nothing, and were not run")
    changes = {"kept": task.change, "loss left": general.change}
    changes |= {f"{name} left or kept": sums.change for name, sums in evaluation.others.items()}
    small = {name: change for name, change in changes.items() if not change.divides}
    if math.isfinite((gain := task.mean("right", ADAPTER_ROW, BASE_ROW)).value) and not evaluation.reliable()["top1_kept"]:
        small["top-1 kept"] = gain
    return lines + [
        f"{name} is not shown: the adapter's own change is only {cell(change)}, and a share needs over "
        f"{2 * statistics.critical_value(change.sequences):.1f} standard errors; more text may help"
        for name, change in small.items()
    ]


def commands(evaluation: Evaluation, suggestion: Suggestion, names: Names | None = None) -> list[str]:
    """Return the command that makes the suggested variant, and at the end what to do next."""
    names, variant, reason = names or Names(), suggestion.variant, suggestion.reason
    facts = evaluation.facts
    options = names.reading + (f" --dtype {facts['dtype']}" if facts["dtype"] != "float32" else "")
    options += "".join(f" {word}" for word in input_options(facts))
    projected = " --projected" if facts["projected"] else ""

    def evaluate(general: str, task: str, output: str) -> str:
        texts = "".join(f" --{name} {text}" for name, text in (("general", general), ("task", task)) if text)
        return f"streamer evaluate {names.inputs}{texts} -o {output}{options}{projected}{names.others}"

    if suggestion.swapped:
        return [f"next: {evaluate(names.task, names.general, 'OTHER')}"]
    if reason == "not learned":
        return ["next: give --task text that the adapter was trained for, or more of it (--sequences)"]
    if suggestion.shrink is not None and variant is None:
        lam = rounded_up(suggestion.shrink.mitigation_lambda)
        return [f"next: {evaluate(names.general, names.task, names.output)} --method shrink --lambda {lam:g}"]
    assert variant is not None
    command, *words = evaluation.command(variant, merges=names.mitigated)
    make = " ".join(["streamer", command, names.inputs, "-o", "OUTPUT", *words])
    if names.findings and takes_findings(variant.method):
        make += f" --findings {names.findings}"
    elif variant.method == RegMean.name:
        make += f" --coefficients {names.coefficients or 'COEFFICIENTS'}"
    elif variant.method == NullSpace.name:
        make += f" --map {names.mapped or 'MAP'}"
    if reason == "not forgotten" or suggestion.declined is not None:
        return ["use the adapter as it is, or merge it into the base", f"next: {make}"]
    if names.mitigated or any(v.method == RegMean.name for v in evaluation.variants):
        return [f"next: {make}"]
    keep = f" --keep {suggestion.keep:g}" if suggestion.keep < 1 else ""
    return [
        *([f"made by: {make}"] if reason == "forgets least" else []),
        "a repair usually forgets much less; it needs no text, but is better with text of the task (--task), other than this",
        f"next: streamer repair {names.inputs}{keep} -o OUTPUT{options}",
    ]


SCHEMA: Final = "streamer.evaluation/1"

LARGEST_SUM = 1e100
"""Sums above this are damaged; their squares might overflow."""


def load_evaluation(path: str | Path) -> Evaluation:
    """Read an evaluation from the file that `evaluate_variants` or ``streamer evaluate`` wrote.

    Raises
    ------
    MissingInputError, FormatError
        If the file does not exist, or is not an evaluation.
    """
    fd, _ = open_regular(Path(path), "an evaluation")
    with os.fdopen(fd, "rb") as file:
        raw = file.read()
    try:
        return Evaluation.from_json(raw.decode())
    except UnicodeDecodeError as e:
        raise FormatError(f"{path}: expected an evaluation ({SCHEMA}), found a file that is not text") from e
    except FormatError as e:
        raise FormatError(f"{path}: {e}") from e


def _variant(tree: Mapping[str, Any]) -> EvaluatedVariant:
    check(tree, {"name": str, "method": str | None, "lambda": float | None, "keep": NotRequired[float | None]})
    return EvaluatedVariant(tree["name"], tree["method"], tree["lambda"], tree.get("keep"))


def _sums(text: str, tokens: list[float], figures: list[Mapping[str, Any]]) -> SequenceSums:
    """Collect the sums on a text from the variants' figures."""
    # Earlier versions did not measure the divergence from the adapter.
    unknown = {"kl_from_adapter": [None] * len(tokens)}
    arrays = {name: np.array([{**unknown, **f["sums"]}[name] for f in figures], np.float64) for name in MEASURES}
    shapes = {array.shape for array in arrays.values()}
    if np.isnan(arrays["loss"]).any():
        raise ValueError(f"{text}: a variant lacks sequences")
    if shapes != {(len(figures), len(tokens))} or len(figures) < 2 or len(tokens) < 2:
        raise ValueError(f"sums of {text} are {listed(map(str, sorted(shapes)))}")
    counted = all(type(count) in (int, float) and 0 < count <= LARGEST_SUM and count % 1 == 0 for count in tokens)
    if not counted or any((np.abs(array) > LARGEST_SUM).any() for array in arrays.values()):
        raise ValueError(f"sums or token counts of {text} are impossible")
    return SequenceSums(np.array(tokens, np.float64), **arrays)
