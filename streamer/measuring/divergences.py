"""Count the divergences of tokens in a fixed logarithmic histogram, and estimate quantiles from its counts.

From `LEAST` nats on, each bin ends at `STEP` times its beginning, independent of the data, so that counts of passes and processes add up. A
divergence is represented by the geometric middle of its bin, within 1 %. Below `LEAST`, rounding dominates, and a divergence counts as 0.
"""

from __future__ import annotations

import math
from typing import Annotated, TypedDict

import numpy as np
from numpy.typing import NDArray

from streamer.json_types import Count

Floats = NDArray[np.float64]

LEAST, MOST, STEP = 1e-9, 1e6, 1.02

BINS = 2 + math.floor(math.log(MOST / LEAST) / math.log(STEP))
"""Number of bins; the first is below `LEAST`, the last contains everything from `MOST` on."""


class BinsRecord(TypedDict):
    """Counts of tokens by their divergence."""

    first: Annotated[
        Count,
        "Number of the first non-empty bin: bin 0 is below 1e-9 nats, bin i begins at 1e-9 * 1.02**(i - 1).",
    ]
    counts: Annotated[list[int], "Counts of this bin and of each one up to the last non-empty bin."]


def counted_bins(divergences: Floats, counted: NDArray[np.bool_]) -> Floats:
    """Count the tokens' divergences (V, …) in bins: (V, BINS).

    Parameters
    ----------
    counted
        Which tokens count, in the shape of one variant's divergences.
    """
    chosen = np.nan_to_num(divergences[:, counted])
    bins = np.floor(np.log(np.clip(chosen, LEAST, MOST) / LEAST) / math.log(STEP)) + (chosen >= LEAST)
    each = bins.astype(np.int64) + BINS * np.arange(len(chosen))[:, None]
    return np.bincount(each.ravel(), minlength=BINS * len(chosen)).reshape(-1, BINS).astype(np.float64)


def quantile(bins: Floats, largest: float, share: float) -> float:
    """Estimate a quantile from the counts of bins (BINS,), linear between the two nearest tokens, as numpy and llama.cpp do.

    Parameters
    ----------
    largest
        The largest divergence, which is known exactly. The result is NaN if this or a count is NaN.
    """
    if math.isnan(largest) or np.isnan(bins).any():
        return math.nan
    ends = np.cumsum(bins)
    tokens = int(ends[-1])
    place = share * (tokens - 1)
    low = int(place)
    ranks = [low, min(low + 1, tokens - 1)]
    values = [
        largest if rank == tokens - 1 else min(largest, _middle(int(np.searchsorted(ends, rank, "right"))))
        for rank in ranks
    ]
    return values[0] + (place - low) * (values[1] - values[0])


def _middle(number: int) -> float:
    return float(LEAST * STEP ** (number - 0.5)) if number else 0.0


def to_record(bins: Floats) -> BinsRecord:
    """Convert the counts of bins (BINS,) to JSON."""
    used = np.flatnonzero(bins)
    first, end = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
    return {"first": first, "counts": [int(n) for n in bins[first:end]]}


def from_record(record: BinsRecord | None) -> Floats:
    """Read the counts that `to_record` made; NaN if the file's version had none."""
    if record is None:
        return np.full(BINS, np.nan)
    first, counts = record["first"], np.array(record["counts"], np.float64)
    return np.pad(counts, (first, BINS - first - len(counts)))  # an error if they begin or end outside
