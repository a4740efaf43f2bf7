"""Race variants over growing parts of both texts, an eighth, a quarter, a half, all, and drop the losers after each part.

A variant has lost if one of these is true and further sequences are unlikely to change it (`Estimate.is_positive`):

- It keeps less than the requested share.
- Another variant diverges less. The other also has the lower loss on the task's text, or it keeps the requested share and is worth it.
- It is worse than the interpolated shrink of the whole adapter that keeps the same share (`ShrinkComparison.verdict`).

One of the race's own shrinks goes on: the one that keeps the requested share, as far as is known (`placed`). Milder ones go on until
that shrink is known to be worth it. Shrinks that the user asked for run on all sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

from streamer.evaluation.shrinks import against_shrink
from streamer.evaluation.suggestion import Trade
from streamer.evaluation.variant_losses import VariantLosses
from streamer.measuring.sequences import ALL, EIGHTHS, of_eighths
from streamer.measuring.statistics import Estimate

FEWEST = 6
"""Fewest sequences of a text in the first round; fewer cannot separate variants."""

WHOLE = (ALL,)
"""The single round that runs if there is no race."""


def rounds_of(counts: Sequence[int]) -> tuple[range, ...]:
    """Divide the eighths of texts into rounds, given each text's number of sequences.

    >>> rounds_of([64, 60]), rounds_of([64, 16])
    ((range(0, 1), range(1, 2), range(2, 4), range(4, 8)), (range(0, 4), range(4, 8)))
    """
    ends = [end for end in (1, 2, 4, 8) if end == 8 or min(counts) * end >= FEWEST * len(EIGHTHS)]
    return tuple(range(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True))


def eighths_run(evaluation: VariantLosses, row: int) -> int:
    """Count the eighths of the texts, from the first, on which a variant ran."""
    sums = evaluation.task
    ran, count = sums.ran(row), len(sums.tokens)
    return next(n for n in range(len(EIGHTHS), -1, -1) if len(of_eighths(count, range(n))) <= ran)


def lost(evaluation: VariantLosses, row: int, keep: float) -> bool:
    """Test whether a variant has lost."""
    task, general = evaluation.task, evaluation.general
    if _below(task.fraction(row), keep):
        return True
    if any(_excels(evaluation, other, row, keep) for other in range(1, len(evaluation.variants)) if other != row):
        return True
    compared = against_shrink(evaluation.variants, general, task, row)
    return compared is not None and compared.verdict == "worse"


def _below(kept: Estimate, keep: float) -> bool:
    return Estimate(keep - kept.value, kept.error, kept.sequences).is_positive


def _excels(evaluation: VariantLosses, one: int, other: int, keep: float) -> bool:
    """Test whether variant `one` makes variant `other` superfluous."""
    general, task = evaluation.general, evaluation.task
    if not general.kl_difference(other, one).is_positive:
        return False
    if task.loss_difference(other, one).is_positive:
        return True
    kept = task.fraction(one)
    keeps = Estimate(kept.value - keep, kept.error, kept.sequences).is_positive
    return keeps and Trade.of(general, task, one).is_worth_it
