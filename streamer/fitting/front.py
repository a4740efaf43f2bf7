"""Balance forgetting against learning kept: model both as functions of the coefficients, and find the points of least forgetting.

Let G(c) be what is lost on the general text and T(c) what is lost on the task's. The coefficients ``c(μ) = argmin G(c) + μ T(c)`` over
``[0, 1]^P`` forget least among all that keep as much: they form the front. Every gradient of G or T, for any μ, improves its model, and the
models serve every μ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from streamer.fitting.quadratic import Curvature, Floats, dot, minimize_in_box, secant_curvature

PROXIMITY = 0.2
"""Share of the curvature's diagonal that is added to it around the model's starting point: a few secants say too little about the
directions between them, and a step that is too short costs less than one that is too long."""

LOG_RANGE = 14.0
"""Weights μ are searched between exp(−14) and exp(14) times the ratio of the two texts' possible losses."""

LOG_STEP = 1e-8
"""Precision of log μ."""


@dataclass(frozen=True)
class Sample:
    """A function's value and gradient at a point, (P,)."""

    point: Floats
    value: float
    gradient: Floats


MISSED, EXCEEDED = 0.01, 0.03
"""A point misses a share if it keeps less than the share by more than the first number; it exceeds the share, and so forgets more than
necessary, if it keeps more by more than the second."""


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
        Share of the learning that the models predict to be kept on their text; once measured, the measured share.
    loss
        Mean loss on the general text, once measured.
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
        Samples of G, including c = 0 and c = 1.
    task
        Samples of T, including the same points.
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
        """Choose the samples from which the models of ``G + μ T`` start: the best point at which both were sampled.

        If no such point is inside the bounds yet, G's model starts from c = 0 and T's from c = 1, the minima of KL divergences.
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
        """Minimise the models' ``G + μ T`` within the bounds."""
        if weight not in self._solutions:
            g, t = self.anchors(weight)
            A = self.curvature(weight)
            slope = g.gradient + weight * (t.gradient + self.task_curvature @ (g.point - t.point))
            if np.array_equal(g.point, t.point):
                A = A.plus(Curvature.of_diagonal(A.diagonal), PROXIMITY)
            self._solutions[weight] = minimize_in_box(A, slope, g.point)
        return self._solutions[weight]

    def kept(self, weight: float, coefficients: Floats) -> float:
        """Predict the share kept: ``(T(0) − T(c)) / (T(0) − T(1))``, with T(c) from its model."""
        anchor = self.anchors(weight)[1]
        zero, one = _at(self.task, 0.0), _at(self.task, 1.0)
        first = anchor is one
        # A model that knows only c = 1 may be far from T(0): with its own value there, the shares are 0 and 1 at the ends.
        nothing = self._task_value(anchor, zero.point) if first else zero.value
        return (nothing - self._task_value(anchor, coefficients)) / max(nothing - one.value, 1e-300)

    def at(self, kept: float) -> FrontPoint:
        """Find the point of the front at which the models predict that this share of the learning is kept."""
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
        """Compute the distance of a point from the sampled points: the least ``(c − x)ᵀ A (c − x)`` over the samples x."""
        A = self.curvature(point.weight)
        steps = [point.coefficients - s.point for s in self.general]
        return min(dot(d, A @ d) for d in steps)

    def _task_value(self, anchor: Sample, coefficients: Floats) -> float:
        d = coefficients - anchor.point
        return anchor.value + dot(anchor.gradient, d) + 0.5 * dot(d, self.task_curvature @ d)


def choices(
    zero: FrontPoint, candidates: Sequence[FrontPoint], one: FrontPoint, wanted: float
) -> tuple[FrontPoint, ...]:
    """Find points that should keep a share, on lines between measured ones: one of least expected loss, and one between the nearest two.

    If both functions were convex, then on a line at least as much would be kept and at most as much lost as interpolation predicts, and
    the first point would suffice. If the loss flattens out, as for an adapter that is far too strong, a long line promises too much, so
    both points must be measured; see `best`.

    Parameters
    ----------
    zero, one
        c = 0 with its measurements, and c = 1, which keeps everything. If c = 0 keeps enough, it is the answer: if the adapter consists
        of deltas only, it then keeps nothing of the adapter.
    candidates
        Points with their measured shares and losses. Points that keep too little also serve as ends of lines.
    wanted
        The wanted share, in (0, 1).
    """
    if zero.kept >= wanted:
        return (zero,)
    points = [zero, *candidates, one]
    enough, less = [p for p in points if p.kept >= wanted], [p for p in points if p.kept < wanted]
    lines = [_crossing(low, high, wanted, (zero, one)) for low in less for high in enough]
    nearest = max(less, key=lambda p: p.kept), min(enough, key=lambda p: p.kept)
    return min([*lines, *enough], key=lambda p: p.loss), _crossing(*nearest, wanted, (zero, one))


def best(points: Sequence[FrontPoint], wanted: float) -> int:
    """Choose among measured points the one of least loss that keeps the share to within `MISSED`; else the one that keeps most."""
    enough = [i for i, point in enumerate(points) if point.kept >= wanted - MISSED]
    if enough:
        return min(enough, key=lambda i: points[i].loss)
    return max(range(len(points)), key=lambda i: points[i].kept)


def _crossing(low: FrontPoint, high: FrontPoint, wanted: float, ends: tuple[FrontPoint, FrontPoint]) -> FrontPoint:
    """Interpolate where a share is kept, between a point that keeps less and one that keeps enough."""
    share = (wanted - low.kept) / (high.kept - low.kept)
    nearer = high if (share > 0.5 and high is not ends[1]) or low is ends[0] else low
    c = low.coefficients + share * (high.coefficients - low.coefficients)
    return FrontPoint(nearer.weight, c, wanted, low.loss + share * (high.loss - low.loss))


def _at(samples: Sequence[Sample], value: float) -> Sample:
    return next(s for s in samples if (s.point == value).all())


def _range(samples: Sequence[Sample]) -> float:
    return abs(_at(samples, 1.0).value - _at(samples, 0.0).value)
