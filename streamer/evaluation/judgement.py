"""Suggest a variant: the one that forgets least among those that keep enough of the learning and are worth it.

It must also not diverge more than the shrink of the whole adapter that keeps the same share (`ShrinkComparison`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from streamer.errors import UsageError
from streamer.evaluation.curve import ShrinkComparison, against_shrink, lambda_to_place
from streamer.json_types import JsonObject
from streamer.measuring.statistics import (
    Estimate,
    EvaluatedVariant,
    Measured,
    SequenceSums,
    flattened,
)
from streamer.methods import Shrink
from streamer.options import SHARE
from streamer.streaming.variants import ADAPTER_ROW, BASE_ROW

Reason = Literal[
    "not learned",
    "not forgotten",
    "none better",
    "not worth it",
    "forgets least",
    "a shrink is better",
]

WORTH = 0.5
"""Nats of divergence on general text that a suggested variant must regain, at least, for each nat of loss that it gives up on the task's.
General text represents every other use of the model, and the share to keep already permits some loss on the task; so one nat on general
text counts as two on the task's. This guards against trades that nobody wants; the share decides the rest."""


@dataclass(frozen=True)
class Trade:
    """What a variant regains of the divergence and gives up on the task's text, relative to the unchanged adapter, in nats per token."""

    name: str
    regained: Estimate
    given_up: Estimate

    @classmethod
    def of(cls, measured: Measured, row: int) -> Trade:
        """Estimate the trade of a variant."""
        regained = measured.general.mean("kl", ADAPTER_ROW, row)
        given_up = measured.task.mean("loss", row, ADAPTER_ROW)
        return cls(measured.variants[row].name, regained, given_up)

    @property
    def worth_it(self) -> bool:
        """Test whether the gain exceeds `WORTH` times the loss beyond the error; the errors of the two texts are independent."""
        value = self.regained.value - WORTH * self.given_up.value
        error = math.hypot(self.regained.error, WORTH * self.given_up.error)
        few = min(self.regained.sequences, self.given_up.sequences)
        return Estimate(value, error, few).is_positive

    def record(self) -> JsonObject:
        """Make the JSON: `TradeRecord`."""
        return flattened(**vars(self), worth=WORTH, worth_it=self.worth_it)


@dataclass(frozen=True)
class Suggestion:
    """The variant to use; `SuggestionRecord` explains the attributes and describes `variant` by name, method and lambda.

    Attributes
    ----------
    shrink
        The comparison of the variant, or of one that is worse than a shrink, with the shrink that keeps as much.
    trade
        The trade of the variant, or of the one that was not suggested only because it is not worth it.
    """

    variant: EvaluatedVariant | None
    reason: Reason
    keep: float
    shrink: ShrinkComparison | None = None
    swapped: bool = False
    trade: Trade | None = None


def ask_swapped(task: SequenceSums) -> str:
    """Ask whether the texts are swapped, because the adapter has a higher loss on the task's text than the base."""
    loss = task.change
    return f"the adapter's loss on the task's text is above the base's, by {loss.value:.4f} ± {loss.error:.4f}: are the two texts swapped?"


def suggest(measured: Measured, keep: float) -> Suggestion:
    """Suggest the variant that forgets least among those that keep this share of the learning; see `Suggestion`.

    Raises
    ------
    UsageError
        If `keep` is not in (0, 1].
    """
    if not SHARE.holds(keep):
        raise UsageError(f"keep: expected {SHARE.words}, found {keep!r}")
    variants = measured.variants
    general = measured.general
    learned = measured.task.change
    adapter = variants[ADAPTER_ROW]
    if not learned.is_negative:
        return Suggestion(None, "not learned", keep, swapped=learned.is_positive)
    if not general.mean("kl", ADAPTER_ROW, BASE_ROW).is_positive:
        return Suggestion(adapter, "not forgotten", keep)

    def least(rows: Sequence[int]) -> int:
        return min(rows, key=lambda row: np.nansum(general.kl[row]))

    forgets_less = [
        row
        for row in range(ADAPTER_ROW, len(variants))
        if _share_kept(measured, row, keep) >= keep
        and general.mean("kl", row, ADAPTER_ROW).is_negative
    ]
    if not forgets_less:
        return Suggestion(adapter, "none better", keep)
    worth_it = [row for row in forgets_less if Trade.of(measured, row).worth_it]
    if not worth_it:
        trade = Trade.of(measured, least(forgets_less))
        return Suggestion(adapter, "not worth it", keep, trade=trade)
    best = least(worth_it)
    comparison = against_shrink(measured, best)
    if comparison is not None and comparison.verdict == "worse":
        shrinks = [row for row in worth_it if variants[row].method == Shrink.name]
        if not shrinks or lambda_to_place(measured, keep) is not None:
            return Suggestion(None, "a shrink is better", keep, comparison)
        best = least(shrinks)
        comparison = None
    return Suggestion(
        variants[best], "forgets least", keep, comparison, trade=Trade.of(measured, best)
    )


def _share_kept(measured: Measured, row: int, keep: float) -> float:
    """Return the share that a variant keeps; if it was fitted to keep it on other text, two standard errors more."""
    share = measured.task.share("loss", row)
    fitted = measured.variants[row].keep
    return share.value + (2 * share.error if fitted is not None and fitted >= keep else 0.0)
