"""Types of the JSON of an evaluation (schema ``streamer.evaluation/1``)."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, TypedDict

from streamer.detection.findings_records import OptionsRecord
from streamer.detection.selection import Selection
from streamer.evaluation.options import ProductDtype
from streamer.evaluation.suggestion import Reason
from streamer.json_types import Amount, Count, KeptShare, Keywords, PairedError, Sha256, StandardError, State, Version
from streamer.measuring.divergences import BinsRecord
from streamer.measuring.identity import Configs
from streamer.measuring.statistics import Effect
from streamer.methods import MethodName
from streamer.methods.fits import CoefficientsRecord
from streamer.methods.maps import MapRecord
from streamer.plan.sources import AdapterSource, BaseSource


# fmt: off
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
    right: NotRequired[Annotated[list[float | None], "Counts of tokens whose most likely token is the text's own; absent in earlier "
        "versions."]]
    p_change: NotRequired[Annotated[list[float | None], "Of p(variant) - p(base) of the text's own token; absent in earlier versions."]]
    p_square: NotRequired[Annotated[list[float | None], "Of the square of this change; absent in earlier versions."]]
    kl_max: NotRequired[Annotated[list[float | None], "The largest divergence of a token (not a sum); absent in earlier versions."]]
    acc: NotRequired[Annotated[list[float | None], "1 for each question whose most likely choice is right, else 0."]]
    acc_norm: NotRequired[Annotated[list[float | None], "1 for each question whose most likely choice per character is right, else 0."]]

class Accuracy(TypedDict):
    """Share of questions that a variant answers right."""
    value: Annotated[float, "The share."]
    value_se: StandardError
    against_adapter: Annotated[float, "Difference from the adapter."]
    against_adapter_se: PairedError
    against_base: Annotated[float, "Difference from the base."]
    against_base_se: PairedError
    share: Annotated[float | None, "(variant - base) / (adapter - base): kept of the gain, or left of the fall; null if adapter and base "
        "differ by four standard errors or less."]
    share_se: StandardError | None

class TextFigures(TypedDict):
    """Figures of a variant on one text."""
    loss: Annotated[float, "Mean negative log likelihood over the tokens that count, in nats."]
    loss_se: StandardError
    perplexity: Annotated[float | None, "exp(loss); null if it exceeds the range of a double."]
    perplexity_ratio: Annotated[float | None, "Perplexity as a multiple of the base's; null if its error exceeds the range of a double."]
    perplexity_ratio_se: PairedError | None
    kl: Annotated[float, "Mean divergence KL(base || variant) of the next-token distribution, in nats."]
    kl_se: StandardError
    kl_median: Annotated[float | None, "Median of the tokens' divergences, within 1 %; 0 if below 1e-9 nats; null in earlier versions "
        "and for questions."]
    kl_p90: Annotated[float | None, "90 % of the divergences are at most this, within 1 %."]
    kl_p99: Annotated[float | None, "99 % of the divergences are at most this, within 1 %."]
    kl_p999: Annotated[float | None, "99.9 % of the divergences are at most this, within 1 %."]
    kl_max: Annotated[float | None, "The largest divergence of a token, exactly; null in earlier versions."]
    agreement: Annotated[float, "Share of counted tokens for which the most likely next token is the base's."]
    agreement_se: StandardError
    top1: Annotated[float | None, "Share of counted tokens for which the most likely next token is the text's own; null in earlier "
        "versions."]
    top1_se: StandardError | None
    p_change: Annotated[float | None, "Mean of p(variant) - p(base), the probabilities of the text's own token; null in earlier versions."]
    p_change_se: StandardError | None
    p_rms: Annotated[float | None, "Root mean square of this change; null in earlier versions."]
    p_rms_se: StandardError | None
    sequences: Annotated[Count, "Sequences that it ran on."]
    sums: Annotated[_SumsRecord, "Sums over the counted tokens of each sequence, in the text's order, null where it did not run; all "
        "other figures except quantiles follow from them."]
    kl_bins: NotRequired[Annotated[BinsRecord, "Counts of tokens by their divergence, for its quantiles; absent in earlier versions and "
        "for questions."]]
    acc: NotRequired[Annotated[Accuracy, "Of questions: by the most likely choice."]]
    acc_norm: NotRequired[Annotated[Accuracy, "Of questions: by the most likely choice per character."]]

class OtherFigures(TextFigures):
    """Figures of a variant on another text."""
    name: Annotated[str, "Name of the text's file."]
    share: Annotated[float | None, "(variant - base) / (adapter - base) of the losses: the share of the forgetting that is left if the "
        "adapter forgets this text, the share of the gain that is kept if it improves on it; null if undefined."]
    share_se: StandardError | None

class OtherText(TypedDict):
    """Effect of the unchanged adapter on another text."""
    name: Annotated[str, "Name of its file."]
    effect: Annotated[Effect, "Whether the adapter's loss is above the base's or below it, by two standard errors."]
    change: Annotated[float, "The adapter's mean loss minus the base's, in nats per token."]
    change_se: PairedError
    reliable: Annotated[bool, "Whether the change is over four standard errors, so that shares of it are meaningful; tables show no "
        "others."]
    tokens: Annotated[list[float], "Counted tokens of each sequence."]

class Against(TypedDict):
    """Differences to another variant."""
    general_loss: Annotated[float, "Difference of the mean losses on the general text."]
    general_loss_se: PairedError
    general_kl: Annotated[float, "Difference of the mean divergences on the general text."]
    general_kl_se: PairedError
    task_loss: Annotated[float, "Difference of the mean losses on the task's text."]
    task_loss_se: PairedError
    task_top1: Annotated[float | None, "Difference of the top-1 on the task's text; null in earlier versions."]
    task_top1_se: PairedError | None

VariantRecord = TypedDict("VariantRecord", {
    "name": Annotated[str, "`base`, `adapter`, or method and lambda, such as `paper 0.5`; for a fit, the share to keep, such as `regmean "
        "0.9`."],
    "method": Annotated[MethodName | None, "The method; null for base and adapter."],
    "lambda": Annotated[float | None, "Share to keep: of an intruder, of the delta (shrink), or of its energy on general inputs "
        "(nullspace); null for base, adapter and regmean."],
    "keep": NotRequired[Annotated[float, "With method regmean: share of the learning that the set was fitted to keep."]],
    "general": Annotated[TextFigures, "On the general text."],
    "task": Annotated[TextFigures, "On the task's text."],
    "others": NotRequired[Annotated[list[OtherFigures], "On the other texts, in the order of `texts.others`."]],
    "kept": Annotated[float | None, "Share of the learning: (base - variant) / (base - adapter) of the task's losses; null if undefined."],
    "kept_se": StandardError | None,
    "top1_kept": Annotated[float | None, "Share of the adapter's gain in top-1 on the task's text; null if undefined."],
    "top1_kept_se": StandardError | None,
    "forgetting": Annotated[float | None, "Share of the rise of the general loss: (variant - base) / (adapter - base); null if "
        "undefined."],
    "forgetting_se": StandardError | None,
    "divergence": Annotated[float | None, "Share of the forgetting: mean divergence on the general text as a share of the adapter's; "
        "null if that is 0."],
    "divergence_se": StandardError | None,
    "against_adapter": Annotated[Against, "Differences from the unchanged adapter."],
    "against_base": Annotated[Against, "Differences from the base; PEFT's method comparison calls `general_loss` forgetting."],
})
VariantRecord.__doc__ = "A variant that was evaluated."

ShrinkRecord = TypedDict("ShrinkRecord", {
    "lambda": Annotated[float, "Lambda of that shrink."],
    "between": Annotated[list[float], "The neighbouring lambdas that were evaluated; 1 is the unchanged adapter."],
    "loss": Annotated[float, "Difference of the mean losses on the general text; below 0, the variant forgets less."],
    "loss_se": Annotated[PairedError, "It includes the uncertainty of the share kept and of the interpolation."],
    "kl": Annotated[float, "Difference of the mean divergences on the general text."],
    "kl_se": Annotated[Amount, "Its standard error, computed in the same way."],
    "top1": Annotated[float | None, "Difference of the top-1 on the task's text; null in earlier versions."],
    "top1_se": Annotated[Amount | None, "Its standard error, computed in the same way."],
    "verdict": Annotated[Literal["better", "worse", "not told apart"], "By the divergence, and more than two standard errors."],
})
ShrinkRecord.__doc__ = "A shrink of the whole adapter."

class TradeRecord(TypedDict):
    """What a variant gives up and regains, compared with the unchanged adapter."""
    name: Annotated[str, "Its name."]
    regained: Annotated[float, "Mean divergence of the adapter on the general text minus the variant's, in nats per token."]
    regained_se: PairedError
    given_up: Annotated[float, "Mean loss of the variant on the task's text minus the adapter's, in nats per token."]
    given_up_se: PairedError
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
    "lambda": Annotated[float | None, "Share to keep: of an intruder, of the delta (shrink), or of its energy on general inputs "
        "(nullspace); null for base, adapter and regmean."],
    "reason": Annotated[Reason, "not learned: the adapter's loss on the task's text is not below the base's by two standard errors (more "
        "with few sequences, by Student's quantile), and nothing is suggested; not forgotten: its divergence from the base on the general "
        "text is not above 0 by two, and the unchanged adapter is suggested; none better: no variant that keeps enough forgets less; not "
        "worth it: some forget less, but none regains enough for what it "
        "gives up; forgets least: the best of the others; a shrink is better: a "
        "shrink that was not measured beats that variant, and nothing is suggested until it is measured."],
    "keep": Annotated[KeptShare, "Share of the learning to keep."],
    "swapped": Annotated[bool, "Whether the adapter's loss on the task's text is above the base's by two standard errors (swapped "
        "texts?)."],
    "command": Annotated[list[str] | None, "Command and options that make it; add base, adapter, output and findings."],
    "shrink": Annotated[ShrinkRecord | None, "The variant that forgets least, compared with the shrink of the whole adapter that keeps the "
        "same share, interpolated; null if the variant is a shrink or the adapter, or if the evaluated shrinks do not enclose the "
        "share."],
    "trade": Annotated[TradeRecord | None, "What the suggested variant, or the variant that is not worth it, gives up and regains; "
        "otherwise null."],
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
    projected: Annotated[bool, "Whether deltas were projected onto the adapter's rank, as mitigate writes them, or complete, as merge adds "
        "them."]
    dtype: Annotated[ProductDtype, "Dtype to which base weights and activations are rounded for their products; everything else is "
        "float32."]
    texts: Annotated[_Texts, "The texts."]
    coefficients: NotRequired[Annotated[list[CoefficientsRecord], "The sets of coefficients that were evaluated, if any."]]
    map: NotRequired[Annotated[MapRecord, "The map of the base's inputs, if one was given."]]
    plan: Annotated[Sha256, "Digest of the keys from `transformers` on, which all variants of a comparison share (SHA-256, hexadecimal)."]

class EvaluationRecord(EvaluationHead, EvaluationFacts):
    """What `streamer evaluate` writes and prints: losses of base, adapter and variants, on a general text and on the task's."""
    tokens: Annotated[_SequenceTokens, "Counted tokens of each sequence."]
    others: NotRequired[Annotated[list[OtherText], "The other texts, if any."]]
    keep: NotRequired[Annotated[KeptShare, "Share of the learning that the suggested variant keeps; absent in earlier versions."]]
    variants: Annotated[list[VariantRecord], Keywords(minItems=2), "The base, the unchanged adapter, each method from its largest lambda "
        "on, then each set of coefficients. The shrinks include the one that keeps the share asked for."]
    reliable: Annotated[ReliableRecord, "Whether the denominators of shares are large enough."]
    front: Annotated[list[str], "Names of variants that no other variant equals or beats in both the task's loss and the divergence."]
    suggestion: Annotated[SuggestionRecord, "The variant to use."]
    output: NotRequired[Annotated[str, "Path of the output, as given. Printed only."]]
    state: NotRequired[Annotated[State, "Printed only."]]
