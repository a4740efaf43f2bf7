"""Interpolate what a shrink of the whole adapter keeps and forgets between the measured shrinks.

Few shrinks are measured: between their λ, a cubic in λ through the four nearest interpolates. The interpolation is linear in the losses,
so the same weights apply to every loss and every sequence, and errors stay paired.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from streamer.json_types import JsonObject
from streamer.measuring.statistics import (
    Estimate,
    EvaluatedVariant,
    Floats,
    Measured,
    SequenceSums,
    flattened,
)
from streamer.methods import Shrink
from streamer.streaming.variants import ADAPTER_ROW, BASE_ROW

NODES = 4
"""Number of nearest shrinks through which a cubic in λ interpolates."""

EXCESS = 0.002
"""A λ is well placed if it keeps the requested share and at most `EXCESS` more, which is a fraction of the share's standard error."""

LAMBDA_STEPS = 1000
"""A placed λ is a multiple of 1 / LAMBDA_STEPS, so that a command can name it."""

DIGITS = 5
"""The losses of two λ that are closer differ by their rounding, and a curve through both is steep or NaN."""


Verdict = Literal["better", "worse", "not told apart"]


class Node(NamedTuple):
    """A measured shrink: its λ, to `DIGITS` decimals, and its row."""

    mitigation_lambda: float
    row: int


Interval = tuple[Node, Node]
"""Two neighbouring nodes."""


@dataclass(frozen=True)
class ShrinkComparison:
    """A variant's differences from the equal shrink: the whole adapter times the λ that keeps the same share of the learning.

    λ is interpolated, and the errors of the differences are paired; see `ShrinkRecord`.
    """

    mitigation_lambda: float
    between: tuple[float, float]
    loss: Estimate
    kl: Estimate
    top1: Estimate

    @property
    def verdict(self) -> Verdict:
        """Judge the variant by its divergence; only a difference beyond the error counts."""
        if self.kl.is_negative:
            return "better"
        return "worse" if self.kl.is_positive else "not told apart"

    def record(self) -> JsonObject:
        """Make the JSON: `ShrinkRecord`."""
        figures = flattened(loss=self.loss, kl=self.kl, top1=self.top1, verdict=self.verdict)
        return {"lambda": self.mitigation_lambda, "between": list(self.between), **figures}


def against_shrink(measured: Measured, variant: int) -> ShrinkComparison | None:
    """Compare a variant with the shrink that keeps the same share of the learning; see `ShrinkComparison`.

    A variant that keeps more than every measured shrink is compared with the one that keeps most. Return None if the variant is the base,
    the adapter or a shrink, or if the measured shrinks do not enclose its share.

    The error of a difference on general text combines three errors as independent: the difference's own error over sequences; the error
    of the variant's loss on the task's text, times the slope of the general loss against the task's loss along the shrinks; and the
    interpolation's error, estimated by its change without the farthest node.
    """
    if measured.variants[variant].method in (None, Shrink.name):
        return None
    nodes = _by_lambda(measured.variants)
    if len(nodes) < NODES:
        nodes = _from_base(nodes)
    task = measured.task
    losses = task.loss.sum(axis=1)
    target = losses[variant]
    most = min(nodes, key=lambda node: losses[node.row])
    if losses[most.row] - target > 0:  # it keeps more than every shrink
        lam, row = most
        loss = measured.general.mean("loss", variant, row)
        kl = measured.general.mean("kl", variant, row)
        return ShrinkComparison(lam, (lam, lam), loss, kl, task.mean("right", variant, row))
    for low, high in pairwise(nodes):
        if (losses[low.row] - target) * (losses[high.row] - target) <= 0 and len(nodes) > 2:
            return _interpolated(measured, variant, nodes, (low, high))
    return None


def _interpolated(
    measured: Measured, variant: int, nodes: Sequence[Node], between: Interval
) -> ShrinkComparison:
    """Compare a variant with the shrink between two neighbouring nodes that keeps as much."""
    task = measured.task
    losses = task.loss.sum(axis=1)
    near = _nearest(nodes, between)
    lam = _crossing(near, between, losses, losses[variant])
    farthest = max(
        (node for node in near if node not in between),
        key=lambda node: abs(node.mitigation_lambda - lam),
    )
    others = [node for node in near if node != farthest]
    fewer = _interpolator(others, len(losses))(_crossing(others, between, losses, losses[variant]))
    curve = _interpolator(near, len(losses))
    shrink = curve(lam)
    slope = curve.derivative(lam)
    difference = np.eye(len(losses))[variant] - shrink
    share_error = task.of("loss", difference).error
    task_slope = task.of("loss", slope).value

    def estimate(sums: SequenceSums, name: str) -> Estimate:
        found = sums.of(name, difference)
        from_share = sums.of(name, slope).value / task_slope * share_error
        interpolated = sums.of(name, shrink - fewer).value
        error = math.hypot(found.error, from_share, interpolated)
        return Estimate(found.value, error, found.sequences)

    low, high = between
    ends = (low.mitigation_lambda, high.mitigation_lambda)
    loss = estimate(measured.general, "loss")
    kl = estimate(measured.general, "kl")
    return ShrinkComparison(lam, ends, loss, kl, estimate(task, "right"))


def lambda_to_place(measured: Measured, keep: float) -> float | None:
    """Choose the λ of a shrink that keeps a share of the learning and little more, by interpolation between the measured shrinks.

    Returns
    -------
    float or None
        λ, rounded up; None if a measured shrink is well placed, none was measured, or none keeps the share.
    """
    nodes = [node for node in _by_lambda(measured.variants) if 0 <= node.mitigation_lambda <= 1]
    if len(nodes) < 2:
        return None
    nodes = _from_base(nodes)
    kept = np.zeros(len(measured.variants))
    for node in nodes:
        kept[node.row] = measured.task.share("loss", node.row).value
    least, *_ = nodes
    high = next((node for node in nodes if kept[node.row] >= keep), least)
    above = float(kept[high.row]) - keep
    if high is least or above <= EXCESS:
        return None
    between = (nodes[nodes.index(high) - 1], high)
    target = keep + min(EXCESS, above) / 2
    lam = rounded_up(_crossing(_nearest(nodes, between), between, kept, target))
    return lam if lam < high.mitigation_lambda else None


def rounded_up(lam: float) -> float:
    """Round λ up to a multiple of 1 / `LAMBDA_STEPS`, so that no less is kept."""
    return math.ceil(lam * LAMBDA_STEPS - 1e-6) / LAMBDA_STEPS


def _by_lambda(variants: Sequence[EvaluatedVariant]) -> list[Node]:
    """List the shrinks in order of λ, including the unchanged adapter; of equal λ, one."""
    rows = {
        round(variant.mitigation_lambda, DIGITS): row
        for row, variant in enumerate(variants)
        if variant.method == Shrink.name and variant.mitigation_lambda is not None
    }
    return [Node(*item) for item in sorted({**rows, 1.0: ADAPTER_ROW}.items())]


def _from_base(nodes: list[Node]) -> list[Node]:
    """Let the base stand for the shrink by 0: an approximation, as an adapter may have more than deltas."""
    return [Node(0.0, BASE_ROW), *nodes] if nodes[0].mitigation_lambda > 0 else nodes


def _nearest(nodes: Sequence[Node], between: Interval) -> Sequence[Node]:
    """Choose the nodes nearest to an interval."""
    low, _ = between
    first = max(0, min(nodes.index(low) - (NODES - 2) // 2, len(nodes) - NODES))
    return nodes[first : first + NODES]


def _crossing(nodes: Sequence[Node], between: Interval, losses: Floats, target: float) -> float:
    """Find the λ between two neighbouring nodes at which the interpolated loss equals the target."""
    from scipy.optimize import brentq

    known = {node.mitigation_lambda: losses[node.row] for node in nodes}
    curve = _interpolator(nodes, len(losses))

    def above(lam: float) -> float:
        return float(known[lam] if lam in known else curve(lam) @ losses) - target

    return float(brentq(above, *(node.mitigation_lambda for node in between)))


def _interpolator(nodes: Sequence[Node], count: int) -> Any:
    """Return the polynomial in λ whose values, weights of the variants (count,), interpolate any of their sums."""
    from scipy.interpolate import KroghInterpolator

    lambdas = [node.mitigation_lambda for node in nodes]
    return KroghInterpolator(lambdas, np.eye(count)[[node.row for node in nodes]])
