"""Format the effect of coefficients on intruders, for the table of findings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from streamer.cli.layout import Column

if TYPE_CHECKING:
    from streamer.detection.findings_records import CoefficientMeans, CoefficientTotals


def mean_columns(means: Sequence[CoefficientMeans]) -> list[Column]:
    """Make the columns of mean coefficients, one row for each matrix."""
    about = "mean coefficient of the intruders' parts; 1 keeps them unchanged"
    return [
        Column("c intr.", [_mean(m["intruders_mean"]) for m in means], about, priority=8),
        Column("c all", [_mean(m["mean"]) for m in means], "mean coefficient of the whole delta", priority=8),
    ]


def mean_line(totals: CoefficientTotals) -> str:
    """State in one line how much the coefficients leave of all intruders and of all deltas."""
    whole = f"the coefficients to keep {100 * totals['keep']:g}% leave {_mean(totals['mean'])} of the delta"
    if totals["intruders_mean"] is None:
        return f"{whole}, on average by energy; there are no intruders"
    return f"{whole} and {_mean(totals['intruders_mean'])} of the intruders in it, on average by energy"


def _mean(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
