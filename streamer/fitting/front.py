"""Trade what is forgotten against what is kept: models of both as functions of the coefficients, and the points of least forgetting.

With G(c) what is lost on the general text and T(c) what is lost on the task's, the coefficients ``c(μ) = argmin G(c) + μ T(c)`` over
``[0, 1]^P`` are those that forget least among all that keep as much: the front. Every gradient taken of G or T, for whichever μ, improves
its model, and the models serve every μ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from streamer.fitting.quadratic import Curvature, Floats, dot, minimize_in_box, secant_curvature

PROXIMITY = 0.2
"""Share of the curvature's diagonal that is added to it, around the point that a model begins from: a few secants tell too little of the
directions between them, and a step that is too short costs less than one too long."""

LOG_RANGE = 14.0
"""Weights μ are looked for between exp(−14) and exp(14) times the ratio of what the two texts can lose."""

LOG_STEP = 1e-8
"""Precision of log μ."""


@dataclass(frozen=True)
class Sample:
    """A function's value and gradient at a point: (P,)."""

    point: Floats
    value: float
    gradient: Floats


MISSED, EXCEEDED = 0.01, 0.03
"""A point that keeps less than was wanted by more than the one has missed it; one that keeps more by more than the other forgets more than
was asked for."""


@dataclass(frozen=True)
class FrontPoint:
    """A point of the front.

    Attributes
    ----------
    weight
        μ.
    coefficients
        c(μ): (P,).
    kept
        What the models expect to be kept of the learning on the text that they were made from; once it was measured, that.
    loss
        Mean loss on the general text, once it was measured.
    """

    weight: float
    coefficients: Floats
    kept: float
    loss: float = float("nan")


@dataclass(frozen=True)
class Front:
    """Models of G and T from samples of each, and their front.

    Attributes
    ----------
    general
        Samples of G; among them those at c = 0 and c = 1.
    task
        Samples of T, likewise.
    """

    general: Sequence[Sample]
    task: Sequence[Sample]
    _solutions: dict[float, Floats] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def general_curvature(self) -> Curvature:
        """Model the curvature of G."""
        return secant_curvature([s.point for s in self.general], [s.gradient for s in self.general])

    @cached_property
    def task_curvature(self) -> Curvature:
        """Model the curvature of T."""
        return secant_curvature([s.point for s in self.task], [s.gradient for s in self.task])

    def anchors(self, weight: float) -> tuple[Sample, Sample]:
        """Choose the samples of G and T that the models of ``G + μ T`` begin from: the best point where both were sampled.

        Before there is one inside the bounds, G's model begins from c = 0 and T's from c = 1, where KL divergences have their minima.
        """
        task = {s.point.tobytes(): s for s in self.task}
        both = [(g, task[g.point.tobytes()]) for g in self.general if g.point.tobytes() in task]
        inside = [(g, t) for g, t in both if 0 < g.point.mean() < 1]
        if inside:
            return min(inside, key=lambda pair: pair[0].value + weight * pair[1].value)
        return _at(self.general, 0.0), _at(self.task, 1.0)

    def curvature(self, weight: float) -> Curvature:
        """Model the curvature of ``G + μ T``."""
        return self.general_curvature.plus(self.task_curvature, weight)

    def coefficients(self, weight: float) -> Floats:
        """Minimise the models' ``G + μ T`` between the bounds."""
        if weight not in self._solutions:
            g, t = self.anchors(weight)
            A = self.curvature(weight)
            slope = g.gradient + weight * (t.gradient + self.task_curvature @ (g.point - t.point))
            if np.array_equal(g.point, t.point):
                A = A.plus(Curvature.of_diagonal(A.diagonal), PROXIMITY)
            self._solutions[weight] = minimize_in_box(A, slope, g.point)
        return self._solutions[weight]

    def kept(self, weight: float, coefficients: Floats) -> float:
        """Expect what is kept: ``(T(0) − T(c)) / (T(0) − T(1))``, T(c) by its model."""
        anchor = self.anchors(weight)[1]
        zero, one = _at(self.task, 0.0), _at(self.task, 1.0)
        first = anchor is one
        # A model that knows c = 1 alone may be far from T(0): its own value there makes shares of 0 and 1 at both ends.
        nothing = self._task_value(anchor, zero.point) if first else zero.value
        return (nothing - self._task_value(anchor, coefficients)) / max(nothing - one.value, 1e-300)

    def at(self, kept: float) -> FrontPoint:
        """Find the point of the front where the models expect this share of the learning to be kept."""
        from scipy.optimize import brentq

        ratio = _range(self.general) / max(_range(self.task), 1e-300)

        def missing(log_weight: float) -> float:
            weight = ratio * float(np.exp(log_weight))
            return kept - self.kept(weight, self.coefficients(weight))

        low, high = -LOG_RANGE, LOG_RANGE
        if missing(low) <= 0:
            high = low
        elif missing(high) < 0:
            high = brentq(missing, low, high, xtol=LOG_STEP)
        weight = ratio * float(np.exp(high))
        c = self.coefficients(weight)
        return FrontPoint(weight, c, self.kept(weight, c))

    def distance(self, point: FrontPoint) -> float:
        """Measure how far a point is from all those that were sampled: the least ``(c − x)ᵀ A (c − x)``, x such a one."""
        A = self.curvature(point.weight)
        steps = [point.coefficients - s.point for s in self.general]
        return min(dot(d, A @ d) for d in steps)

    def _task_value(self, anchor: Sample, coefficients: Floats) -> float:
        d = coefficients - anchor.point
        return anchor.value + dot(anchor.gradient, d) + 0.5 * dot(d, self.task_curvature @ d)


def choices(
    zero: FrontPoint, candidates: Sequence[FrontPoint], one: FrontPoint, wanted: float
) -> tuple[FrontPoint, ...]:
    """Find points that should keep a share, on lines between measured ones: where the least loss is expected, and between the nearest two.

    Were both functions convex, no less would be kept on a line, and no more lost, than interpolation says, and the first would do. Where
    the loss flattens out, as of an adapter far too strong, a long line promises too much: so both are to be measured; see `best`.

    Parameters
    ----------
    zero, one
        c = 0, with what was measured there, and c = 1, which keeps all. Where c = 0 keeps enough, it is the answer: nothing, if all that
        the adapter brings is deltas.
    candidates
        With what each was measured to keep and to lose. Those that keep too little are ends of lines as well.
    wanted
        The share, in (0, 1).
    """
    if zero.kept >= wanted:
        return (zero,)
    points = [zero, *candidates, one]
    enough, less = [p for p in points if p.kept >= wanted], [p for p in points if p.kept < wanted]
    lines = [_crossing(low, high, wanted, (zero, one)) for low in less for high in enough]
    nearest = max(less, key=lambda p: p.kept), min(enough, key=lambda p: p.kept)
    return min([*lines, *enough], key=lambda p: p.loss), _crossing(*nearest, wanted, (zero, one))


def best(points: Sequence[FrontPoint], wanted: float) -> int:
    """Choose among measured points the one of least loss that keeps the share, to `MISSED`; else the one that keeps most."""
    enough = [i for i, point in enumerate(points) if point.kept >= wanted - MISSED]
    if enough:
        return min(enough, key=lambda i: points[i].loss)
    return max(range(len(points)), key=lambda i: points[i].kept)


def _crossing(low: FrontPoint, high: FrontPoint, wanted: float, ends: tuple[FrontPoint, FrontPoint]) -> FrontPoint:
    """Interpolate to where a share is kept between a point that keeps less and one that keeps enough."""
    share = (wanted - low.kept) / (high.kept - low.kept)
    nearer = high if (share > 0.5 and high is not ends[1]) or low is ends[0] else low
    c = low.coefficients + share * (high.coefficients - low.coefficients)
    return FrontPoint(nearer.weight, c, wanted, low.loss + share * (high.loss - low.loss))


def _at(samples: Sequence[Sample], value: float) -> Sample:
    return next(s for s in samples if (s.point == value).all())


def _range(samples: Sequence[Sample]) -> float:
    return abs(_at(samples, 1.0).value - _at(samples, 0.0).value)
