"""Hold an evaluation's options, its JSON types (schema ``streamer.evaluation/1``), and the losses of its variants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NotRequired, Self, TypedDict, get_args

import torch

from streamer.detection.options import DetectionOptions, OptionsRecord
from streamer.errors import UsageError
from streamer.evaluation.suggestion import Reason, Suggestion, check_keep, front, suggest
from streamer.json_types import Count, Difference, KeptShare, Keywords, Mean, Selection, Sha256, State, Version
from streamer.linalg.torch_state import has_fast_bfloat16
from streamer.measuring.result_file import Configs, EvaluatedVariant, input_options
from streamer.measuring.sequences import GENERAL, TASK
from streamer.measuring.statistics import BinsRecord, Effect, SequenceSums
from streamer.methods import METHODS, MethodName, Shrink, takes_findings
from streamer.methods.files import Coefficients, CoefficientsRecord, InputMap, MapRecord
from streamer.options import EvaluateOptions
from streamer.plan.plan import Plan
from streamer.plan.side_files import AdapterSource, BaseSource
from streamer.streaming.values import Variant, VariantSet, make_variants

ProductDtype = Literal["float32", "bf16"]
"""Dtype to which base weights and activations are rounded before they are multiplied; the product is float32."""


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation; see `options.EvaluateOptions`, and for `dtype` also `has_fast_bfloat16`."""

    methods: tuple[MethodName, ...] = (Shrink.name,)
    lambdas: tuple[float, ...] = tuple(EvaluateOptions.lambdas)
    select: Selection = EvaluateOptions.select
    sequences: int = EvaluateOptions.sequences
    length: int = EvaluateOptions.length
    keep: float = EvaluateOptions.keep
    projected: bool = EvaluateOptions.projected
    dtype: ProductDtype = EvaluateOptions.dtype
    coefficients: Coefficients | None = None
    amplify: bool = False
    map: InputMap | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        _ = self.variants
        for name in ("sequences", "length"):
            value = getattr(self, name)
            if type(value) is not int or value < 2:
                raise UsageError(f"{name}: expected a whole number from 2, found {value!r}")
        check_dtype(self.dtype)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """List the variants: ``base``, ``adapter``, each method at each λ, then each set of coefficients."""
        return make_variants(self.methods, self.lambdas, self.select, self.coefficients, self.amplify, self.map)

    def job(self, plan: Plan, device: torch.device) -> VariantSet:
        """Describe how to compute all variants; deltas that need findings are available only once findings are set."""
        return VariantSet(plan, self.variants, None, self.projected, self.dtype == "bf16", device)

    def fitted_record(self) -> list[CoefficientsRecord]:
        """Describe the sets of coefficients that are evaluated."""
        return [] if self.coefficients is None else [one.record() for one in self.coefficients.sets]


def check_dtype(dtype: str) -> None:
    """Refuse an unknown dtype, or a dtype in which this processor multiplies slowly."""
    if dtype not in get_args(ProductDtype):
        raise UsageError(f"dtype: expected one of {', '.join(get_args(ProductDtype))}, found {dtype!r}")
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
    sequences: Annotated[Count, "Sequences, or questions, taken from it."]
    choices: NotRequired[Annotated[Count, "Choices of all questions, if it has questions."]]
    tokens: Annotated[Count, "Their tokens whose losses count."]
    length: Annotated[Count, "Tokens of the longest sequence."]
    sha256: Annotated[Sha256, "Digest of the token ids and of the positions that count (SHA-256, hexadecimal)."]

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
    agree: Annotated[list[float | None], "Counts of tokens whose most likely token is the base's."]
    right: NotRequired[Annotated[list[float | None], "Counts of tokens that the variant finds most likely; absent in earlier versions."]]
    p_change: NotRequired[Annotated[list[float | None], "Of p(variant) - p(base) of the text's own token."]]
    p_square: NotRequired[Annotated[list[float | None], "Of the square of this change."]]
    kl_max: NotRequired[Annotated[list[float | None], "The largest divergence of a token (not a sum)."]]
    acc: NotRequired[Annotated[list[float | None], "1 for each question whose most likely choice is right, else 0."]]
    acc_norm: NotRequired[Annotated[list[float | None], "1 for each question whose most likely choice per character is right, else 0."]]

class Accuracy(TypedDict):
    """Share of questions that a variant answers right."""
    value: Annotated[Mean, "The share."]
    against_adapter: Annotated[Difference, "Difference from the adapter."]
    against_base: Annotated[Difference, "Difference from the base."]
    share: Annotated[Mean | None, "(variant - base) / (adapter - base); null if these two differ by four standard errors or less."]

class TextFigures(TypedDict):
    """Figures of a variant on one text."""
    loss: Annotated[Mean, "Mean negative log likelihood over the tokens that count, in nats."]
    perplexity: Annotated[float | None, "exp(loss); null if it exceeds the range of a double."]
    perplexity_ratio: Annotated[Difference | None, "Perplexity as a multiple of the base's; null if its error exceeds a double's range."]
    kl: Annotated[Mean, "Mean divergence KL(base || variant) of the next-token distribution, in nats."]
    kl_median: Annotated[float | None, "Median of the tokens' divergences, within 1 %; 0 below 1e-9 nats; null for questions."]
    kl_p90: Annotated[float | None, "90 % of the divergences are at most this, within 1 %."]
    kl_p99: Annotated[float | None, "99 % of the divergences are at most this, within 1 %."]
    kl_p999: Annotated[float | None, "99.9 % of the divergences are at most this, within 1 %."]
    kl_max: Annotated[float | None, "The largest divergence of a token, exactly."]
    agreement: Annotated[Mean, "Share of counted tokens for which the most likely next token is the base's."]
    top1: Annotated[Mean | None, "Share of counted tokens that are the variant's most likely token; null in earlier versions."]
    p_change: Annotated[Mean | None, "Mean of p(variant) - p(base), the probabilities of the text's own token."]
    p_rms: Annotated[Mean | None, "Root mean square of this change."]
    sequences: Annotated[Count, "Sequences that it ran on."]
    sums: Annotated[_SumsRecord, "Sums over the counted tokens of each sequence, from which all figures but quantiles follow."]
    kl_bins: NotRequired[Annotated[BinsRecord, "Counts of tokens by divergence; absent for questions."]]
    acc: NotRequired[Annotated[Accuracy, "Of questions: by the most likely choice."]]
    acc_norm: NotRequired[Annotated[Accuracy, "Of questions: by the most likely choice per character."]]

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
    "verdict": Annotated[Literal["better", "worse", "not told apart"], "By the divergence, and more than two standard errors."],
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

class ModelFacts(TypedDict):
    """Inputs of a run on texts."""
    version: Version
    transformers: Annotated[str, "Version of transformers."]
    base: Annotated[BaseSource, "The base model: its name, and what identifies it, wherever it is stored."]
    adapter: Annotated[AdapterSource, "The adapter, or the fine-tuned model in its place, described in the same way."]
    factored: Annotated[bool, "Whether all deltas are products of LoRA factors, so that mitigate can write them."]
    quantized: Annotated[bool, "Whether a merge must write a quantized base as a plain one (--dequantize)."]

class EvaluationFacts(ModelFacts):
    """Inputs and options of an evaluation."""
    configs: NotRequired[Configs]
    detection: Annotated[OptionsRecord | None, "How the intruders were found; null if none were needed (only method shrink)."]
    scale: Annotated[Selection, "Which intruders are scaled: all, or the highest-ranked one of each matrix."]
    findings: NotRequired[Annotated[Sha256, "Digest of the decisions in the findings, if findings were given (SHA-256, hexadecimal)."]]
    intruders: NotRequired[Annotated[Count, "Intruders that were found, if variants should scale them; if 0, these variants are not run."]]
    projected: Annotated[bool, "Whether deltas were projected onto the adapter's rank, as mitigate does, or complete, as in a merge."]
    dtype: Annotated[ProductDtype, "Dtype to which weights and activations are rounded for products; the rest is float32."]
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


KEEP = 0.9
"""Default share of the learning that a suggested variant keeps."""


@dataclass(frozen=True, repr=False)
class VariantLosses:
    """Hold the losses of an adapted model's variants; `Evaluation` lists its attributes."""

    variants: tuple[EvaluatedVariant, ...]
    general: SequenceSums
    task: SequenceSums
    facts: Mapping[str, Any]
    keep: float = KEEP
    others: Mapping[str, SequenceSums] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        variants: Sequence[EvaluatedVariant],
        sums: Mapping[str, SequenceSums],
        facts: Mapping[str, Any],
        keep: float,
    ) -> Self:
        """Make an object of this class from the sums on each text, by name."""
        others = {name: own for name, own in sums.items() if name not in (GENERAL, TASK)}
        return cls(tuple(variants), sums[GENERAL], sums[TASK], facts, keep, others)

    @property
    def sums(self) -> dict[str, SequenceSums]:
        """Return the sums on each text, by name."""
        return {GENERAL: self.general, TASK: self.task, **self.others}

    @property
    def answered(self) -> dict[str, SequenceSums]:
        """Return the sums on each text of questions, by name."""
        return {name: own for name, own in self.sums.items() if own.acc is not None}

    def best(self, keep: float | None = None) -> Suggestion:
        """Suggest the variant that forgets least among those that keep this share of the learning; see `Suggestion`.

        Raises
        ------
        UsageError
            If `keep` is not in (0, 1].
        """
        return suggest(self.variants, self.general, self.task, self.keep if keep is None else keep)

    def reliable(self) -> ReliableRecord:
        """Return which shares have a large enough denominator; see `ReliableRecord`."""
        return reliable(self.general, self.task)

    def front(self) -> list[str]:
        """Name the variants that no other variant equals or beats in both the task's loss and the divergence from the base."""
        return [self.variants[v].name for v in front(self.variants, self.general, self.task)]

    def command(self, variant: EvaluatedVariant) -> list[str]:
        """Return the command that makes a variant, with its options; the caller adds inputs, output and files.

        The command is `mitigate` if the variant can be written as an adapter without loss, else `merge`.
        """
        facts, lam = self.facts, variant.mitigation_lambda
        exact = facts["projected"] or (variant.method in METHODS and METHODS[variant.method].keeps_rank)
        mitigates = variant.method is not None and exact and facts["factored"]
        words = ["mitigate" if mitigates else "merge"]
        if variant.keep is not None:
            words += ["--method", str(variant.method), "--keep", f"{variant.keep!r}"]
        elif lam is None:
            words += ["--lambda", "1"]
        else:
            words += ["--method", str(variant.method), "--lambda", f"{lam!r}"]
        if takes_findings(variant.method):
            words += ["--select", "first"] if facts["scale"] == "first" else []
            default, used = DetectionOptions(), facts["detection"]
            words += ["--top-k", f"{used['top_k']}"] if used["top_k"] != default.top_k else []
            if used["threshold_epsilon"] != default.threshold_epsilon:
                words += ["--epsilon", f"{used['threshold_epsilon']}"]
        if lam is not None and not 0 <= lam <= 1:
            words.append("--amplify")
        words += input_options(facts)
        return [*words, "--dequantize"] if facts["quantized"] and not mitigates else words


def reliable(general: SequenceSums, task: SequenceSums) -> ReliableRecord:
    """Return which shares have a denominator that is large relative to its error."""
    gain = task.top1_gain
    return {
        "kept": task.change.divides,
        "forgetting": general.change.divides,
        "top1_kept": gain.divides and gain.value > 0,
    }
