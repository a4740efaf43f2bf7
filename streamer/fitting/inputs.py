"""Fit right factors to the inputs of modules: one pass collects, one measures a grid of weights, and each share is interpolated.

A killed run repeats the pass that collects, which gives the same values; what was measured is in the journal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streamer.errors import UnsupportedError
from streamer.evaluation.evaluation import GENERAL, TASK
from streamer.evaluation.memory import parts
from streamer.evaluation.progress import pass_cost
from streamer.evaluation.result_file import Records, computing
from streamer.evaluation.sequences import TextSequences
from streamer.evaluation.statistics import SequenceSums
from streamer.evaluation.variants import ADAPTER_ROW, BASE_ROW
from streamer.fitting.division import DividedFit
from streamer.fitting.options import WEIGHTS
from streamer.fitting.prepare import PreparedFit
from streamer.fitting.result import SHRINKS, FoundSet, adapter_facts, doubts, misses, scaling_facts, set_facts
from streamer.linalg.low_rank import LowRank
from streamer.linalg.regmean import RIDGE, answers
from streamer.linalg.second_moments import Moments
from streamer.methods import UNCHANGED, RegMean, Shrink
from streamer.methods.coefficients import Coefficients
from streamer.methods.factors import FactorSet
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.streaming.inputs import GENERAL_AS, TASK_AS, Group, InputModel
from streamer.streaming.spool import Spool, Spooled
from streamer.streaming.variants import ADAPTER, BASE, Variant
from streamer.units import counted, listed

LENGTHS = 32
"""Lengths that the sequences of a text have at most as inputs are collected: a group of each length runs in a thread."""

ROUNDS = 3
"""Interpolations that are measured for a share, at most: a secant rule."""

EXACT = 0.003
"""An interpolation that keeps the share asked for to this is taken as it is."""


@dataclass(frozen=True)
class Point:
    """Right factors for a weight μ: 0 is the adapter as it is, infinity nothing."""

    weight: float
    factors: Mapping[str, Tensor]

    @property
    def name(self) -> str:
        """Name it, for the journal and for messages."""
        return f"{RegMean.name} mu {self.weight!r}"

    def towards(self, other: Point, t: float) -> Point:
        """Interpolate Δ' linearly; the weight stands between the two, by its logarithm if that is finite."""
        if self.weight > 0 and other.weight < math.inf:
            weight = math.exp((1 - t) * math.log(self.weight) + t * math.log(other.weight))
        else:
            weight = t * other.weight if other.weight < math.inf else self.weight / (1 - t)
        return Point(weight, _Mixed(self.factors, other.factors, t))


@dataclass(frozen=True)
class _Mixed(Mapping[str, Tensor]):
    """``(1 − t) a + t b`` of each matrix, made when it is asked for."""

    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    t: float

    def __getitem__(self, tensor: str) -> Tensor:
        return torch.lerp(self.a[tensor], self.b[tensor], self.t)

    def __iter__(self) -> Iterator[str]:
        return iter(self.a)

    def __len__(self) -> int:
        return len(self.a)


@dataclass(frozen=True)
class _Spooled(Mapping[str, Tensor]):
    """Factors for one weight, of which each matrix' are in a spool."""

    spool: Spool
    places: Mapping[str, Sequence[Spooled]]
    number: int

    def __getitem__(self, tensor: str) -> Tensor:
        return self.spool.read(self.places[tensor][self.number])[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class _Scaled(Mapping[str, Tensor]):
    """Right factors of the adapter as it is, times a number."""

    plan: Plan
    targets: Mapping[str, Target]
    by: float

    def __getitem__(self, tensor: str) -> Tensor:
        return factors_of(self.plan, self.targets[tensor]).R.to(torch.float32) * self.by

    def __iter__(self) -> Iterator[str]:
        return iter(self.targets)

    def __len__(self) -> int:
        return len(self.targets)


def factors_of(plan: Plan, target: Target) -> LowRank:
    """Read the factors of a delta, checked."""
    delta = plan.finite_delta(target)
    assert isinstance(delta, LowRank)
    return delta


def of_few_lengths(text: TextSequences) -> TextSequences:
    """Cut the ends of sequences, if need be, so that they have no more than `LENGTHS` lengths: those of one length run together."""
    step = 1
    while len({len(ids) // step for ids in text.ids}) > LENGTHS:
        step *= 2
    sizes = [max(2, len(ids) // step * step) for ids in text.ids]
    cut = tuple(ids[:n] for ids, n in zip(text.ids, sizes, strict=True))
    return TextSequences(cut, tuple(c[:n] for c, n in zip(text.counted, sizes, strict=True)), text.name)


class InputsRun(DividedFit):
    """One fit under way.

    Parameters
    ----------
    records
        What an interrupted run recorded, and what this one does.
    directory
        Where temporary files have their blocks; None for the system's.
    """

    def __init__(self, prepared: PreparedFit, records: Records, directory: Path | None) -> None:
        super().__init__(prepared, records)
        self.directory = directory
        self.raised: list[str] = []
        self._requests = 0
        self._rows: dict[str, Mapping[str, SequenceSums]] = {}

    def result(self) -> Coefficients:
        """Run to the end."""
        prepared, plan = self.prepared, self.prepared.plan
        if all(factors_of(plan, target).is_zero() for target in plan.targets):
            raise UnsupportedError(f"{plan.adapter.path}: changes nothing by its deltas, all of which are zero")
        prepared.warn()
        spool = Spool(self.directory)
        try:
            with computing(self.records.threads, self.monitor):
                self.check()
                self.progress.resume(self.records.taken_up)
                baseline = [Variant.of(Shrink(lam)) for lam in SHRINKS]
                self._measure_new([Variant(ADAPTER, UNCHANGED), *baseline, *prepared.scaling])
                of_adapter = adapter_facts(*self._sums([]), prepared.texts[TASK].whole.name)
                self.monitor.warn(doubts(of_adapter))
                points, unseen = self._solved(spool)
                found = self._interpolated(points)
                self.progress.finish()
                sets = [FoundSet(keep, point.weight, RegMean.name) for keep, point in found]
                names = [*(one.name for one in baseline), *(point.name for _, point in found)]
                facts = {
                    **prepared.facts, "ridge": RIDGE, "raised": self.raised, "unseen": unseen, **of_adapter,
                    **scaling_facts(prepared.scaling, lambda name: self._sums([name])),
                    "sets": set_facts(*self._sums(names), sets),
                }  # fmt: skip
                self.monitor.warn(misses(facts))
                tensors = [target.tensor for target in plan.targets]
                made = tuple(
                    FactorSet(keep, {tensor: point.factors[tensor].clone() for tensor in tensors})
                    for keep, point in found
                )
        finally:
            spool.close()
        return Coefficients(made, facts)

    def _solved(self, spool: Spool) -> tuple[list[Point], list[str]]:
        """Collect the inputs' moments, and solve for each weight; list what no text came to, whose delta stays."""
        prepared, plan = self.prepared, self.prepared.plan
        texts = {name: of_few_lengths(text.fitted) for name, text in prepared.texts.items()}
        places: dict[str, Sequence[Spooled]] = {}

        def complete(targets: list[Target], moments: Mapping[int, Moments]) -> None:
            self.monitor.checkpoint()
            factors = [(delta.L, delta.R) for delta in (factors_of(plan, target) for target in targets)]
            rights, ridge = answers(
                factors, moments[TASK_AS], moments[GENERAL_AS], WEIGHTS, targets[0].tensor, prepared.matrices_bytes
            )
            if ridge > RIDGE:
                self.raised += [target.tensor for target in targets]
            for target, mine in zip(targets, rights, strict=True):
                places[target.tensor] = [spool.write([right.to(torch.float32)]) for right in mine]

        model = InputModel(plan, rounds_products=prepared.options.dtype == "bf16", directory=self.directory)
        size = prepared.model.size
        divided = [
            (texts[name].take(rows), variant)
            for name, variant in ((GENERAL, GENERAL_AS), (TASK, TASK_AS))
            for rows in parts(texts[name], prepared.rows_of_inputs, size.short, True)
        ]
        costs = [pass_cost(size, text, 1) for text, _ in divided]
        hooks = self.progress.readings(costs, 1)
        model.collect([Group(*one, hook) for one, hook in zip(divided, hooks, strict=True)], complete)
        for cost in costs:
            self.progress.advance(cost)
        plan.check_unchanged()
        if model.unseen:
            count, first = counted(len(model.unseen), "matrix"), listed(map(repr, model.unseen))
            self.monitor.warn(
                (
                    f"no token of the general text, or none of the task's, reached {count}, {first}; what the adapter adds there stays",
                )
            )
        if self.raised:
            self.monitor.warn((f"the texts are short for the inputs of {counted(len(self.raised), 'matrix')}, "
                               f"{listed(map(repr, self.raised))}: the ridge was raised; more text may forget less",))  # fmt: skip
        targets = {target.tensor: target for target in plan.targets}
        as_is = _Scaled(plan, targets, 1.0)
        for tensor in model.unseen:
            places[tensor] = [spool.write([as_is[tensor]])] * len(WEIGHTS)
        points = [Point(mu, _Spooled(spool, places, number)) for number, mu in enumerate(WEIGHTS)]
        return [Point(0.0, as_is), *points, Point(math.inf, _Scaled(plan, targets, 0.0))], model.unseen

    def _interpolated(self, points: Sequence[Point]) -> list[tuple[float, Point]]:
        """Find for each share the point that keeps it: between two that were measured, and measured itself."""
        keeps = self.prepared.options.keep
        self._measure_new([self._variant(point) for point in points[1:-1]])
        known = {keep: [(self._kept(point), point) for point in points] for keep in keeps}
        found: dict[float, Point] = {}
        for _ in range(ROUNDS):
            asked: dict[float, Point] = {}
            for keep, own in known.items():
                at = max(i for i, (kept, _) in enumerate(own[:-1]) if kept >= keep or i == 0)
                (above, a), (below, b) = own[at], own[at + 1]
                t = min(1.0, max(0.0, (above - keep) / (above - below))) if above > below else 0.5
                if keep not in found or abs(self._kept(found[keep]) - keep) > EXACT:
                    asked[keep] = found[keep] = a.towards(b, t)
            if not asked:
                break
            self._measure_new([self._variant(point) for point in asked.values()])
            for keep, point in asked.items():
                kept, own = self._kept(point), known[keep]
                at = next((i for i, (_, other) in enumerate(own) if other.weight > point.weight), len(own) - 1)
                own.insert(at, (kept, point))
        for keep, own in known.items():  # where the curve is rough the last one is not always the nearest
            found[keep] = min((abs(kept - keep), i, point) for i, (kept, point) in enumerate(own[1:]))[2]
        return [(keep, found[keep]) for keep in keeps]

    def _variant(self, point: Point) -> Variant:
        return Variant(point.name, RegMean(coefficients=FactorSet(1.0, point.factors)))

    def _kept(self, point: Point) -> float:
        """Return the share of what was learned that a point keeps."""
        if point.weight == 0:
            return 1.0
        if point.weight == math.inf:  # what the adapter brings besides deltas stays
            return self._sums([Variant.of(Shrink(0.0)).name])[1].share(ADAPTER_ROW + 1).value
        return self._sums([point.name])[1].share(ADAPTER_ROW + 1).value

    def _measure_new(self, variants: Sequence[Variant]) -> None:
        """Measure those of the variants that were not measured yet, together."""
        new = [Variant(BASE, None), *(v for v in variants if v.name not in self._rows)]
        if len(new) == 1:
            return
        self._requests += 1
        names = json.dumps([variant.name for variant in new])
        whole = self.measure(new, lambda i: f"{self._requests}.{i} {names}")
        for row, variant in enumerate(new):
            self._rows.setdefault(variant.name, {text: of.take([row]) for text, of in whole.items()})

    def _sums(self, names: Sequence[str]) -> tuple[SequenceSums, SequenceSums]:
        """Return the sums on both texts of the base, the adapter as it is, and variants that were measured."""
        assert (BASE_ROW, ADAPTER_ROW) == (0, 1)
        rows = [self._rows[name] for name in (BASE, ADAPTER, *names)]
        general, task = (rows[0][text].joined(*(row[text] for row in rows[1:])) for text in (GENERAL, TASK))
        return general, task
