"""Drop variants that have lost from a race over the sequences of both texts: an eighth, as much again up to a quarter, a half, all.

A variant is dropped for what no more sequences are likely to change (`Estimate.is_positive`). It

- keeps less than the share asked for; or
- another one excels it on general text, in loss and divergence, and keeps as much: it has the lower loss on the task's text as well, or
  keeps the share asked for and is worth it; or
- it is worse than the shrink of the whole adapter that keeps as much, interpolated (`ShrinkComparison.verdict`).

Of the race's own shrinks one goes on, which keeps the share asked for as nearly as can be told (`placed_shrink`), and milder ones until
that is known to be worth it. Shrinks that the user asked for run on all sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

from streamer.evaluation.shrinks import against_shrink
from streamer.evaluation.suggestion import Trade
from streamer.evaluation.variant_losses import VariantLosses
from streamer.measuring.sequences import ALL, EIGHTHS, of_eighths
from streamer.measuring.statistics import Estimate

FEWEST = 6
"""Sequences of either text that the first round has at least: fewer tell nothing apart."""

WHOLE = (ALL,)
"""The only round of what is no race."""


def rounds_of(counts: Sequence[int]) -> tuple[range, ...]:
    """Divide the eighths of texts of so many sequences into rounds.

    >>> rounds_of([64, 60]), rounds_of([64, 16])
    ((range(0, 1), range(1, 2), range(2, 4), range(4, 8)), (range(0, 4), range(4, 8)))
    """
    ends = [end for end in (1, 2, 4, 8) if end == 8 or min(counts) * end >= FEWEST * len(EIGHTHS)]
    return tuple(range(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True))


def eighths_run(evaluation: VariantLosses, row: int) -> int:
    """Count the eighths of the texts that a variant ran on, from the first."""
    sums = evaluation.task
    ran, count = sums.ran(row), len(sums.tokens)
    return next(n for n in range(len(EIGHTHS), -1, -1) if len(of_eighths(count, range(n))) <= ran)


def lost(evaluation: VariantLosses, row: int, keep: float) -> bool:
    """Test whether a variant has lost."""
    task, general = evaluation.task, evaluation.general
    if _below(task.share(row), keep):
        return True
    if any(_excels(evaluation, other, row, keep) for other in range(1, len(evaluation.variants)) if other != row):
        return True
    compared = against_shrink(evaluation.variants, general, task, row)
    return compared is not None and compared.verdict == "worse"


def _below(share: Estimate, keep: float) -> bool:
    return Estimate(keep - share.value, share.error, share.sequences).is_positive


def _excels(evaluation: VariantLosses, one: int, other: int, keep: float) -> bool:
    """Test whether a variant makes another superfluous."""
    general, task = evaluation.general, evaluation.task
    if not (general.kl_difference(other, one).is_positive and general.loss_difference(other, one).is_positive):
        return False
    if task.loss_difference(other, one).is_positive:
        return True
    share = task.share(one)
    keeps = Estimate(share.value - keep, share.error, share.sequences).is_positive
    return keeps and Trade.of(general, task, one).is_worth_it
