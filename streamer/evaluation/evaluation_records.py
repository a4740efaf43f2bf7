"""Types of the JSON of an evaluation (schema ``streamer.evaluation/1``)."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, TypedDict

from streamer.detection.findings_records import OptionsRecord
from streamer.detection.selection import Selection
from streamer.evaluation.divergences import BinsRecord
from streamer.evaluation.options import ProductDtype
from streamer.evaluation.statistics import Effect
from streamer.evaluation.suggestion import Reason
from streamer.json_types import Amount, Count, KeptShare, Keywords, PairedError, Sha256, StandardError, State, Version
from streamer.methods import MethodName
from streamer.methods.fit_set import CoefficientsRecord
from streamer.methods.input_map import MapRecord
from streamer.plan.sources import AdapterSource, BaseSource


# fmt: off
class TextFacts(TypedDict):
    """A text."""
    name: Annotated[str, "Name of the file; never a path."]
    sequences: Annotated[Count, "Sequences that were taken."]
    tokens: Annotated[Count, "Tokens of them whose losses count."]
    length: Annotated[Count, "Tokens of the longest sequence."]
    sha256: Annotated[Sha256, "Digest of the token ids and of which of them count (SHA-256, hexadecimal)."]

class _Texts(TypedDict):
    general: Annotated[TextFacts, "What the base can do and should not forget."]
    task: Annotated[TextFacts, "What the adapter was trained for."]
    others: NotRequired[Annotated[list[TextFacts], "Others, if any: nothing is judged by them."]]

class _SequenceTokens(TypedDict):
    general: Annotated[list[float], "Of the general text."]
    task: Annotated[list[float], "Of the task's text."]

class _SumsRecord(TypedDict):
    loss: Annotated[list[float], "Of the negative log likelihood, in nats."]
    kl: Annotated[list[float], "Of the divergence from the base, in nats."]
    agree: Annotated[list[float], "Counts of tokens where the likeliest is the base's."]
    right: NotRequired[Annotated[list[float], "Counts of tokens where the likeliest is the text's own; absent of earlier versions."]]
    p_change: NotRequired[Annotated[list[float], "Of p(variant) - p(base) of the text's own token; absent of earlier versions."]]
    p_square: NotRequired[Annotated[list[float], "Of the square of that; absent of earlier versions."]]
    kl_max: NotRequired[Annotated[list[float], "The largest divergence of a token, no sum; absent of earlier versions."]]

class TextFigures(TypedDict):
    """Figures of a variant on one text."""
    loss: Annotated[float, "Mean over counted tokens of the negative log likelihood, in nats."]
    loss_se: StandardError
    perplexity: Annotated[float | None, "exp(loss); null where it is beyond a double."]
    perplexity_ratio: Annotated[float | None, "Perplexity as a multiple of the base's; null where its error is beyond a double."]
    perplexity_ratio_se: PairedError | None
    kl: Annotated[float, "Mean divergence KL(base || variant) of the next token's distribution, in nats."]
    kl_se: StandardError
    kl_median: Annotated[float | None, "Median of the tokens' divergences, within 1 %; 0 if below 1e-9 nats; null of earlier versions."]
    kl_p90: Annotated[float | None, "What 90 % of them do not exceed, likewise."]
    kl_p99: Annotated[float | None, "What 99 % do not, likewise."]
    kl_p999: Annotated[float | None, "What 99.9 % do not, likewise."]
    kl_max: Annotated[float | None, "The largest of them, exactly; null of earlier versions."]
    agreement: Annotated[float, "Share of counted tokens where the likeliest next token is the base's."]
    agreement_se: StandardError
    top1: Annotated[float | None, "Share of counted tokens where the likeliest next token is the text's own; null of earlier versions."]
    top1_se: StandardError | None
    p_change: Annotated[float | None, "Mean of p(variant) - p(base), the probabilities of the text's own token; null of earlier versions."]
    p_change_se: StandardError | None
    p_rms: Annotated[float | None, "Root of the mean square of that change; null of earlier versions."]
    p_rms_se: StandardError | None
    sums: Annotated[_SumsRecord, "Sums over the counted tokens of each sequence, in the text's order: they give all other figures but "
        "quantiles."]
    kl_bins: NotRequired[Annotated[BinsRecord, "Counts of tokens by their divergence, for its quantiles; absent of earlier versions."]]

class OtherFigures(TextFigures):
    """Figures of a variant on another text."""
    name: Annotated[str, "Name of the text's file."]
    share: Annotated[float | None, "(variant - base) / (adapter - base) of the losses: left of the forgetting if the adapter forgets this "
        "text, kept of the gain if it improves it; null if undefined."]
    share_se: StandardError | None

class OtherText(TypedDict):
    """What the adapter as it is does to another text."""
    name: Annotated[str, "Name of its file."]
    effect: Annotated[Effect, "Whether the adapter's loss is above the base's or below it, by two standard errors."]
    change: Annotated[float, "The adapter's mean loss less the base's, in nats a token."]
    change_se: PairedError
    reliable: Annotated[bool, "Whether that is over four standard errors, so that shares of it say anything; tables show no others."]
    tokens: Annotated[list[float], "Counted tokens of each sequence."]

class Against(TypedDict):
    """Differences to another variant."""
    general_loss: Annotated[float, "Difference of the mean losses on the general text."]
    general_loss_se: PairedError
    general_kl: Annotated[float, "Difference of the mean divergences on the general text."]
    general_kl_se: PairedError
    task_loss: Annotated[float, "Difference of the mean losses on the task's text."]
    task_loss_se: PairedError
    task_top1: Annotated[float | None, "Difference of the top-1 on the task's text; null of earlier versions."]
    task_top1_se: PairedError | None

VariantRecord = TypedDict("VariantRecord", {
    "name": Annotated[str, "`base`, `adapter`, or method and lambda: `paper 0.5`; of a fit the share to keep: `fitted 0.9`."],
    "method": Annotated[MethodName | None, "The method; null for base and adapter."],
    "lambda": Annotated[float | None, "Share that is kept: of an intruder, of the delta (shrink), or of its energy on general inputs "
        "(nullspace); null for base, adapter, fitted and regmean."],
    "keep": NotRequired[Annotated[float, "Of the methods fitted and regmean: share of the learning that the set was fitted to keep."]],
    "general": Annotated[TextFigures, "On the general text."],
    "task": Annotated[TextFigures, "On the task's text."],
    "others": NotRequired[Annotated[list[OtherFigures], "On the other texts, in the order of `texts.others`."]],
    "kept": Annotated[float | None, "Share of the learning: (base - variant) / (base - adapter) of the task's losses; null if undefined."],
    "kept_se": StandardError | None,
    "top1_kept": Annotated[float | None, "Share of the adapter's gain in top-1 on the task's text; null if undefined."],
    "top1_kept_se": StandardError | None,
    "forgetting": Annotated[float | None, "Share of the forgetting: (variant - base) / (adapter - base) of the general losses; null if "
        "undefined."],
    "forgetting_se": StandardError | None,
    "divergence": Annotated[float | None, "Mean divergence on the general text as a share of the adapter's; null if that is 0."],
    "divergence_se": StandardError | None,
    "against_adapter": Annotated[Against, "Differences to the adapter as it is."],
    "against_base": Annotated[Against, "Differences to the base; `general_loss` is what PEFT's method comparison calls forgetting."],
})
VariantRecord.__doc__ = "A variant that was evaluated."

ShrinkRecord = TypedDict("ShrinkRecord", {
    "lambda": Annotated[float, "Lambda of that shrink."],
    "between": Annotated[list[float], "The neighbouring lambdas that were evaluated; 1 is the adapter."],
    "loss": Annotated[float, "Difference of the mean losses on the general text; below 0 the variant forgets less."],
    "loss_se": Annotated[PairedError, "The uncertainty of the share kept and of the interpolation is in it."],
    "kl": Annotated[float, "Difference of the mean divergences on the general text."],
    "kl_se": Annotated[Amount, "Its standard error, in the same way."],
    "top1": Annotated[float | None, "Difference of the top-1 on the task's text; null of earlier versions."],
    "top1_se": Annotated[Amount | None, "Its standard error, in the same way."],
    "verdict": Annotated[Literal["better", "worse", "not told apart"], "By more than two standard errors: better by both, "
        "worse by the loss, or by the divergence unless the loss is better."],
})
ShrinkRecord.__doc__ = "A shrink of the whole adapter."

class TradeRecord(TypedDict):
    """What a variant gives up and regains against the adapter as it is."""
    name: Annotated[str, "Its name."]
    regained: Annotated[float, "Mean loss on the general text by which the adapter is above it, in nats a token."]
    regained_se: PairedError
    given_up: Annotated[float, "Mean loss on the task's text by which it is above the adapter, in nats a token."]
    given_up_se: PairedError
    worth: Annotated[float, "It is worth it if it regains over this times what it gives up, by two standard errors."]
    worth_it: Annotated[bool, "Whether it is."]

class ReliableRecord(TypedDict):
    """Whether shares say anything: what they divide by is over four standard errors (more of few sequences); tables show no others."""
    kept: Annotated[bool, "Those of the learning."]
    forgetting: Annotated[bool, "Those of the forgetting."]
    top1_kept: Annotated[bool, "Those of the gain in top-1 on the task's text; false if there is none."]

SuggestionRecord = TypedDict("SuggestionRecord", {
    "name": Annotated[str | None, "Its name; null where nothing can be suggested."],
    "method": Annotated[MethodName | None, "The method; null for base and adapter."],
    "lambda": Annotated[float | None, "Share that is kept: of an intruder, of the delta (shrink), or of its energy on general inputs "
        "(nullspace); null for base, adapter, fitted and regmean."],
    "reason": Annotated[Reason, "not learned: the adapter's loss on the task's text is not below the base's by two standard errors "
        "(Student's quantile: more where sequences are few), and nothing is suggested; not forgotten: its loss on the general text is not "
        "above the base's by two, so it is suggested as it is; none better: nor does any variant that keeps enough forget less; not worth "
        "it: of those that do none regains enough for what it gives up; forgets least: of those that do; a shrink is better: a shrink "
        "that was not measured is better than that one, and nothing is suggested before it is."],
    "keep": Annotated[KeptShare, "Share of what was learned that was to be kept."],
    "swapped": Annotated[bool, "Whether the adapter's loss on the task's text is above the base's by two standard errors (swapped "
        "texts?)."],
    "command": Annotated[list[str] | None, "Command that makes it, and its options; add base, adapter, output and findings."],
    "least_loss": Annotated[str | None, "Name of the variant that keeps enough with the least loss on the general text, if another."],
    "shrink": Annotated[ShrinkRecord | None, "The variant that forgets least against the shrink of the whole adapter that keeps the same "
        "share, interpolated; null if it is a shrink or the adapter, or if the shrinks that were evaluated do not enclose that share."],
    "trade": Annotated[TradeRecord | None, "What the suggested variant, or the one that is not worth it, gives up and regains; else null."],
})
SuggestionRecord.__doc__ = "The variant to use."

class EvaluationHead(TypedDict):
    """What comes first."""
    schema: Literal["streamer.evaluation/1"]
    verdict: Annotated[str, "What to use, in a line for people."]

class EvaluationFacts(TypedDict):
    """What an evaluation was made of."""
    version: Version
    transformers: Annotated[str, "Version of transformers."]
    base: Annotated[BaseSource, "The base model: its name, and what tells it from another, wherever it lies."]
    adapter: Annotated[AdapterSource, "The adapter, or the fine-tuned model in its place, in the same way."]
    factored: Annotated[bool, "Whether all deltas are the product of LoRA's factors, so that mitigate can write them back."]
    quantized: Annotated[bool, "Whether a merge must write a quantized base plain (--dequantize)."]
    detection: Annotated[OptionsRecord | None, "How the intruders were found; null where none were needed (method shrink alone)."]
    scale: Annotated[Selection, "Which intruders are scaled: all, or the highest-ranked one of each matrix."]
    findings: NotRequired[Annotated[Sha256, "Digest of the decisions of the findings, if some were given (SHA-256, hexadecimal)."]]
    intruders: NotRequired[Annotated[Count, "Intruders that were found, if variants were to scale them; if 0, these are not run."]]
    projected: Annotated[bool, "Whether deltas were projected onto the adapter's rank, as mitigate writes them, or complete, as by merge."]
    dtype: Annotated[ProductDtype, "Dtype to which base weights and activations are rounded for their products; all else is float32."]
    texts: Annotated[_Texts, "The texts."]
    coefficients: NotRequired[Annotated[list[CoefficientsRecord], "The sets of coefficients that were evaluated, if any."]]
    map: NotRequired[Annotated[MapRecord, "The map of the base's inputs, if one was given."]]
    plan: Annotated[Sha256, "Digest of the keys from `transformers` on: what compared variants have in common (SHA-256, hexadecimal)."]

class EvaluationRecord(EvaluationHead, EvaluationFacts):
    """What `streamer evaluate` writes and prints: losses of base, adapter and variants, on a general text and on the task's."""
    tokens: Annotated[_SequenceTokens, "Counted tokens of each sequence."]
    others: NotRequired[Annotated[list[OtherText], "The other texts, if any."]]
    variants: Annotated[list[VariantRecord], Keywords(minItems=2), "The base, the adapter as it is, each method from its largest lambda "
        "on, then each set of coefficients. Among the shrinks is the one that was placed to keep the share asked for."]
    reliable: Annotated[ReliableRecord, "Whether what shares divide by is large enough."]
    front: Annotated[list[str], "Names of variants that no other one equals or excels in both the task's loss and the divergence."]
    suggestion: Annotated[SuggestionRecord, "The variant to use."]
    output: NotRequired[Annotated[str, "Path of the output, as it was given. Printed only."]]
    state: NotRequired[Annotated[State, "Printed only."]]
