"""Compare a variant with the shrink of the whole adapter that keeps as much, and choose the λ of the shrink to measure next.

What a shrink keeps and forgets between the measured λ is interpolated by a cubic in λ through the four nearest. The interpolation is linear
in the losses, so its weights serve every loss and every sequence, and errors stay paired.
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
from streamer.methods.shrink import Shrink

NODES = 4
"""Shrinks that an interpolation is made from, the nearest ones: a cubic in λ."""

EXCESS, MOST_EXCESS = 0.002, 0.03
"""A shrink is well placed if it keeps the share asked for, and at most this much more: a fraction of the share's standard error. In a
race it may be thrice `ERRORS` standard errors more, up to the second number."""

ERRORS = 1.5
"""A race aims by so many standard errors beyond the share: what is kept of all sequences is not known when it places a shrink."""

LAST = 4
"""Where the curve is rough, the λ computed fall short of the share. The last one aims beyond it by so many times what is missing."""

STEPS = 1000
"""The λ that is placed is a multiple of 1 / STEPS, so that a command can name it."""

Node = tuple[float, int]
"""λ of a shrink, and its row."""


@dataclass(frozen=True)
class ShrinkComparison:
    """A variant against the equal shrink: the whole adapter times λ, with λ such that it keeps the same share of what was learned.

    See `ShrinkRecord`: λ is interpolated, and the errors of both differences are paired.
    """

    mitigation_lambda: float
    between: tuple[float, float]
    loss: Estimate
    kl: Estimate
    top1: Estimate

    @property
    def verdict(self) -> Literal["better", "worse", "not told apart"]:
        """Say whether the variant is better by both measures, or worse by its loss, or by its divergence with a loss that is not better.

        Only differences beyond the error count. The two are not symmetric: *better* is a claim, which one measure must not make against
        the other, and *worse* is a doubt. Forgetting is a loss, so what has a higher one than a shrink forgets more, whatever else it has.
        """
        if self.loss.is_negative:
            return "better" if self.kl.is_negative else "not told apart"
        return "worse" if self.loss.is_positive or self.kl.is_positive else "not told apart"


def against_shrink(
    variants: Sequence[EvaluatedVariant], general: SequenceSums, task: SequenceSums, variant: int
) -> ShrinkComparison | None:
    """Compare a variant with the shrink that keeps the same share of what was learned; see `ShrinkComparison`.

    Three things are uncertain of a difference on general text, and add up as independent ones do: its own error over sequences; the error
    of the variant's loss on the task's text, times the slope of the one loss against the other along the shrink; and the interpolation,
    by how much it changes without the farthest of its nodes.
    """
    if variants[variant].method in (None, Shrink.name):
        return None
    ran = np.isfinite(task.loss[variant])
    nodes = [node for node in _shrinks(variants) if task.ran(node[1]) >= ran.sum()]
    if len(nodes) < NODES and nodes[0][0] > 0:
        nodes.insert(0, (0.0, BASE_ROW))  # nearly, if the adapter brings more than deltas
    losses = np.nan_to_num(task.loss[:, ran].sum(axis=1))
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


def next_shrink(
    variants: Sequence[EvaluatedVariant], task: SequenceSums, keep: float, last: bool = False, loose: bool = False
) -> float | None:
    """Choose the λ of the shrink to measure next, so that one is measured that keeps a share of what was learned and little more.

    λ is where the shares that were measured say that a little more than that is kept, rounded up. Measuring it and asking again is a secant
    rule: the nodes come ever nearer, and with them the interpolation. See `placed_shrink` for the options.

    Returns
    -------
    float or None
        None if such a shrink was measured already, or no shrink at all.
    """
    return placed_shrink(variants, task, keep, last, loose)[1]


def placed_shrink(
    variants: Sequence[EvaluatedVariant], task: SequenceSums, keep: float, last: bool = False, loose: bool = False
) -> tuple[int, float | None]:
    """Choose of the shrinks that were measured, the adapter among them, the one that keeps a share of what was learned and little more.

    As long as only a part of the sequences has run, what is kept of all of them may be another share, by about the error that it will have
    at the end. So it is aimed by `ERRORS` of these beyond the share, and a shrink is well placed that keeps as much less.

    Parameters
    ----------
    last
        Whether this is the last λ: it goes beyond the share by some times what the nearest shrink below falls short of it.
    loose
        Whether it may keep as much more as in a race, and so spare another.

    Returns
    -------
    row, lambda
        Its number, and the λ of a better one that is to be measured; None if it is well placed, or if no shrink is wanted.
    """
    shrinks = [node for node in _shrinks(variants) if 0 <= node[0] <= 1]
    if len(shrinks) < 2:
        return ADAPTER_ROW, None
    nodes = [node for node in shrinks if not task.dropped(node[1])]
    if nodes[0][0] > 0:  # what a shrink to nothing keeps is a guess: an adapter may bring more than deltas
        nodes.insert(0, (0.0, BASE_ROW))
    shares, values = [task.share(row) for _, row in nodes], np.zeros(len(variants))
    values[[row for _, row in nodes]] = [share.value for share in shares]
    whole = len(task.tokens)
    errors = [ERRORS * share.error * math.sqrt(share.sequences / whole) for share in shares]
    apart = [0.0 if share.sequences == whole else error for share, error in zip(shares, errors, strict=True)]
    first = next(k for k, share in enumerate(shares) if share.value >= keep - apart[k])  # at λ = 1 all is kept
    above = shares[first].value - keep
    if first == 0 or above <= max(EXCESS, loose * min(MOST_EXCESS, 3 * errors[first])):
        return nodes[first][1], None
    beyond = max(EXCESS / 2, LAST * (keep - shares[first - 1].value)) if last else EXCESS / 2 + apart[first - 1]
    lam = rounded_up(
        _crossing(
            _nearest(nodes, first - 1), (nodes[first - 1][0], nodes[first][0]), values, keep + min(beyond, above / 2)
        )
    )
    return nodes[first][1], lam if lam < nodes[first][0] else None


def rounded_up(lam: float) -> float:
    """Round λ up to a multiple of 1 / `STEPS`: more is kept, not less."""
    return math.ceil(lam * STEPS - 1e-6) / STEPS


def _shrinks(variants: Sequence[EvaluatedVariant]) -> list[Node]:
    """List the shrinks by λ, the adapter as it is among them."""
    nodes = [(1.0, ADAPTER_ROW)]
    nodes += [(v.mitigation_lambda, i) for i, v in enumerate(variants)
              if v.method == Shrink.name and v.mitigation_lambda is not None]  # fmt: skip
    return sorted(nodes)


def _nearest(nodes: Sequence[Node], at: int) -> Sequence[Node]:
    """Choose the nodes that are nearest to the interval between number `at` and the next."""
    first = max(0, min(at - (NODES - 2) // 2, len(nodes) - NODES))
    return nodes[first : first + NODES]


def _crossing(nodes: Sequence[Node], between: tuple[float, float], losses: Floats, target: float) -> float:
    """Find the λ between two neighbouring nodes at which the interpolated loss is the target."""
    from scipy.optimize import brentq

    known = {lam: float(losses[row]) for lam, row in nodes}

    def above(lam: float) -> float:
        return (known[lam] if lam in known else float(_weights(nodes, lam, len(losses))[0] @ losses)) - target

    return float(brentq(above, *between))


def _weights(nodes: Sequence[Node], lam: float, count: int) -> tuple[Floats, Floats]:
    """Return a shrink as weights of the variants (count,), which interpolate any sum of theirs, and the derivative of these by λ."""
    from scipy.interpolate import KroghInterpolator

    polynomial = KroghInterpolator([node for node, _ in nodes], np.eye(count)[[row for _, row in nodes]])
    weights, slope = polynomial(lam), polynomial.derivative(lam)
    return weights, slope
