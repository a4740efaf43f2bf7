"""Fit the coefficients of ``Δ' = U diag(c s) Vᵀ`` in few passes: a generator that asks for gradients and measures, and is given them.

It holds no model and reads no file; given the same answers it asks the same questions, so a journal of answers resumes it. What is asked:

1. `Measure` of the base and the adapter, and of c = 0 where that is another model, on the sequences held apart. Where the adapter is
   not told from the base there, in what it has learnt or in what it has forgotten, there is nothing to fit.
2. `Gradient` of G at c = 1 and of T at c = 0. KL divergences from the models at the other ends have value and gradient 0 there; of losses,
   and of G where c = 0 is not the base, the gradients there are asked for too.
3. Some times: `Gradient` of both at one point of the front that the models of G and T give (see `front`), for that share of the
   learning whose point is furthest from all sampled ones.
4. `Measure` of points of the final front around each share, then of those that interpolation among them chooses.

One coefficient for all needs no gradient: it is the adapter's scale, and step 4 chooses it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from streamer.evaluation.statistics import Estimate, SequenceSums
from streamer.fitting.front import Front, FrontPoint, Sample, choose
from streamer.fitting.quadratic import Floats

Text = Literal["general", "task"]

STEPS_PER_SHARE, LEAST_STEPS = 2, 3
"""Points at which both gradients are taken, by default: so many for each share of the learning, but at least so many."""

SPREAD = 0.5
"""Points of the front are measured at the wanted share and below and above it, by this part of what is between it and 0 or 1."""

SCALES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Scales that are measured for one coefficient for all."""


@dataclass(frozen=True)
class FitOptions:
    """What to fit.

    Attributes
    ----------
    groups
        The coefficient that each direction has, as its number: (P,). ``arange(P)`` is one a direction, zeros one for all.
    keep
        Shares of the learning to keep, each in (0, 1).
    objective
        What G and T are: divergences from the base and from the adapter as it is ("kl"), or the texts' own losses ("loss").
    steps
        Points at which both gradients are taken after those at the ends; by default `STEPS_PER_SHARE` for each share.
    regardless
        Fit even where the adapter is not told from the base on the sequences held apart.
    base_at_zero
        Whether c = 0 is the base; with what an adapter brings besides deltas, which stays, it is another model.
    """

    groups: NDArray[np.int64]
    keep: tuple[float, ...] = (0.9,)
    objective: Literal["kl", "loss"] = "kl"
    steps: int | None = None
    regardless: bool = False
    base_at_zero: bool = True

    @property
    def step_count(self) -> int:
        """Count the points at which both gradients are taken after those at the ends."""
        return max(LEAST_STEPS, STEPS_PER_SHARE * len(self.keep)) if self.steps is None else self.steps


@dataclass(frozen=True)
class Gradient:
    """Asks for a text's mean over tokens and its gradient with respect to the coefficients (P,): the answer is a `Slope`."""

    text: Text
    coefficients: Floats


@dataclass(frozen=True)
class Measure:
    """Asks for losses on the sequences held apart with each of some coefficients (P,): the answer is a `HeldOut`."""

    coefficients: tuple[Floats, ...]


@dataclass(frozen=True)
class Slope:
    """Answers `Gradient`: the value in nats a token, and its gradient (P,)."""

    value: float
    gradient: Floats


@dataclass(frozen=True)
class HeldOut:
    """Answers `Measure`: sums of both texts' sequences held apart; variants are the base, the adapter as it is, then those asked for."""

    general: SequenceSums
    task: SequenceSums


Request = Gradient | Measure
Answer = Slope | HeldOut


@dataclass(frozen=True)
class FittedPoint:
    """Coefficients for one share of the learning.

    Attributes
    ----------
    keep
        The share that was wanted.
    coefficients
        c: (P,).
    weight
        μ, in nats of general text a nat of task text; not a number for one coefficient for all, and where all are 0.
    kept, forgetting
        Shares of the learning kept and of the forgetting left on the sequences held apart.
    """

    keep: float
    coefficients: Floats
    weight: float
    kept: Estimate
    forgetting: Estimate


@dataclass(frozen=True)
class FitResult:
    """What was fitted.

    Attributes
    ----------
    points
        One for each share, in the order of the options; none where nothing was fitted.
    learnt, forgotten
        By how much the adapter as it is lowers the task's loss and raises the general text's, in nats a token.
    reason
        Why nothing was fitted, or what makes the result doubtful; empty where there is no doubt.
    """

    points: tuple[FittedPoint, ...]
    learnt: Estimate
    forgotten: Estimate
    reason: str = ""


Steps = Generator[Request, Answer, FitResult]


def fit_steps(options: FitOptions) -> Steps:
    """Fit coefficients for each share of the learning; yields requests, is sent their answers, returns the result."""
    P = len(options.groups)
    ends = yield from _measure([] if options.base_at_zero else [np.zeros(P)])
    learnt, forgotten = ends.task.loss_difference(0, 1), ends.general.loss_difference(1, 0)
    reason = _doubt(learnt, forgotten)
    if reason and not options.regardless:
        return FitResult((), learnt, forgotten, reason)
    zero = FrontPoint(float("nan"), np.zeros(P), 0.0 if options.base_at_zero else ends.task.share(2).value)
    above = [keep for keep in options.keep if keep > zero.kept]
    candidates: list[FrontPoint] = []
    if above and len(np.unique(options.groups)) == 1:
        candidates = [FrontPoint(float("nan"), np.full(P, scale), scale) for scale in SCALES]
    elif above:
        # Models of T know what the coefficients add to what is kept without them.
        wanted = [(keep - zero.kept) / (1 - zero.kept) for keep in above]
        front = yield from _sampled(options, wanted)
        candidates = [_whole(front.at(level), options.groups) for level in _levels(wanted)]
    tried = yield from _measure([point.coefficients for point in candidates])
    candidates = [replace(point, kept=tried.task.share(i).value) for i, point in enumerate(candidates, start=2)]
    found = [choose(zero, candidates, keep) for keep in options.keep]
    held = yield from _measure([point.coefficients for point in found])
    points = tuple(
        FittedPoint(keep, point.coefficients, point.weight, held.task.share(i), held.general.share(i))
        for i, (keep, point) in enumerate(zip(options.keep, found, strict=True), start=2)
    )
    return FitResult(points, learnt, forgotten, reason)


def _sampled(options: FitOptions, wanted: Sequence[float]) -> Generator[Request, Answer, Front]:
    """Sample both texts at the ends and then at points of the front that the samples so far give, for shares that are wanted."""
    groups, n = options.groups, int(options.groups.max()) + 1
    zero, one = np.zeros(n), np.ones(n)
    known = options.objective == "kl"
    general = [
        Sample(zero, 0.0, zero) if known and options.base_at_zero else (yield from _sample("general", zero, groups))
    ]
    general.append((yield from _sample("general", one, groups)))
    task = [Sample(one, 0.0, zero) if known else (yield from _sample("task", one, groups))]
    task.append((yield from _sample("task", zero, groups)))
    for _ in range(options.step_count):
        front = Front(tuple(general), tuple(task))
        c = max((front.at(keep) for keep in wanted), key=front.distance).coefficients
        general.append((yield from _sample("general", c, groups)))
        task.append((yield from _sample("task", c, groups)))
    return Front(tuple(general), tuple(task))


def _sample(text: Text, point: Floats, groups: NDArray[np.int64]) -> Generator[Request, Answer, Sample]:
    """Ask for a gradient, and sum it over the directions that share a coefficient."""
    answer = yield Gradient(text, point[groups])
    assert isinstance(answer, Slope)
    summed = np.bincount(groups, weights=answer.gradient, minlength=len(point)).astype(np.float64)
    return Sample(point, answer.value, summed)


def _measure(coefficients: Sequence[Floats]) -> Generator[Request, Answer, HeldOut]:
    answer = yield Measure(tuple(coefficients))
    assert isinstance(answer, HeldOut)
    return answer


def _levels(keep: Sequence[float]) -> list[float]:
    """List the shares at which the front is measured: each that is wanted, and one below and above it."""
    return sorted({round(k + side * SPREAD * min(k, 1 - k), 6) for k in keep for side in (-1, 0, 1)})


def _whole(point: FrontPoint, groups: NDArray[np.int64]) -> FrontPoint:
    """Give each direction the coefficient of its group."""
    return replace(point, coefficients=point.coefficients[groups])


def _doubt(learnt: Estimate, forgotten: Estimate) -> str:
    """Say why there is nothing to fit, if so."""
    for what, found in (("learnt on the task text", learnt), ("forgotten on the general text", forgotten)):
        if not found.is_positive:
            return (
                f"what the adapter has {what} is not told from noise on the {found.sequences} sequences held apart: "
                f"{found.value:.4f} ± {found.error:.4f} nats a token"
            )
    return ""
