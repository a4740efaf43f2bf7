"""Suggest the variant that forgets least of those that keep what was learned, and compare it with the equal shrink.

What was learned is the fall of the loss on the task's text from the base to the adapter as it is; the share of it that a variant keeps is
where its own loss lies between these. Forgetting is judged by the divergence from the base, ``KL(base ‖ variant)``, on general text: on the
adapters that were tried it ranks variants as the rise of the loss does and tells more of them apart, since it takes each token's whole
distribution and not the one token that the text has. A variant must not be told worse than the adapter by its loss either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import numpy as np

from streamer.errors import UsageError
from streamer.evaluation.statistics import Estimate, Floats, SequenceSums

BASE_ROW, ADAPTER_ROW = 0, 1
"""Numbers of the first two variants."""

NODES = 4
"""Shrinks that an interpolation is made from, the nearest ones: a cubic in λ."""

BISECTIONS = 50
"""Steps in which λ is found, to the last bit of a double."""

Reason = Literal["not learned", "not forgotten", "none better", "forgets least"]


@dataclass(frozen=True)
class EvaluatedVariant:
    """A model that was evaluated.

    Attributes
    ----------
    name
        ``base``, ``adapter``, or method and λ: ``paper 0.5``; of coefficients the share that they keep: ``fitted 0.9``.
    method, mitigation_lambda
        Method and λ; None for ``base`` and ``adapter``, and λ for ``fitted``.
    keep
        Share of the learning that coefficients were fitted to keep; None where there are none.
    """

    name: str
    method: str | None
    mitigation_lambda: float | None
    keep: float | None = None


@dataclass(frozen=True)
class ShrinkComparison:
    """A variant against the equal shrink: the whole adapter times λ, with λ such that it keeps the same share of what was learned.

    Attributes
    ----------
    mitigation_lambda
        λ of that shrink, interpolated.
    between
        The neighbouring λ that were evaluated; 1 is the adapter as it is.
    loss, kl
        Difference of the mean loss, and of the mean divergence, on general text: below 0 the variant forgets less. The error is paired, and
        has in it what is uncertain about the share kept and the interpolation.
    """

    mitigation_lambda: float
    between: tuple[float, float]
    loss: Estimate
    kl: Estimate

    @property
    def verdict(self) -> Literal["better", "worse", "not told apart"]:
        """Say whether the variant is better or worse by both measures, each by more than its error tells."""
        if self.loss.is_negative and self.kl.is_negative:
            return "better"
        return "worse" if self.loss.is_positive and self.kl.is_positive else "not told apart"


@dataclass(frozen=True)
class Suggestion:
    """The variant to ship.

    Attributes
    ----------
    variant
        None where nothing can be suggested.
    reason
        ``not learned``: the adapter's loss on the task's text is not told below the base's, so that there is nothing to keep. ``not
        forgotten``: its loss on general text is not told above the base's; it is suggested as it is. ``none better``: no variant that
        keeps enough forgets less than the adapter; it is suggested as it is. ``forgets least``: of the variants that keep enough.
    keep
        The share of what was learned that was to be kept.
    least_loss
        The variant that keeps enough and has the least loss on general text, where that is another one.
    shrink
        The variant against the equal shrink; None where it is a shrink itself or the adapter as it is, or where the shrinks that were
        evaluated do not enclose the share that it keeps.
    """

    variant: EvaluatedVariant | None
    reason: Reason
    keep: float
    least_loss: EvaluatedVariant | None = None
    shrink: ShrinkComparison | None = None


def check_keep(keep: float) -> None:
    """Refuse what is no share of what was learned."""
    if isinstance(keep, bool) or not isinstance(keep, Real) or not 0 < keep <= 1:
        raise UsageError(f"keep: expected a share in (0, 1], found {keep!r}")


def suggest(variants: Sequence[EvaluatedVariant], general: SequenceSums, task: SequenceSums, keep: float) -> Suggestion:
    """Suggest a variant.

    Parameters
    ----------
    keep
        Share of what was learned that is to be kept, in (0, 1].

    Raises
    ------
    UsageError
        If `keep` is outside of that.
    """
    check_keep(keep)
    if not task.loss_difference(BASE_ROW, ADAPTER_ROW).is_positive:
        return Suggestion(None, "not learned", keep)
    if not general.loss_difference(ADAPTER_ROW, BASE_ROW).is_positive:
        return Suggestion(variants[ADAPTER_ROW], "not forgotten", keep)
    keeping = [v for v in range(ADAPTER_ROW, len(variants)) if task.share(v).value >= keep]
    forgets_less = [
        v
        for v in keeping
        if general.kl_difference(v, ADAPTER_ROW).is_negative and not general.loss_difference(v, ADAPTER_ROW).is_positive
    ]
    if not forgets_less:
        return Suggestion(variants[ADAPTER_ROW], "none better", keep)
    best = min(forgets_less, key=lambda v: general.kl[v].sum())
    least = min(keeping, key=lambda v: general.loss[v].sum())
    least_loss = None if least == best else variants[least]
    return Suggestion(variants[best], "forgets least", keep, least_loss, against_shrink(variants, general, task, best))


def front(variants: Sequence[EvaluatedVariant], general: SequenceSums, task: SequenceSums) -> list[int]:
    """List the variants that no other one equals or excels in both loss on the task's text and divergence from the base on general text.

    They come by their loss on the task's text, the lowest first.
    """
    points = sorted((float(task.loss[v].sum()), float(general.kl[v].sum()), v) for v in range(len(variants)))
    kept, least = [], math.inf
    for _, kl, v in points:
        if kl < least:
            kept.append(v)
            least = kl
    return kept


def against_shrink(
    variants: Sequence[EvaluatedVariant], general: SequenceSums, task: SequenceSums, variant: int
) -> ShrinkComparison | None:
    """Compare a variant with the shrink that keeps the same share of what was learned; see `ShrinkComparison`.

    The losses of that shrink are interpolated between those of the shrinks that were evaluated, as a cubic in λ through the four nearest.
    Three things are uncertain of a difference on general text, and add up as independent ones do: its own error over sequences; the error
    of the variant's loss on the task's text, times the slope of the one loss against the other along the shrink; and the interpolation,
    by how much it changes without the farthest of its nodes.
    """
    if variants[variant].method in (None, "shrink"):
        return None
    nodes = [(1.0, ADAPTER_ROW)]
    nodes += [
        (v.mitigation_lambda, i)
        for i, v in enumerate(variants)
        if v.method == "shrink" and v.mitigation_lambda is not None
    ]
    nodes.sort()
    losses = [float(task.loss[row].sum() - task.loss[variant].sum()) for _, row in nodes]
    at = next((k for k in range(len(nodes) - 1) if losses[k] * losses[k + 1] <= 0), None)
    if at is None or len(nodes) < 3:
        return None
    between = nodes[at][0], nodes[at + 1][0]
    first = max(0, min(at - (NODES - 2) // 2, len(nodes) - NODES))
    near = nodes[first : first + NODES]
    lam, shrink, slope = _shrink_like(near, between, task, variant)
    farthest = max((n for n in near if n[0] not in between), key=lambda n: abs(n[0] - lam))
    _, fewer, _ = _shrink_like([n for n in near if n != farthest], between, task, variant)
    own = np.eye(len(variants))[variant]
    matched, by_lambda = task.loss_of(own - shrink).error, task.loss_of(slope).value

    def estimate(of: Callable[[Floats], Estimate]) -> Estimate:
        found, interpolated = of(own - shrink), of(shrink - fewer).value
        return Estimate(
            found.value, math.hypot(found.error, of(slope).value / by_lambda * matched, interpolated), found.sequences
        )

    return ShrinkComparison(lam, between, estimate(general.loss_of), estimate(general.kl_of))


def _shrink_like(
    nodes: Sequence[tuple[float, int]], between: tuple[float, float], task: SequenceSums, variant: int
) -> tuple[float, Floats, Floats]:
    """Find the shrink with a variant's loss on the task's text.

    Parameters
    ----------
    nodes
        λ and row of each shrink that is interpolated from.
    between
        The neighbouring λ, between which it lies.

    Returns
    -------
    lambda, weights, slope
        Its λ, and as weights of the variants (V,) any sum of it, and the sum's derivative by λ.
    """
    lambdas, rows = np.array([lam for lam, _ in nodes]), [row for _, row in nodes]
    losses = task.loss.sum(axis=1)

    def weights(lam: float) -> Floats:
        out = np.zeros(len(losses))
        out[rows] = _lagrange(lambdas, lam)
        return out

    low, high = between
    below = weights(low) @ losses < losses[variant]
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if (weights(middle) @ losses < losses[variant]) == below:
            low = middle
        else:
            high = middle
    lam, step = (low + high) / 2, 1e-4
    return lam, weights(lam), (weights(lam + step) - weights(lam - step)) / (2 * step)


def _lagrange(nodes: Floats, at: float) -> Floats:
    """Return the weights of values at the nodes in the polynomial through them, at a point: (n,).

    >>> _lagrange(np.array([0.0, 1.0, 2.0]), 0.5).tolist()
    [0.375, 0.75, -0.125]
    """
    return np.array([np.prod((at - np.delete(nodes, k)) / (x - np.delete(nodes, k))) for k, x in enumerate(nodes)])
