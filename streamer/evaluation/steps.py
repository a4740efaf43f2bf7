"""Decide what an evaluation measures: a generator requests variants, receives their sums, and returns the evaluation.

The generator holds no model and reads no file. The same answers lead to the same requests, so a journal of answers resumes it. It requests
the user's variants, and then, up to `MOST_PLACED` times for each method with a λ, a variant whose λ keeps the share according to the losses
so far. A method whose variants nearest to the share diverge more than a shrink that keeps as much is not placed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from streamer.evaluation.evaluation import Evaluation
from streamer.evaluation.shrinks import placed
from streamer.measuring.statistics import SequenceSums
from streamer.measuring.variants import EvaluatedVariant
from streamer.methods import UNCHANGED, Shrink
from streamer.streaming.variants import Variant

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")
Result = TypeVar("Result")

MOST_PLACED = 4
"""Most variants of a method measured in order to place one; one or two are usual."""

Sums = Mapping[str, SequenceSums]
"""Answer to a request: on each text, the sums of the requested variants, including the base."""

Request = tuple[Variant, ...]
"""Variants to measure on all texts, the base first."""

Steps = Generator[Request, Sums, Evaluation]


def answered(steps: Generator[Asked, Answer, Result], answer: Callable[[Asked], Answer]) -> Result:
    """Answer the requests of steps until they end; return their result."""
    reply: Any = None
    while True:
        try:
            request = steps.send(reply)
        except StopIteration as end:
            found: Result = end.value
            return found
        reply = answer(request)


@dataclass(frozen=True)
class Wanted:
    """What to measure: variants, ``base`` and ``adapter`` first, and the share of the learning that a placed λ should keep."""

    variants: Sequence[Variant]
    keep: float

    def expected(self, known: Evaluation | None) -> list[int]:
        """List the number of variants in each expected request, including the base; empty if nothing is missing."""
        tries = _tries(known, self.keep)
        request = _request(self, known, tries)
        if request is None:
            return []
        methods = {v.method for v in self.variants if v.mitigation_lambda is not None}
        return [len(request)] + [2] * sum(self.keep < 1 and not tries[str(name)] for name in methods)


def evaluation_steps(wanted: Wanted, known: Evaluation | None, facts: Mapping[str, Any]) -> Steps:
    """Evaluate variants: yield requests, receive their sums, and return the evaluation.

    Parameters
    ----------
    known
        Earlier measurements.
    facts
        Facts of the returned evaluation.
    """
    evaluation, tries = known, _tries(known, wanted.keep)
    while (request := _request(wanted, evaluation, tries)) is not None:
        tries.update(str(v.method) for v in request[1:] if v not in wanted.variants)
        evaluation = _joined(evaluation, request, (yield request), facts, wanted.keep)
    assert evaluation is not None
    return replace(evaluation, facts=facts, keep=wanted.keep)


def without_scaling(variants: Sequence[Variant], facts: Mapping[str, Any]) -> list[Variant]:
    """Leave out the variants that scale intruders, if there are known to be none: they equal the unchanged adapter."""
    return [variant for variant in variants if not (facts.get("intruders") == 0 and variant.scales_intruders)]


def _tries(known: Evaluation | None, keep: float) -> Counter[str]:
    """Count the λ tried in order to place each method: `MOST_PLACED` if an earlier run placed it for this share, else none."""
    done = known.variants if known is not None and known.keep == keep else ()
    return Counter({str(v.method): MOST_PLACED for v in done if v.method is not None})


def _request(wanted: Wanted, known: Evaluation | None, tries: Counter[str]) -> Request | None:
    """Return the next request; None if nothing is missing."""
    if known is None:
        return tuple(wanted.variants)
    base, *variants = without_scaling(wanted.variants, known.facts)
    if missing := [v for v in variants if EvaluatedVariant.of(v) not in known.variants]:
        return base, *missing
    if known.best(wanted.keep).reason in ("not learned", "not forgotten"):
        return None
    # The shrink is first: the others are compared with it.
    placing = {
        Shrink.name: UNCHANGED,
        **{str(v.method): v.mitigation for v in variants if v.mitigation_lambda is not None},
    }
    for name, method in placing.items():
        tried = tries[name]
        if method is None or tried == MOST_PLACED or known.lost(name, wanted.keep):
            continue
        lam = placed(known.variants, known.task, wanted.keep, name, last=tried == MOST_PLACED - 1)[1]
        if lam is not None:
            return base, Variant.of(replace(method, mitigation_lambda=lam))  # type: ignore[type-var]  # each method is a dataclass
    return None


def _joined(
    known: Evaluation | None, measured: Request, sums: Sums, facts: Mapping[str, Any], keep: float
) -> Evaluation:
    """Add measured sums to an evaluation, in the order of its table."""
    variants = [*(() if known is None else known.variants), *map(EvaluatedVariant.of, measured[known is not None :])]
    order = sorted(range(len(variants)), key=lambda v: variants[v].order)
    added = range(known is not None, len(measured))
    own = {text: new if known is None else known.sums[text].joined(new.take(added)) for text, new in sums.items()}
    return Evaluation.of(
        [variants[v] for v in order], {text: one.take(order) for text, one in own.items()}, facts, keep
    )
