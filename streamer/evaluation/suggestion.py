"""Suggest the variant that forgets least among all that keep enough of the learning, and compare it with the equal shrink.

The learning is the fall of the loss on the task's text from the base to the unchanged adapter. A variant keeps the share
``(base − variant) / (base − adapter)`` of it. Forgetting is the divergence from the base, ``KL(base ‖ variant)``, on general text. The
loss on that text is shown but decides nothing: instruction-tuned and quantized bases often gain on plain text, whatever they forget, and
on other bases divergence ranks variants as the loss does, but separates more of them. A suggested variant must also be worth it (`Trade`),
and must not diverge more than the shrink that keeps the same share (`ShrinkComparison`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import numpy as np

from streamer.errors import UsageError
from streamer.evaluation.shrinks import ShrinkComparison, against_shrink, placed
from streamer.measuring.statistics import Estimate, SequenceSums, flat
from streamer.measuring.variants import ADAPTER_ROW, BASE_ROW, EvaluatedVariant
from streamer.methods import Shrink

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
        if not shrinks or placed(variants, task, keep)[1] is not None:
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
