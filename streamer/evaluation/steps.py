"""Decide what an evaluation measures: a generator that asks for variants, is given their sums, and returns the evaluation.

It holds no model and reads no file; given the same answers it asks the same questions, so a journal of answers resumes it. It asks for:

1. the variants that the user asked for and that are not measured yet, all together
2. up to `MOST_PLACED` times, a shrink of the whole adapter: its λ is where the losses so far say that it keeps the share (`next_shrink`)
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

from streamer.evaluation.evaluation import Evaluation
from streamer.evaluation.shrinks import next_shrink
from streamer.evaluation.statistics import SequenceSums
from streamer.evaluation.variants import EvaluatedVariant
from streamer.methods.shrink import Shrink
from streamer.streaming.variants import BASE, Variant

MOST_PLACED, EXPECTED_PLACED = 3, 2
"""How many shrinks are measured at most to place one, and how many forecasts and progress count; one or two are the rule."""


Sums = Mapping[str, SequenceSums]
"""Answers a request: sums on each text, of the base and of the variants that were asked for."""

Steps = Generator[tuple[Variant, ...], Sums, Evaluation]


def evaluation_steps(
    wanted: Sequence[Variant], known: Evaluation | None, facts: Mapping[str, Any], keep: float
) -> Steps:
    """Evaluate variants; yields those to measure, the base first, and is sent their sums.

    Parameters
    ----------
    wanted
        The variants that were asked for: ``base``, ``adapter`` and others.
    known
        What was measured before.
    facts
        Of the evaluation that is returned.
    keep
        Share of what was learned: a shrink is placed to keep it.
    """
    new = missing(wanted, known)
    evaluation = known
    if new:
        evaluation = joined(known, new, (yield (wanted[0], *new)), facts, keep)
    assert evaluation is not None
    for step in range(1, MOST_PLACED + 1):
        lam = None if was_placed(known, keep) else shrink_to_place(evaluation, keep, last=step == MOST_PLACED)
        if lam is None:
            break
        shrink = Variant.of(Shrink(lam))
        evaluation = joined(evaluation, [shrink], (yield (wanted[0], shrink)), facts, keep)
    return evaluation


def was_placed(known: Evaluation | None, keep: float) -> bool:
    """Test whether an earlier run has placed the shrink for this share; another run would measure it no better."""
    return known is not None and known.keep == keep and any(v.method == Shrink.name for v in known.variants)


def missing(wanted: Sequence[Variant], known: Evaluation | None) -> list[Variant]:
    """List the variants to measure, without the base, which every pass has."""
    measured = set() if known is None else set(known.variants)
    new = [variant for variant in wanted[1:] if EvaluatedVariant.of(variant) not in measured]
    return new if known is None else without_scaling(new, known.facts)


def without_scaling(variants: Sequence[Variant], facts: Mapping[str, Any]) -> list[Variant]:
    """Leave out what scales intruders, if it is known that there are none: that is the adapter as it is."""
    none = facts.get("intruders") == 0
    return [variant for variant in variants if not (none and variant.scales_intruders)]


def shrink_to_place(evaluation: Evaluation, keep: float, last: bool = False) -> float | None:
    """Give the λ of the shrink to measure next, see `next_shrink`; None if one is placed, or there is no share to keep."""
    if evaluation.best(keep).reason in ("not learned", "not forgotten"):
        return None
    return next_shrink(evaluation.variants, evaluation.task, keep, last)


def joined(
    known: Evaluation | None, new: Sequence[Variant], sums: Sums, facts: Mapping[str, Any], keep: float
) -> Evaluation:
    """Add variants that were measured to an evaluation, in the order of its table; the base's own sums stay."""
    added, rows = [EvaluatedVariant.of(variant) for variant in new], range(1, 1 + len(new))
    if known is None:
        variants, whole = [EvaluatedVariant(BASE, None, None), *added], sums
    else:
        variants = [*known.variants, *added]
        whole = {text: own.joined(sums[text].take(rows)) for text, own in known.sums.items()}
    order = sorted(range(len(variants)), key=lambda v: variants[v].order)
    return Evaluation.of(
        [variants[v] for v in order], {text: own.take(order) for text, own in whole.items()}, facts, keep
    )
