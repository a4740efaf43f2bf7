"""Suggest the variant that forgets least of those that keep what was learned, and compare it with the equal shrink.

What was learned is the fall of the loss on the task's text from the base to the adapter as it is; the share of it that a variant keeps is
where its own loss lies between these. Forgetting is judged by the divergence from the base, ``KL(base ‖ variant)``, on general text: on the
adapters that were tried it ranks variants as the rise of the loss does and tells more of them apart, since it takes each token's whole
distribution and not the one token that the text has. A variant must not be told worse than the adapter by its loss either, nor than the
shrink that keeps as much (`ShrinkComparison.verdict`); and it must be worth it (`Trade`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import numpy as np

from streamer.errors import UsageError
from streamer.evaluation.shrinks import ShrinkComparison, against_shrink, next_shrink
from streamer.measuring.statistics import Estimate, SequenceSums, flat
from streamer.measuring.variants import ADAPTER_ROW, BASE_ROW, EvaluatedVariant
from streamer.methods.shrink import Shrink

Reason = Literal["not learned", "not forgotten", "none better", "not worth it", "forgets least", "a shrink is better"]

WORTH = 0.5
"""A variant is suggested if it regains more than this many nats of general text for each that it gives up of the task's. General text
stands for all that the model is used for besides the task, and the share to keep has said that some of the task may go: so a nat of
general text counts as two of the task's. It is a guard against trades that nobody wants; the share decides the rest."""


@dataclass(frozen=True)
class Trade:
    """What a variant gives up of the task's text, and what it regains on general text, against the adapter as it is, in nats a token."""

    regained: Estimate
    given_up: Estimate

    @classmethod
    def of(cls, general: SequenceSums, task: SequenceSums, variant: int) -> Trade:
        """Estimate that of a variant by its number."""
        return cls(general.loss_difference(ADAPTER_ROW, variant), task.loss_difference(variant, ADAPTER_ROW))

    def record(self, name: str) -> dict[str, Any]:
        """Write it as `TradeRecord`, of the variant of a name."""
        numbers = {**flat("regained", self.regained), **flat("given_up", self.given_up)}
        return {"name": name, **numbers, "worth": WORTH, "worth_it": self.is_worth_it}

    @property
    def is_worth_it(self) -> bool:
        """Test whether it is told that more than `WORTH` times as much is regained as is given up; errors of two texts are independent."""
        error = math.hypot(self.regained.error, WORTH * self.given_up.error)
        few = min(self.regained.sequences, self.given_up.sequences)
        return Estimate(self.regained.value - WORTH * self.given_up.value, error, few).is_positive


@dataclass(frozen=True)
class Suggestion:
    """The variant to use; see `SuggestionRecord`, whose `name`, `method` and `lambda` are those of `variant`.

    Attributes
    ----------
    declined
        The variant that would be suggested, were it worth it.
    """

    variant: EvaluatedVariant | None
    reason: Reason
    keep: float
    least_loss: EvaluatedVariant | None = None
    shrink: ShrinkComparison | None = None
    swapped: bool = False
    declined: EvaluatedVariant | None = None


def check_keep(keep: float) -> None:
    """Refuse what is no share of what was learned."""
    if isinstance(keep, bool) or not isinstance(keep, Real) or not 0 < keep <= 1:
        raise UsageError(f"keep: expected a share in (0, 1], found {keep!r}")


def _keeps(variant: EvaluatedVariant, share: Estimate, keep: float) -> bool:
    """Test whether a variant keeps a share; of one that was fitted to keep it on other text, whether it is not told to keep less."""
    fitted = variant.keep is not None and variant.keep >= keep
    return share.value + (2 * share.error if fitted else 0.0) >= keep


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
    learning = task.loss_difference(BASE_ROW, ADAPTER_ROW)
    if not learning.is_positive:
        return Suggestion(None, "not learned", keep, swapped=learning.is_negative)
    if not general.loss_difference(ADAPTER_ROW, BASE_ROW).is_positive:
        return Suggestion(variants[ADAPTER_ROW], "not forgotten", keep)
    ran = [v for v in range(ADAPTER_ROW, len(variants)) if not task.dropped(v)]
    keeping = [v for v in ran if _keeps(variants[v], task.share(v), keep)]
    forgets_less = [
        v
        for v in keeping
        if general.kl_difference(v, ADAPTER_ROW).is_negative and not general.loss_difference(v, ADAPTER_ROW).is_positive
    ]
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
        if not shrinks or next_shrink(variants, task, keep, loose=True) is not None:
            return Suggestion(None, "a shrink is better", keep, shrink=compared)
        best, compared = min(shrinks, key=lambda v: np.nansum(general.kl[v])), None
    least = min(keeping, key=lambda v: np.nansum(general.loss[v]))
    least_loss = None if least == best else variants[least]
    return Suggestion(variants[best], "forgets least", keep, least_loss, compared)


def front(variants: Sequence[EvaluatedVariant], general: SequenceSums, task: SequenceSums) -> list[int]:
    """List the variants that no other one equals or excels in both loss on the task's text and divergence from the base on general text.

    They come by their loss on the task's text, the lowest first. What was dropped in a race is not among them.
    """
    points = sorted(
        (float(task.loss[v].sum()), float(np.nansum(general.kl[v])), v)
        for v in range(len(variants))
        if not task.dropped(v)
    )
    kept, least = [], math.inf
    for _, kl, v in points:
        if kl < least:
            kept.append(v)
            least = kl
    return kept
