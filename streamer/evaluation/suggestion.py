"""Suggest the variant that forgets least among all that keep enough of the learning, and compare it with the equal shrink.

The learning is the fall of the loss on the task's text from the base to the unchanged adapter. A variant keeps the share
``(base − variant) / (base − adapter)`` of it. Forgetting is the divergence from the base, ``KL(base ‖ variant)``, on general text. The
loss on that text is shown but decides nothing: instruction-tuned and quantized bases often gain on plain text, whatever they forget, and
on other bases divergence ranks variants as the loss does, but separates more of them. A suggested variant must also be worth it (`Trade`),
and must not diverge more than the shrink that keeps the same share (`ShrinkComparison`).

Compare a variant with the shrink of the whole adapter that keeps the same share, and choose the λ of a shrink to measure next.

Between the measured λ, a cubic in λ through the four nearest interpolates what a shrink keeps and forgets. The interpolation is linear in
the losses, so the same weights apply to every loss and every sequence, and errors stay paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import numpy as np

from streamer.errors import UsageError
from streamer.measuring.result_file import ADAPTER_ROW, BASE_ROW, EvaluatedVariant
from streamer.measuring.statistics import Estimate, Floats, SequenceSums, flat
from streamer.methods import Shrink

NODES = 4
"""Number of nearest shrinks through which a cubic in λ interpolates."""

EXCESS = 0.002
"""A λ is well placed if it keeps the requested share and at most `EXCESS` more, which is a fraction of the share's standard error."""

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

    A variant that keeps more than every measured shrink is compared with the one that keeps most. Return None if the variant is the base,
    the adapter or a shrink, or if the measured shrinks do not enclose its share.

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
    if nodes and min(above) > 0:  # it keeps more than every shrink
        lam, row = min(nodes, key=lambda node: losses[node[1]])
        differences = (general.loss_difference(variant, row), general.kl_difference(variant, row))
        return ShrinkComparison(lam, (lam, lam), *differences, task.mean(task.right[variant] - task.right[row]))
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


def placed(variants: Sequence[EvaluatedVariant], task: SequenceSums, keep: float) -> float | None:
    """Choose the λ of a shrink that keeps a share of the learning and little more, by interpolation between the measured shrinks.

    Returns
    -------
    float or None
        λ, rounded up; None if a measured shrink is well placed, or none was measured.
    """
    nodes = [node for node in _by_lambda(variants, Shrink.name) if 0 <= node[0] <= 1]
    if len(nodes) < 2:
        return None
    if nodes[0][0] > 0:
        nodes.insert(0, (0.0, BASE_ROW))  # approximately: an adapter may have more than deltas
    kept, values = [task.fraction(row).value for _, row in nodes], np.zeros(len(variants))
    values[[row for _, row in nodes]] = kept
    first = next(k for k, share in enumerate(kept) if share >= keep)  # at λ = 1 all is kept
    above = kept[first] - keep
    if first == 0 or above <= EXCESS:
        return None
    between = nodes[first - 1][0], nodes[first][0]
    lam = rounded_up(_crossing(_nearest(nodes, first - 1), between, values, keep + min(EXCESS / 2, above / 2)))
    return lam if lam < nodes[first][0] else None


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


Reason = Literal["not learned", "not forgotten", "none better", "not worth it", "forgets least", "a shrink is better"]

WORTH = 0.5
"""Nats of divergence on general text that a suggested variant must regain, at least, for each nat of loss that it gives up on the task's.
General text represents every other use of the model, and the share to keep already permits some loss on the task; so one nat on general
text counts as two on the task's. This guards against trades that nobody wants; the share decides the rest."""


@dataclass(frozen=True)
class Trade:
    """What a variant regains of the divergence and gives up on the task's text, relative to the unchanged adapter, in nats per token."""

    regained: Estimate
    given_up: Estimate

    @classmethod
    def of(cls, general: SequenceSums, task: SequenceSums, variant: int) -> Trade:
        """Estimate the trade of the variant with this row number."""
        return cls(general.kl_difference(ADAPTER_ROW, variant), task.loss_difference(variant, ADAPTER_ROW))

    def record(self, name: str) -> dict[str, Any]:
        """Make the `TradeRecord` of the variant with this name."""
        numbers = {**flat("regained", self.regained), **flat("given_up", self.given_up)}
        return {"name": name, **numbers, "worth": WORTH, "worth_it": self.is_worth_it}

    @property
    def is_worth_it(self) -> bool:
        """Test whether the gain exceeds `WORTH` times the loss beyond the error; the errors of the two texts are independent."""
        error = math.hypot(self.regained.error, WORTH * self.given_up.error)
        few = min(self.regained.sequences, self.given_up.sequences)
        return Estimate(self.regained.value - WORTH * self.given_up.value, error, few).is_positive


@dataclass(frozen=True)
class Suggestion:
    """The variant to use; `SuggestionRecord` explains the attributes and describes `variant` by name, method and lambda.

    Attributes
    ----------
    declined
        The variant that was not suggested only because it is not worth it.
    """

    variant: EvaluatedVariant | None
    reason: Reason
    keep: float
    shrink: ShrinkComparison | None = None
    swapped: bool = False
    declined: EvaluatedVariant | None = None


def ask_swapped(task: SequenceSums) -> str:
    """Ask whether the texts are swapped, because the adapter has a higher loss on the task's text than the base."""
    loss = task.loss_difference(ADAPTER_ROW, BASE_ROW)
    return f"the adapter's loss on the task's text is above the base's, by {loss.value:.4f} ± {loss.error:.4f}: are the two texts swapped?"


def check_keep(keep: float) -> None:
    """Refuse a share to keep that is not a number in (0, 1]."""
    if isinstance(keep, bool) or not isinstance(keep, Real) or not 0 < keep <= 1:
        raise UsageError(f"keep: expected a share in (0, 1], found {keep!r}")


def _keeps(variant: EvaluatedVariant, kept: Estimate, keep: float) -> bool:
    """Test whether a variant keeps a share; if it was fitted to keep that share on other text, allow two standard errors."""
    fitted = variant.keep is not None and variant.keep >= keep
    return kept.value + (2 * kept.error if fitted else 0.0) >= keep


def suggest(variants: Sequence[EvaluatedVariant], general: SequenceSums, task: SequenceSums, keep: float) -> Suggestion:
    """Suggest a variant, or say why none is suggested.

    Parameters
    ----------
    keep
        Share of the learning to keep, in (0, 1].

    Raises
    ------
    UsageError
        If `keep` is out of range.
    """
    check_keep(keep)
    learning = task.loss_difference(BASE_ROW, ADAPTER_ROW)
    if not learning.is_positive:
        return Suggestion(None, "not learned", keep, swapped=learning.is_negative)
    if not general.kl_difference(ADAPTER_ROW, BASE_ROW).is_positive:
        return Suggestion(variants[ADAPTER_ROW], "not forgotten", keep)
    keeping = [v for v in range(ADAPTER_ROW, len(variants)) if _keeps(variants[v], task.fraction(v), keep)]
    forgets_less = [v for v in keeping if general.kl_difference(v, ADAPTER_ROW).is_negative]
    if not forgets_less:
        return Suggestion(variants[ADAPTER_ROW], "none better", keep)
    least_kl = min(forgets_less, key=lambda v: np.nansum(general.kl[v]))
    forgets_less = [v for v in forgets_less if Trade.of(general, task, v).is_worth_it]
    if not forgets_less:
        return Suggestion(variants[ADAPTER_ROW], "not worth it", keep, declined=variants[least_kl])
    best = min(forgets_less, key=lambda v: np.nansum(general.kl[v]))
    compared = against_shrink(variants, general, task, best)
    if compared is not None and compared.verdict == "worse":
        shrinks = [v for v in forgets_less if variants[v].method == Shrink.name]
        if not shrinks or placed(variants, task, keep) is not None:
            return Suggestion(None, "a shrink is better", keep, shrink=compared)
        best, compared = min(shrinks, key=lambda v: np.nansum(general.kl[v])), None
    return Suggestion(variants[best], "forgets least", keep, compared)


def front(variants: Sequence[EvaluatedVariant], general: SequenceSums, task: SequenceSums) -> list[int]:
    """List the variants that no other variant equals or beats in both the task's loss and the divergence on general text.

    The order is by loss on the task's text, lowest first.
    """
    points = sorted((float(task.loss[v].sum()), float(np.nansum(general.kl[v])), v) for v in range(len(variants)))
    kept, least = [], math.inf
    for _, kl, v in points:
        if kl < least:
            kept.append(v)
            least = kl
    return kept
