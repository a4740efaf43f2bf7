"""Compare a variant with the shrink of the whole adapter that keeps the same share, and choose a method's λ to measure next.

Between the measured λ, a cubic in λ through the four nearest interpolates what a shrink keeps and forgets. The interpolation is linear in
the losses, so the same weights apply to every loss and every sequence, and errors stay paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from streamer.measuring.divergences import Floats
from streamer.measuring.statistics import Estimate, SequenceSums
from streamer.measuring.variants import ADAPTER_ROW, BASE_ROW, EvaluatedVariant
from streamer.methods import Shrink

NODES = 4
"""Number of nearest shrinks through which a cubic in λ interpolates."""

EXCESS = 0.002
"""A λ is well placed if it keeps the requested share and at most `EXCESS` more, which is a fraction of the share's standard error."""

LAST = 4
"""If the curve is rough, computed λ fall short of the share. The last λ therefore aims above it by this factor times the shortfall."""

STEPS = 1000
"""A placed λ is a multiple of 1 / STEPS, so that a command can name it."""

Node = tuple[float, int]
"""A variant's λ, to `DIGITS` decimals, and its row."""

DIGITS = 5
"""The losses of two λ that are closer differ by their rounding, and a curve through both is steep or NaN."""


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
    def verdict(self) -> Literal["better", "worse", "not told apart"]:
        """Judge the variant by its divergence; only a difference beyond the error counts."""
        return "better" if self.kl.is_negative else "worse" if self.kl.is_positive else "not told apart"


def against_shrink(
    variants: Sequence[EvaluatedVariant], general: SequenceSums, task: SequenceSums, variant: int
) -> ShrinkComparison | None:
    """Compare a variant with the shrink that keeps the same share of the learning; see `ShrinkComparison`.

    Return None if the variant is the base, the adapter or a shrink, or if the measured shrinks do not enclose its share.

    The error of a difference on general text combines three errors as independent: the difference's own error over sequences; the error
    of the variant's loss on the task's text, times the slope of the general loss against the task's loss along the shrinks; and the
    interpolation's error, estimated by its change without the farthest node.
    """
    if variants[variant].method in (None, Shrink.name):
        return None
    nodes = _by_lambda(variants, Shrink.name)
    if len(nodes) < NODES and nodes[0][0] > 0:
        nodes.insert(0, (0.0, BASE_ROW))  # an approximation if the adapter has more than deltas
    losses = task.loss.sum(axis=1)
    above = [losses[row] - losses[variant] for _, row in nodes]
    at = next((k for k in range(len(nodes) - 1) if above[k] * above[k + 1] <= 0), None)
    if at is None or len(nodes) < 3:
        return None
    between, near = (nodes[at][0], nodes[at + 1][0]), _nearest(nodes, at)
    lam = _crossing(near, between, losses, losses[variant])
    farthest = max((n for n in near if n[0] not in between), key=lambda n: abs(n[0] - lam))
    others = [n for n in near if n != farthest]
    shrink, slope = _weights(near, lam, len(losses))
    fewer, _ = _weights(others, _crossing(others, between, losses, losses[variant]), len(losses))
    own = np.eye(len(variants))[variant]
    matched, by_lambda = task.loss_of(own - shrink).error, task.loss_of(slope).value

    def estimate(of: Callable[[Floats], Estimate]) -> Estimate:
        found, interpolated = of(own - shrink), of(shrink - fewer).value
        return Estimate(
            found.value, math.hypot(found.error, of(slope).value / by_lambda * matched, interpolated), found.sequences
        )

    return ShrinkComparison(lam, between, estimate(general.loss_of), estimate(general.kl_of), estimate(task.top1_of))


def placed(
    variants: Sequence[EvaluatedVariant],
    task: SequenceSums,
    keep: float,
    method: str = Shrink.name,
    last: bool = False,
) -> tuple[int, float | None]:
    """Choose, among a method's measured λ and the adapter, the one that keeps a share of the learning and little more.

    The measured shares are interpolated to find a λ that keeps slightly more than the share; it is rounded up. Repeated measuring is a
    secant method: the nodes move closer, and the interpolation improves.

    Parameters
    ----------
    last
        Whether this is the last λ, which aims above the share by `LAST` times the shortfall of the nearest λ below it.

    Returns
    -------
    row, lambda
        Row of the chosen variant, and a better λ to measure; None if the variant is well placed, if no λ of the method was measured, or if
        all of them keep more than the share.
    """
    nodes = [node for node in _by_lambda(variants, method) if 0 <= node[0] <= 1]
    if len(nodes) < 2:
        return ADAPTER_ROW, None
    if method == Shrink.name and nodes[0][0] > 0:
        nodes.insert(
            0, (0.0, BASE_ROW)
        )  # approximately: an adapter may have more than deltas; what others keep at 0 is unknown
    kept, values = [task.fraction(row).value for _, row in nodes], np.zeros(len(variants))
    values[[row for _, row in nodes]] = kept
    first = next(k for k, share in enumerate(kept) if share >= keep)  # at λ = 1 all is kept
    above = kept[first] - keep
    if first == 0 or above <= EXCESS:
        return nodes[first][1], None
    beyond = max(EXCESS / 2, LAST * (keep - kept[first - 1])) if last else EXCESS / 2
    between = nodes[first - 1][0], nodes[first][0]
    lam = rounded_up(_crossing(_nearest(nodes, first - 1), between, values, keep + min(beyond, above / 2)))
    return nodes[first][1], lam if lam < nodes[first][0] else None


def rounded_up(lam: float) -> float:
    """Round λ up to a multiple of 1 / `STEPS`, so that no less is kept."""
    return math.ceil(lam * STEPS - 1e-6) / STEPS


def _by_lambda(variants: Sequence[EvaluatedVariant], method: str) -> list[Node]:
    """List a method's variants in order of λ, including the unchanged adapter; of equal λ, one."""
    rows = {
        round(lam, DIGITS): row
        for row, v in enumerate(variants)
        if v.method == method and (lam := v.mitigation_lambda) is not None
    }
    return sorted({**rows, 1.0: ADAPTER_ROW}.items())


def _nearest(nodes: Sequence[Node], at: int) -> Sequence[Node]:
    """Choose the nodes nearest to the interval between node `at` and the next."""
    first = max(0, min(at - (NODES - 2) // 2, len(nodes) - NODES))
    return nodes[first : first + NODES]


def _crossing(nodes: Sequence[Node], between: tuple[float, float], losses: Floats, target: float) -> float:
    """Find the λ between two neighbouring nodes at which the interpolated loss equals the target."""
    from scipy.optimize import brentq

    known = {lam: float(losses[row]) for lam, row in nodes}

    def above(lam: float) -> float:
        return (known[lam] if lam in known else float(_weights(nodes, lam, len(losses))[0] @ losses)) - target

    return float(brentq(above, *between))


def _weights(nodes: Sequence[Node], lam: float, count: int) -> tuple[Floats, Floats]:
    """Return the weights of the variants (count,) that interpolate any of their sums at λ, and the weights' derivatives by λ."""
    from scipy.interpolate import KroghInterpolator

    polynomial = KroghInterpolator([node for node, _ in nodes], np.eye(count)[[row for _, row in nodes]])
    weights, slope = polynomial(lam), polynomial.derivative(lam)
    return weights, slope
