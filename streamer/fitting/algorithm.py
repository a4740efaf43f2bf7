"""Fit the coefficients of ``Δ' = U diag(c s) Vᵀ`` in few passes, by a generator that asks for gradients and measurements.

It uses no model and reads no file. Given the same answers it asks the same questions, so a journal of answers resumes it. It asks for:

1. `Measure` of c = 0, on the held-out sequences, if that is a model other than the base.
2. `Gradient` of G at c = 1 and of T at c = 0. KL divergences have value and gradient 0 at the other ends; for losses, and for G if c = 0 is
   not the base, it asks for the gradients there too.
3. Several times: `Gradient` of both at one point of the front of the current models of G and T (see `front`), for the share of the learning
   whose point is furthest from all sampled ones.
4. `Measure` of points of the final front around each share, then of points on lines between them that should keep the share (see
   `choices`).

A single coefficient needs no gradient: it is the adapter's scale, and step 4 chooses it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from streamer.fitting.front import Front, FrontPoint, Sample, best, choices
from streamer.fitting.quadratic import Floats
from streamer.measuring.statistics import Estimate, SequenceSums

Text = Literal["general", "task"]

STEPS_PER_SHARE, LEAST_STEPS = 2, 3
"""Default number of points at which both gradients are computed: so many for each share of the learning, but at least the second number."""

SPREAD = 0.5
"""The front is measured at the wanted share, and this part of the way from it to 0 and to 1."""

SCALES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Scales that are measured if there is a single coefficient."""


@dataclass(frozen=True)
class Problem:
    """What to fit.

    Attributes
    ----------
    count
        P, number of coefficients to fit; with a single one Δ' is a shrink.
    keep
        Shares of the learning to keep, each in (0, 1).
    objective
        Meaning of G and T: divergences from the base and from the unchanged adapter ("kl"), or the texts' own losses ("loss").
    steps
        Points at which both gradients are computed after the ends; by default `STEPS_PER_SHARE` for each share.
    base_at_zero
        Whether c = 0 is the base. It is not if the adapter changes more than its deltas do: those changes remain.
    """

    count: int
    keep: tuple[float, ...] = (0.9,)
    objective: Literal["kl", "loss"] = "kl"
    steps: int | None = None
    base_at_zero: bool = True

    @property
    def step_count(self) -> int:
        """Return the number of points at which both gradients are computed after the ends."""
        return max(LEAST_STEPS, STEPS_PER_SHARE * len(self.keep)) if self.steps is None else self.steps


@dataclass(frozen=True)
class Gradient:
    """Request for a text's mean over tokens and its gradient with respect to the coefficients (P,), answered by a `Slope`."""

    text: Text
    coefficients: Floats


@dataclass(frozen=True)
class Measure:
    """Request for losses on the held-out sequences with each of some coefficients (P,), answered by a `HeldOutAnswer`."""

    coefficients: tuple[Floats, ...]


@dataclass(frozen=True)
class Slope:
    """Answer to `Gradient`: the value in nats per token and its gradient (P,)."""

    value: float
    gradient: Floats


@dataclass(frozen=True)
class HeldOutAnswer:
    """Answer to `Measure`: sums for both texts' held-out sequences; variants are the base, the unchanged adapter and the requested ones."""

    general: SequenceSums
    task: SequenceSums


Request = Gradient | Measure
Answer = Slope | HeldOutAnswer


@dataclass(frozen=True)
class FittedPoint:
    """Coefficients for one share of the learning.

    Attributes
    ----------
    keep
        The requested share.
    coefficients
        c: (P,).
    weight
        μ, in nats of general text per nat of task text; NaN for a single coefficient, or if all are 0.
    kept, forgetting
        Shares of the learning kept and of the forgetting left, on the held-out sequences.
    """

    keep: float
    coefficients: Floats
    weight: float
    kept: Estimate
    forgetting: Estimate


def fit_steps(options: Problem) -> Generator[Request, Answer, tuple[FittedPoint, ...]]:
    """Fit coefficients for each share of the learning: yield requests, receive their answers, return a point for each share."""
    P = options.count
    zero = FrontPoint(float("nan"), np.zeros(P), 0.0)
    beside = None
    if not options.base_at_zero:
        beside = yield from _measure([zero.coefficients])
        zero = replace(zero, kept=beside.task.fraction(2).value)
    above = [keep for keep in options.keep if keep > zero.kept]
    candidates: list[FrontPoint] = []
    if above and P == 1:
        candidates = [FrontPoint(float("nan"), np.full(P, scale), scale) for scale in SCALES]
    elif above:
        # The models of T predict what the coefficients add to the share that is kept without them.
        wanted = [(keep - zero.kept) / (1 - zero.kept) for keep in above]
        front = yield from _sampled(options, wanted)
        candidates = [front.at(level) for level in _levels(wanted)]
    tried = yield from _measure([point.coefficients for point in candidates])
    losses = [tried.general.mean(row).value for row in tried.general.loss]
    zero = replace(zero, loss=losses[0] if beside is None else beside.general.mean(beside.general.loss[2]).value)
    one = FrontPoint(float("inf"), np.ones(P), 1.0, losses[1])
    candidates = [
        replace(point, kept=tried.task.fraction(i).value, loss=losses[i]) for i, point in enumerate(candidates, start=2)
    ]
    found = [choices(zero, candidates, one, keep) for keep in options.keep]
    sums = yield from _measure([point.coefficients for points in found for point in points])
    return tuple(_chosen(options.keep, found, sums))


def _chosen(keep: Sequence[float], found: Sequence[Sequence[FrontPoint]], sums: HeldOutAnswer) -> Iterator[FittedPoint]:
    """Choose, for each share, among its points, which were measured one after the other."""
    row = 2  # after the base and the adapter
    for wanted, points in zip(keep, found, strict=True):
        rows = range(row, row + len(points))
        measured = [
            replace(point, kept=sums.task.fraction(i).value, loss=sums.general.mean(sums.general.loss[i]).value)
            for point, i in zip(points, rows, strict=True)
        ]
        i = best(measured, wanted)
        point, row = points[i], row + len(points)
        yield FittedPoint(
            wanted, point.coefficients, point.weight, sums.task.fraction(rows[i]), sums.general.fraction(rows[i])
        )


def _sampled(options: Problem, wanted: Sequence[float]) -> Generator[Request, Answer, Front]:
    """Sample both texts at the ends and then, for the wanted shares, at points of the front of the samples so far."""
    zero, one = np.zeros(options.count), np.ones(options.count)
    known = options.objective == "kl"
    general = [Sample(zero, 0.0, zero) if known and options.base_at_zero else (yield from _sample("general", zero))]
    general.append((yield from _sample("general", one)))
    task = [Sample(one, 0.0, zero) if known else (yield from _sample("task", one))]
    task.append((yield from _sample("task", zero)))
    for _ in range(options.step_count):
        front = Front(tuple(general), tuple(task))
        c = max((front.at(keep) for keep in wanted), key=front.distance).coefficients
        general.append((yield from _sample("general", c)))
        task.append((yield from _sample("task", c)))
    return Front(tuple(general), tuple(task))


def _sample(text: Text, point: Floats) -> Generator[Request, Answer, Sample]:
    answer = yield Gradient(text, point)
    assert isinstance(answer, Slope)
    return Sample(point, answer.value, answer.gradient)


def _measure(coefficients: Sequence[Floats]) -> Generator[Request, Answer, HeldOutAnswer]:
    answer = yield Measure(tuple(coefficients))
    assert isinstance(answer, HeldOutAnswer)
    return answer


def _levels(keep: Sequence[float]) -> list[float]:
    """List the shares at which the front is measured: each wanted share, and one below and above it."""
    return sorted({round(k + side * SPREAD * min(k, 1 - k), 6) for k in keep for side in (-1, 0, 1)})
