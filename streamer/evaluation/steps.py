"""Decide what an evaluation measures: a generator requests variants, receives their sums, and returns the evaluation.

The generator holds no model and reads no file. The same answers lead to the same requests, so a journal of answers resumes it. It requests:

1. the user's variants, on the sequences of the first round; in each later round, the variants that have not lost (see `race`)
2. up to `MOST_PLACED` times for each method with a λ, a variant whose λ keeps the share according to the losses so far: a shrink of the
   whole adapter in each round, other methods at the end, unless all their variants have lost
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from streamer.evaluation.evaluation import Evaluation
from streamer.evaluation.race import WHOLE, eighths_run, lost
from streamer.evaluation.shrinks import placed
from streamer.evaluation.suggestion import Trade
from streamer.measuring.sequences import ALL
from streamer.measuring.statistics import SequenceSums
from streamer.measuring.variants import ADAPTER_ROW, BASE_ROW, EvaluatedVariant
from streamer.methods import Shrink
from streamer.streaming.variants import ADAPTER, BASE, Variant

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")
Result = TypeVar("Result")

MOST_PLACED = 4
"""Most variants of a method measured in order to place one; one or two are usual."""

SURVIVING = 5
"""After each round, one in this many variants is expected to go on."""


Sums = Mapping[str, SequenceSums]
"""Answer to a request: on each text, the sums of the requested variants, including the base; NaN for sequences not requested."""


Size = tuple[int, range]
"""Number of variants, including the base, and the eighths of the texts on which they run."""


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
class Request:
    """Variants to measure on some eighths of the texts, the base first, and the sizes of the requests expected later."""

    variants: tuple[Variant, ...]
    eighths: range
    later: tuple[Size, ...] = ()

    @property
    def size(self) -> Size:
        """Return the number of variants, and the eighths."""
        return len(self.variants), self.eighths


Steps = Generator[Request, Sums, Evaluation]


@dataclass(frozen=True)
class Wanted:
    """What to measure.

    Attributes
    ----------
    variants
        ``base``, ``adapter`` and others.
    keep
        Share of the learning that a placed λ should keep.
    rounds
        Eighths of the texts that each round runs; after each round, variants may be dropped.
    nodes
        Shrinks among the variants that a race runs to place another. It may drop them, but not shrinks that the user asked for.
    """

    variants: Sequence[Variant]
    keep: float
    rounds: Sequence[range] = WHOLE
    nodes: Sequence[Variant] = ()

    def always(self, variant: Variant) -> bool:
        """Test whether a variant runs on all sequences, whatever the results."""
        asked = variant.method == Shrink.name and variant not in self.nodes
        return len(self.rounds) == 1 or variant.name == ADAPTER or asked


def expected(wanted: Wanted, known: Evaluation | None) -> list[Size]:
    """List the sizes of the expected requests, if the usual number of variants is dropped; empty if nothing is missing."""
    request = next_request(wanted, known, alive_at_first(wanted, known), _tries(known, wanted.keep))
    return [] if request is None else [request.size, *request.later]


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
    alive = alive_at_first(wanted, known)
    while (request := next_request(wanted, evaluation, alive, tries)) is not None:
        rows = () if evaluation is None else evaluation.variants
        tries.update(
            str(v.method) for v in request.variants if v not in wanted.variants and EvaluatedVariant.of(v) not in rows
        )
        evaluation = joined(evaluation, request.variants, (yield request), facts, wanted.keep)
        alive = [v for v in alive if goes_on(wanted, evaluation, v)]
    assert evaluation is not None
    return replace(evaluation, facts=facts, keep=wanted.keep)


def _tries(known: Evaluation | None, keep: float) -> Counter[str]:
    """Count the λ tried in order to place each method: `MOST_PLACED` if an earlier run placed it for this share, else none."""
    done = known.variants if known is not None and known.keep == keep else ()
    return Counter({str(v.method): MOST_PLACED for v in done if v.method is not None})


def alive_at_first(wanted: Wanted, known: Evaluation | None) -> list[Variant]:
    """List the variants to run, or to run further; variants dropped earlier are left out, unless they survive at a new share."""
    if known is None:
        return list(wanted.variants[1:])
    others = without_scaling(wanted.variants[1:], known.facts)
    if any(v.method == Shrink.name and not known.dropped(row) for row, v in enumerate(known.variants)):
        others = [v for v in others if v not in wanted.nodes]  # the measured shrinks are better for placing one
    return [
        v
        for v in others
        if wanted.always(v)
        or (row := row_of(known, v)) is None
        or not known.dropped(row)
        or (known.keep != wanted.keep and goes_on(wanted, known, v))
    ]


def row_of(known: Evaluation, variant: Variant) -> int | None:
    """Find the row of a variant; None if it was not measured."""
    own = EvaluatedVariant.of(variant)
    return known.variants.index(own) if own in known.variants else None


def next_request(
    wanted: Wanted, known: Evaluation | None, alive: Sequence[Variant], tries: Counter[str]
) -> Request | None:
    """Return the next request; None if nothing is missing.

    Parameters
    ----------
    alive
        Variants that have not lost.
    tries
        Number of λ tried so far in order to place each method.
    """
    request = _request(wanted, known, alive, tries)
    if request is None:
        return None
    reached = 0 if known is None else eighths_run(known, BASE_ROW) % len(ALL)
    ahead = request.eighths.stop > reached and any(v.name == ADAPTER for v in request.variants)
    always = sum(map(wanted.always, request.variants[1:]))
    racing = sum(v.method not in (None, Shrink.name) for v in alive)
    tried = tries[Shrink.name]
    shrinks = wanted.keep < 1 and tried < MOST_PLACED and any(v.method == Shrink.name for v in wanted.variants)
    later: list[Size] = [(2, range(request.eighths.stop))] * (
        shrinks and ahead and tried == 0 and len(wanted.rounds) > 1
    )
    for own in wanted.rounds:
        racing = -(-racing // SURVIVING)
        if own.start >= max(request.eighths.stop, reached) and (always or racing):
            later.append((1 + always + racing + (shrinks and ahead), own))
    later += [(2, range(len(ALL) // 2))] * (shrinks and tried < 2)  # which is asked for at any time, or not at all
    others = {v.method for v in alive if v.method != Shrink.name and v.mitigation_lambda is not None}
    later += [(2, ALL)] * sum(wanted.keep < 1 and not tries[str(name)] for name in others if len(wanted.rounds) == 1)
    return Request(request.variants, request.eighths, tuple(later))


def _request(wanted: Wanted, known: Evaluation | None, alive: Sequence[Variant], tries: Counter[str]) -> Request | None:
    base = wanted.variants[0]
    if known is None:
        return Request((base, *alive), wanted.rounds[0])
    ran = {v: 0 if (row := row_of(known, v)) is None else eighths_run(known, row) for v in alive}
    reached = eighths_run(known, BASE_ROW)
    if behind := [v for v in ran if ran[v] < reached]:
        least = min(ran[v] for v in behind)
        stop = next(r.stop for r in wanted.rounds if r.stop > least)
        return Request((base, *(v for v in behind if ran[v] == least)), range(least, min(stop, reached)))
    placed_row, lam = to_place(wanted, known, tries, Shrink.name)
    found = None if lam is None else Variant.of(Shrink(lam))
    others = {v.method: v.mitigation for v in alive if v.method != Shrink.name and v.mitigation_lambda is not None}
    for name, method in others.items() if found is None and reached == len(ALL) else ():
        if method is not None and (lam := to_place(wanted, known, tries, str(name))[1]) is not None:
            found = Variant.of(replace(method, mitigation_lambda=lam))  # type: ignore[type-var]  # each method is a dataclass
            break
    if found is not None:
        row = row_of(known, found)
        return Request((base, found), range(0 if row is None else eighths_run(known, row), reached))
    if reached == len(ALL):
        return None
    of_row = known.variants[placed_row]
    if of_row.method == Shrink.name and of_row.mitigation_lambda is not None:
        alive = list(dict.fromkeys([*alive, Variant.of(Shrink(of_row.mitigation_lambda))]))
    stop = next(r.stop for r in wanted.rounds if r.stop > reached)
    return Request((base, *alive), range(reached, stop))


def goes_on(wanted: Wanted, known: Evaluation, variant: Variant) -> bool:
    """Test whether a variant runs on further sequences.

    Among the race's own shrinks, the placed one and the milder ones go on, until the placed one is known to be worth it (`Trade`).
    """
    row = row_of(known, variant)
    if row is None or wanted.always(variant):
        return True
    if variant.method != Shrink.name:
        return not lost(known, row, wanted.keep)
    row, _ = to_place(wanted, known, Counter(), Shrink.name)
    milder = (variant.mitigation_lambda or 0.0) >= (known.variants[row].mitigation_lambda or 1.0)
    return milder and not Trade.of(known.general, known.task, row).is_worth_it


def without_scaling(variants: Sequence[Variant], facts: Mapping[str, Any]) -> list[Variant]:
    """Leave out the variants that scale intruders, if there are known to be none: they equal the unchanged adapter."""
    return [variant for variant in variants if not (facts.get("intruders") == 0 and variant.scales_intruders)]


def to_place(wanted: Wanted, known: Evaluation, tries: Counter[str], method: str) -> tuple[int, float | None]:
    """Choose the variant of a method that keeps the share, and a better λ to measure, or None; see `placed`."""
    reason = known.best(wanted.keep).reason
    if reason == "not learned" or (reason == "not forgotten" and eighths_run(known, BASE_ROW) == len(ALL)):
        return ADAPTER_ROW, None
    last, loose = tries[method] == MOST_PLACED - 1, len(wanted.rounds) > 1
    row, lam = placed(known.variants, known.task, wanted.keep, method, last, loose)
    return row, lam if tries[method] < MOST_PLACED else None


def joined(
    known: Evaluation | None, measured: Sequence[Variant], sums: Sums, facts: Mapping[str, Any], keep: float
) -> Evaluation:
    """Add measured sums to an evaluation, in the order of its table; sums of other sequences stay."""
    variants = [EvaluatedVariant(BASE, None, None)] if known is None else list(known.variants)
    rows = [BASE_ROW]
    for variant in map(EvaluatedVariant.of, measured[1:]):
        if variant not in variants:
            variants.append(variant)
        rows.append(variants.index(variant))
    order = sorted(range(len(variants)), key=lambda v: variants[v].order)
    whole = {}
    for text, new in sums.items():
        own = (
            new.unknown(len(variants))
            if known is None
            else known.sums[text].joined(new.unknown(len(variants) - len(known.variants)))
        )
        for of, row in enumerate(rows):
            own.add(row, new, of)
        whole[text] = own.take(order)
    return Evaluation.of([variants[v] for v in order], whole, facts, keep)
