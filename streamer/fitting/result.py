"""Report a fit's results: figures of each set on the held-out sequences, beside the shrink that keeps the same share.

Provide right factors of all matrices for a weight, from a spool, from other factors, or from the adapter itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired, TypedDict, cast

import torch
from torch import Tensor

from streamer.errors import MismatchError
from streamer.evaluation.losses import ModelFacts, ProductDtype, ReliableRecord, TextFacts, TradeRecord, reliable
from streamer.evaluation.suggestion import Trade, against_shrink, ask_swapped
from streamer.fitting.prepare import SHRINKS
from streamer.json_types import Amount, Count, Difference, KeptShare, Keywords, Mean, Sha256, State
from streamer.linalg.operators import LowRank
from streamer.measuring.result_file import ADAPTER_ROW, BASE_ROW, Configs, EvaluatedVariant
from streamer.measuring.statistics import SequenceSums, flat, telling
from streamer.methods import RegMean, Shrink, share_name
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.streaming.spool import Spool, Spooled
from streamer.streaming.values import ADAPTER, BASE, Variant
from streamer.units import listed


def factors_of(plan: Plan, target: Target) -> LowRank:
    """Read the factors of a delta and check that they are finite."""
    delta = plan.finite_delta(target)
    assert isinstance(delta, LowRank)
    return delta


@dataclass(frozen=True)
class Point:
    """Right factors for a weight μ; 0 is the unchanged adapter."""

    weight: float
    factors: Mapping[str, Tensor]

    @property
    def name(self) -> str:
        """Return the name of its variant."""
        return f"{RegMean.name} mu {self.weight!r}"

    def towards(self, other: Point, t: float) -> Point:
        """Interpolate Δ' linearly, and the weight by its logarithm unless one is 0."""
        weight = t * other.weight if self.weight == 0 else self.weight ** (1 - t) * other.weight**t
        a, b = self.factors, other.factors
        return Point(weight, Factors(a, lambda tensor: torch.lerp(a[tensor], b[tensor], t)))


@dataclass(frozen=True)
class Factors(Mapping[str, Tensor]):
    """Right factors by `Target.tensor`, each read or computed on demand."""

    names: Collection[str]
    read: Callable[[str], Tensor]

    def __getitem__(self, tensor: str) -> Tensor:
        return self.read(tensor)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the factors themselves: another process lacks the source from which they are read."""
        return dict, (dict(self),)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def spooled(spool: Spool, places: Mapping[str, Sequence[Spooled]], number: int) -> Factors:
    """Read the factors with an index from a spool that has several for each matrix."""
    return Factors(places, lambda tensor: spool.read(places[tensor][number])[0])


def replaced(made: Factors, rest: Mapping[str, Tensor]) -> Factors:
    """Use new factors as they are made, and `rest` for all other matrices."""
    return Factors(rest, lambda tensor: (made if tensor in made.names else rest)[tensor])


def unchanged(plan: Plan) -> Factors:
    """Read the factors of the unchanged adapter."""
    targets = {target.tensor: target for target in plan.targets}
    return Factors(targets, lambda tensor: factors_of(plan, targets[tensor]).R.to(torch.float32))


NEAR_SHRINK = 0.9
"""A fit that leaves at least this share of a shrink's forgetting has gained little: texts of one kind give a shrink."""

MISSED = 0.01
"""A set misses its share if it keeps less by more than this."""


# fmt: off
class _TextPart(TypedDict):
    sequences: Annotated[Count, "Its sequences."]
    tokens: Annotated[Count, "Their tokens whose losses count."]

class FittedText(TextFacts):
    """A text, and its two parts."""
    sample_sha256: Annotated[Sha256, "SHA-256 (hexadecimal) of the file's size and a sample of its bytes, whichever part was used."]
    fitted: Annotated[_TextPart, "The part on which factors are fitted."]
    held: Annotated[_TextPart, "The held-out part, on which mu is chosen and figures are measured."]

class _FittedTexts(TypedDict):
    general: Annotated[FittedText, "What the base can do and should not forget."]
    task: Annotated[FittedText, "What the adapter was trained for."]

FittedShrink = TypedDict("FittedShrink", {
    "lambda": Annotated[float, "Lambda of that shrink."],
    "kept": NotRequired[Annotated[float, "Share of the learning that it keeps: the set's, or the most that a shrink keeps."]],
    "forgetting": Annotated[float, "Share of the rise of the general loss that it leaves."],
    "divergence": Annotated[float, "Share of the forgetting that it leaves: divergence on the general text, relative to the adapter's."],
    "top1_kept": NotRequired[Annotated[float | None, "Share of the adapter's gain in top-1 that it keeps; absent in earlier versions."]],
    "loss": Annotated[Difference, "Mean loss of the fitted model on the general text minus the shrink's; below 0, the fitted model forgets "
        "less. Both errors include the uncertainty of the share kept and of the interpolation."],
    "kl": Annotated[Difference, "Mean divergence of the fitted model on the general text minus the shrink's."],
    "verdict": Annotated[Literal["better", "worse", "not told apart"], "By the divergence, and more than two standard errors."],
})
FittedShrink.__doc__ = "A shrink of the whole adapter."

class _Shares(TypedDict):
    kept: Annotated[Mean | None, "Share of the learning: (base - fitted) / (base - adapter) of the task's losses; null if undefined."]
    top1_kept: NotRequired[Annotated[Mean | None, "Share of the adapter's gain in top-1 on the task's text; absent in earlier versions."]]
    forgetting: Annotated[Mean | None, "Share of the rise of the general loss: (fitted - base) / (adapter - base); null if undefined."]
    divergence: Annotated[Mean | None, "Mean divergence on the general text as a share of the adapter's; null if that is 0."]

class ScalingRecord(_Shares):
    """A method that scales intruders, measured beside what was fitted."""
    name: Annotated[str, "Method and lambda."]

class SetRecord(_Shares):
    """The factors for a share."""
    keep: Annotated[KeptShare, "Share of the learning to keep."]
    missed: NotRequired[Annotated[bool, "Whether it keeps less than requested, by more than 0.01; absent in earlier versions."]]
    mu: Annotated[Amount, "Weight of the general text against the task's."]
    trade: NotRequired[Annotated[TradeRecord, "What it gives up and regains; absent in earlier versions."]]
    shrink: Annotated[FittedShrink | None, "The shrink that keeps the same share, interpolated; null if none encloses it."]

class FitFacts(ModelFacts):
    """Inputs and options of a fit."""
    configs: Configs
    weights: Annotated[list[float], "Weights mu of the candidates."]
    holdout: Annotated[float, "Share of each text's sequences that were held out."]
    seed: Annotated[Count, "Decides which sequences these are."]
    dtype: Annotated[ProductDtype, "Dtype to which weights and activations are rounded for products; the rest is float32."]
    texts: Annotated[_FittedTexts, "The two texts."]
    unchanged: Annotated[list[str], "Tensors that the adapter changes by other means than deltas; they stay unchanged."]
    findings: NotRequired[Annotated[Sha256, "Digest of the decisions in the findings, if findings were given (SHA-256, hexadecimal)."]]
    intruders: NotRequired[Annotated[Count, "Intruders in the findings; if 0, scaling them changes nothing and is not measured."]]
    plan: Annotated[Sha256, "Digest of everything that decides the factors (SHA-256, hexadecimal)."]
    ridge: Annotated[float, "Share of the mean diagonal that is added to the task's second moments."]
    general_ridge: NotRequired[Annotated[float, "The same of general text's; absent in earlier versions."]]
    unseen: Annotated[list[str], "Matrices that no token reached, or whose system was not solved; they keep their delta."]

class AdapterFacts(TypedDict):
    """What the unchanged adapter has learned and forgotten, on the held-out sequences."""
    forgotten: Annotated[bool, "Whether the adapter's divergence on the general text is significantly above 0."]
    learning: Annotated[Difference, "Loss of the base on the task's text minus the adapter's, in nats per token."]
    top1_gain: NotRequired[Annotated[Difference, "Share of the task's tokens that are its most likely token, minus the base's."]]
    forgetting: Annotated[Difference, "Loss of the adapter on the general text minus the base's, in nats per token."]
    divergence: Annotated[Mean, "Mean divergence KL(base ‖ adapter) on the general text, in nats per token."]
    reliable: NotRequired[Annotated[ReliableRecord, "Whether the denominators of shares are large enough; absent in earlier versions."]]

class FitRecord(FitFacts, AdapterFacts):
    """What `streamer fit --json` prints: what factors were fitted to, and their figures on other text."""
    schema: Literal["streamer.fit/1"]
    scaling: NotRequired[Annotated[ScalingRecord, "The method paper at its default lambda, if findings with intruders were given."]]
    sets: Annotated[list[SetRecord], Keywords(minItems=1), "The sets, one for each share, measured on the held-out sequences."]
    output: Annotated[str, "Path of the output, as given."]
    state: State
# fmt: on


def adapter_facts(general: SequenceSums, task: SequenceSums, name: str) -> AdapterFacts:
    """Report as JSON what the unchanged adapter has learned and forgotten, on the held-out sequences.

    Parameters
    ----------
    name
        Name of the task's text, for messages.

    Raises
    ------
    MismatchError
        If there is no evidence that the adapter learned anything, so that there is no learning to keep.
    """
    learning = task.loss_difference(BASE_ROW, ADAPTER_ROW)
    divergence = general.mean(general.kl[ADAPTER_ROW])
    if learning.is_negative:
        raise MismatchError(f"{name}: {ask_swapped(task)}")
    if not learning.is_positive:
        raise MismatchError(
            f"{name}: there is no evidence that the adapter learned this text, so there is nothing to keep: its loss less the base's is "
            f"{-learning.value:.4f} ± {learning.error:.4f} on {learning.sequences} held-out sequences, where only "
            f"{telling(learning.sequences):.1f} standard errors are evidence; give more text, raise --sequences, or give text of its task"
        )
    return cast(AdapterFacts, {
        "forgotten": divergence.is_positive,
        **flat("learning", learning),
        **flat("top1_gain", task.top1_gain),
        **flat("forgetting", general.change),
        **flat("divergence", divergence),
        "reliable": reliable(general, task),
    })  # fmt: skip


def set_facts(general: SequenceSums, task: SequenceSums, found: Sequence[tuple[float, Point]]) -> list[SetRecord]:
    """Return the figures of all sets as JSON.

    Parameters
    ----------
    general, task
        Sums on the held-out sequences for the base, the unchanged adapter, each of `SHRINKS`, and each set.
    found
        Each share with its factors.
    """
    variants = [EvaluatedVariant(BASE, None, None), EvaluatedVariant(ADAPTER, None, None)]
    variants += [EvaluatedVariant(Shrink(lam).label, Shrink.name, lam) for lam in SHRINKS]
    variants += [EvaluatedVariant(f"{RegMean.name} {share_name(keep)}", RegMean.name, None) for keep, _ in found]
    first = 2 + len(SHRINKS)
    return [_set(keep, point, variants, general, task, first + i) for i, (keep, point) in enumerate(found)]


def _set(keep: float, point: Point, variants: Sequence[EvaluatedVariant], general: SequenceSums, task: SequenceSums,
         v: int) -> SetRecord:  # fmt: skip
    """Return the figures of one set, given as a variant's index."""
    compared, shrink = against_shrink(variants, general, task, v), None
    if compared is not None:
        loss, kl = general.change, general.mean(general.kl[ADAPTER_ROW])
        gain, top1, (low, high) = task.top1_gain.value, task.top1_fraction(v).value, compared.between
        most = next((row for row, one in enumerate(variants) if one.mitigation_lambda == low), ADAPTER_ROW)
        shrink = cast(FittedShrink, {
            "lambda": compared.mitigation_lambda,
            "kept": task.fraction(v if low < high else most).value,
            "forgetting": general.fraction(v).value - compared.loss.value / loss.value,
            "divergence": general.kl_fraction(v).value - compared.kl.value / kl.value,
            "top1_kept": top1 - compared.top1.value / gain if gain else None,
            **flat("loss", compared.loss),
            **flat("kl", compared.kl),
            "verdict": compared.verdict,
        })  # fmt: skip
    return cast(SetRecord, {
        "keep": keep,
        "missed": task.fraction(v).value < keep - MISSED,
        "mu": point.weight,
        "trade": Trade.of(general, task, v).record(variants[v].name),
        **_shares(general, task, v),
        "shrink": shrink,
    })  # fmt: skip


def _shares(general: SequenceSums, task: SequenceSums, v: int) -> dict[str, float | None]:
    return {
        **flat("kept", task.fraction(v)),
        **flat("top1_kept", task.top1_fraction(v)),
        **flat("forgetting", general.fraction(v)),
        **flat("divergence", general.kl_fraction(v)),
    }


def scaling_facts(
    variants: Sequence[Variant], sums: Callable[[str], tuple[SequenceSums, SequenceSums]]
) -> dict[str, ScalingRecord]:
    """Return the figures of the variant that scales intruders, if there is one.

    Parameters
    ----------
    sums
        Returns sums on both texts for the base, the unchanged adapter, and a variant by name.
    """
    records = [{"name": one.name, **_shares(*sums(one.name), ADAPTER_ROW + 1)} for one in variants]
    return {"scaling": cast(ScalingRecord, records[0])} if records else {}


def doubts(facts: Mapping[str, Any]) -> list[str]:
    """Warn if there is no evidence that the adapter forgets."""
    if facts["forgotten"]:
        return []
    return [
        f"there is no evidence that the adapter forgets, so it can be used as it is (more text may show more): its divergence from the "
        f"base on general text is {facts['divergence']:.4f} ± {facts['divergence_se']:.4f} on the held-out sequences"
    ]


def misses(facts: Mapping[str, Any]) -> list[str]:
    """Warn of sets that keep less than requested, or diverge nearly as much as the shrink that keeps as much."""
    if not facts["reliable"]["kept"]:
        return []
    missed = [
        f"{100 * one['keep']:g}% was to be kept, and {100 * one['kept']:.1f}% is, on the held-out sequences; ask for a larger share, or "
        "give more text"
        for one in facts["sets"]
        if one["missed"]
    ]
    near = [f"{100 * one['keep']:g}%" for one in facts["sets"] if facts["forgotten"] and _is_near_shrink(one)]
    if not near:
        return missed
    return [*missed, f"{listed(near)}: the result is close to the shrink that keeps the same share, and diverges nearly as much from the "
            "base; the texts may be too similar: give general text of another kind than the task's"]  # fmt: skip


def _is_near_shrink(one: Mapping[str, Any]) -> bool:
    """Test whether a set diverges nearly as much from the base as the shrink that keeps the same share."""
    if one["shrink"] is None:
        return False
    return bool(one["divergence"] >= NEAR_SHRINK * one["shrink"]["divergence"])
