"""Estimate means over tokens, and their standard errors over sequences, from sums over each sequence.

Tokens of one sequence depend on each other; sequences are assumed independent. Because sequences have different numbers of counted tokens,
a mean over tokens is a ratio of two sums over S sequences. Its standard error is that of the ratio estimator (Cochran, Sampling Techniques,
3rd edition, 1977, chapter 6):

    R = Σ y_s / Σ x_s,        se(R) = √( S / (S − 1) · Σ (y_s − R x_s)² ) / |Σ x_s|

All variants run on the same sequences. A difference between two variants is estimated from the differences on each sequence (paired), in
which most of the variation between sequences cancels.

Count the divergences of tokens in a fixed logarithmic histogram, and estimate quantiles from its counts.

From `LEAST` nats on, each bin ends at `STEP` times its beginning, independent of the data, so that counts of parts add up. A
divergence is represented by the geometric middle of its bin, within 1 %. Below `LEAST`, rounding dominates, and a divergence counts as 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypedDict

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
        Count, "Number of the first non-empty bin: bin 0 is below 1e-9 nats, bin i begins at 1e-9 * 1.02**(i - 1)."
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


MEASURES = ("loss", "kl", "agree", "right", "p_change", "p_square", "kl_max")
"""Arrays with one value for each variant and sequence: sums, and one maximum."""

ARRAYS = (*MEASURES, "kl_bins")
"""All arrays with a row for each variant."""

ANSWERS = ("acc", "acc_norm")
"""Arrays that mark right answers, for each variant and question."""

Effect = Literal["forgets", "improves", "not told"]

QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
"""Quantiles of the divergence that are reported, by name."""

MOST_LOSS = 700.0
"""Largest loss whose perplexity fits in a float."""

LEVEL = 0.975
"""A difference counts as nonzero if it exceeds this quantile of Student's t with S − 1 degrees of freedom, in standard errors: 12.7 for two
sequences, 3.2 for four, 2.1 for sixteen, 2.0 for many."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its standard error over sequences.

    Attributes
    ----------
    value
        The figure.
    error
        Its standard error.
    sequences
        Number of sequences from which both are estimated.
    """

    value: float
    error: float
    sequences: int

    @property
    def is_positive(self) -> bool:
        """Test whether the figure is significantly above zero."""
        return self.value > telling(self.sequences) * self.error

    @property
    def is_negative(self) -> bool:
        """Test whether the figure is significantly below zero."""
        return -self.value > telling(self.sequences) * self.error

    @property
    def divides(self) -> bool:
        """Test whether the figure can be the denominator of a share: it is at least twice as far from zero as significance needs.

        For smaller figures, the ratio estimator understates the error of a share: Fieller's interval is over a third wider.
        """
        return abs(self.value) > 2 * telling(self.sequences) * self.error


def telling(sequences: int) -> float:
    """Return the standard errors beyond which a difference over this many sequences is significant; see `LEVEL`.

    >>> [round(telling(S), 1) for S in (2, 4, 16)]
    [12.7, 3.2, 2.1]
    """
    from scipy.special import stdtrit  # Student's t; scipy.stats takes half a second to import

    return float(stdtrit(sequences - 1, LEVEL))


def ratio(y: Floats, x: Floats) -> Estimate:
    """Estimate ``Σ y / Σ x`` from sums y, x over each sequence: (S,). Sequences with a NaN were not measured and are left out.

    >>> ratio(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0]))
    Estimate(value=2.0, error=0.0, sequences=3)
    """
    both = np.isfinite(y) & np.isfinite(x)
    y, x = y[both], x[both]
    total = float(x.sum())
    if total == 0 or len(x) < 2:
        return Estimate(float("nan"), float("inf"), len(x))
    value = float(y.sum()) / total
    rest = y - value * x
    return Estimate(value, float(np.sqrt(len(x) / (len(x) - 1) * (rest @ rest))) / abs(total), len(x))


def _nothing() -> Floats:
    return np.empty(0)


@dataclass(frozen=True)
class SequenceSums:
    """Sums over the counted tokens of each sequence of a text, for each variant; the first is the base, the second the unchanged adapter.

    Arrays that are not given are NaN.

    Attributes
    ----------
    tokens
        Counted tokens of each sequence: (S,).
    loss
        Sums of the negative log likelihood in nats: (V, S).
    kl
        Sums of the Kullback-Leibler divergence ``KL(base ‖ variant)`` between next-token distributions, in nats: (V, S).
    agree
        Counts of tokens for which the variant's most likely token is the base's: (V, S).
    right
        Counts of tokens for which the variant's most likely token is the text's own: (V, S).
    p_change, p_square
        Sums of the change from the base in the probability of the text's own token, and of its square: (V, S).
    kl_max
        The largest divergence of a token: (V, S).
    kl_bins
        Counts of tokens by divergence over all sequences, see `divergences`: (V, BINS). NaN for questions.
    acc, acc_norm
        For a text of questions, 1 if the answer is right, else 0: (V, S); the other sums are then of the right choices. None for other
        texts.
    """

    tokens: Floats
    loss: Floats
    kl: Floats
    agree: Floats
    right: Floats = field(default_factory=_nothing)
    p_change: Floats = field(default_factory=_nothing)
    p_square: Floats = field(default_factory=_nothing)
    kl_max: Floats = field(default_factory=_nothing)
    kl_bins: Floats = field(default_factory=_nothing)
    acc: Floats | None = None
    acc_norm: Floats | None = None

    def __post_init__(self) -> None:
        for name in ARRAYS[3:]:
            if not getattr(self, name).size:
                shape = (len(self.loss), BINS) if name == "kl_bins" else self.loss.shape
                object.__setattr__(self, name, np.full(shape, np.nan))

    @property
    def answers(self) -> tuple[str, ...]:
        """List the names of the arrays of right answers; empty unless the text has questions."""
        return () if self.acc is None else ANSWERS

    def joined(self, *others: SequenceSums) -> SequenceSums:
        """Append the variants of other sums on the same sequences."""
        return SequenceSums(
            self.tokens,
            *(np.concatenate([getattr(one, name) for one in (self, *others)]) for name in (*ARRAYS, *self.answers)),
        )

    def followed(self, other: SequenceSums) -> SequenceSums:
        """Append the sequences of other sums of the same variants."""
        names = (*MEASURES, *self.answers)
        arrays = {name: np.concatenate([getattr(self, name), getattr(other, name)], 1) for name in names}
        return SequenceSums(np.concatenate([self.tokens, other.tokens]), **arrays, kl_bins=self.kl_bins + other.kl_bins)

    def take(self, variants: Sequence[int]) -> SequenceSums:
        """Take some of the variants, by number."""
        return SequenceSums(self.tokens, *(getattr(self, name)[list(variants)] for name in (*ARRAYS, *self.answers)))

    def mean(self, sums: Floats) -> Estimate:
        """Estimate the mean over tokens of sums over each sequence: (S,)."""
        return ratio(sums, self.tokens)

    def loss_of(self, weights: Sequence[float] | Floats) -> Estimate:
        """Estimate a linear combination of the variants' mean losses, such as a difference: weights (V,)."""
        return self.mean(_weighted(weights, self.loss))

    def kl_of(self, weights: Sequence[float] | Floats) -> Estimate:
        """Estimate a linear combination of the variants' mean divergences: weights (V,)."""
        return self.mean(_weighted(weights, self.kl))

    def top1_of(self, weights: Sequence[float] | Floats) -> Estimate:
        """Estimate a linear combination of the variants' top-1: weights (V,)."""
        return self.mean(_weighted(weights, self.right))

    def loss_difference(self, variant: int, other: int) -> Estimate:
        """Estimate a variant's mean loss minus another's."""
        return self.mean(self.loss[variant] - self.loss[other])

    def kl_difference(self, variant: int, other: int) -> Estimate:
        """Estimate a variant's mean divergence minus another's."""
        return self.mean(self.kl[variant] - self.kl[other])

    @property
    def change(self) -> Estimate:
        """Estimate the unchanged adapter's mean loss minus the base's, the denominator of shares."""
        return self.loss_difference(1, 0)

    @property
    def effect(self) -> Effect:
        """Return the effect of the unchanged adapter on this text."""
        change = self.change
        return "forgets" if change.is_positive else "improves" if change.is_negative else "not told"

    def fraction(self, variant: int) -> Estimate:
        """Estimate ``(variant − base) / (adapter − base)`` of the mean losses: 0 is the base, 1 the unchanged adapter."""
        base, adapter = self.loss[0], self.loss[1]
        return ratio(self.loss[variant] - base, adapter - base)

    @property
    def top1_gain(self) -> Estimate:
        """Estimate the unchanged adapter's gain in top-1: its share of tokens ranked as most likely, minus the base's."""
        return self.mean(self.right[1] - self.right[0])

    def top1_fraction(self, variant: int) -> Estimate:
        """Estimate the share of the adapter's gain in top-1 that a variant keeps."""
        return ratio(self.right[variant] - self.right[0], self.right[1] - self.right[0])

    def perplexity_ratio(self, variant: int) -> Estimate:
        """Estimate a variant's perplexity as a multiple of the base's."""
        rise = self.loss_difference(variant, 0)
        value = math.exp(rise.value) if rise.value < MOST_LOSS else math.inf
        return Estimate(value, value * rise.error, rise.sequences)

    def p_rms(self, variant: int) -> Estimate:
        """Estimate the root mean square change in the probability of the text's own token."""
        mean = self.mean(self.p_square[variant])
        root = math.sqrt(mean.value)
        return Estimate(root, mean.error / (2 * root) if root else mean.error, mean.sequences)

    def kl_quantile(self, variant: int, share: float) -> float:
        """Estimate the divergence that this share of the tokens do not exceed; see `quantile`."""
        return quantile(self.kl_bins[variant], self.kl_largest(variant), share)

    def kl_largest(self, variant: int) -> float:
        """Return the largest divergence of a token."""
        return float(self.kl_max[variant].max())

    def accuracy(self, name: str, variant: int, other: int | None = None) -> Estimate:
        """Estimate the share of questions that a variant answers right, or its difference from another's; `name` is one of `ANSWERS`."""
        right: Floats = getattr(self, name)
        return ratio(right[variant] if other is None else right[variant] - right[other], np.ones(len(self.tokens)))

    def accuracy_fraction(self, name: str, variant: int) -> Estimate:
        """Estimate ``(variant − base) / (adapter − base)`` of the accuracies; NaN if the denominator is too small."""
        right: Floats = getattr(self, name)
        if not self.accuracy(name, 1, 0).divides:
            return Estimate(math.nan, math.inf, len(self.tokens))
        return ratio(right[variant] - right[0], right[1] - right[0])

    def kl_fraction(self, variant: int) -> Estimate:
        """Estimate a variant's divergence as a share of the unchanged adapter's."""
        return ratio(self.kl[variant], self.kl[1])


def _weighted(weights: Sequence[float] | Floats, sums: Floats) -> Floats:
    """Add up the variants with nonzero weights, so that the NaN of others do not count."""
    own = np.asarray(weights, float)
    total: Floats = own[own != 0] @ sums[own != 0]
    return total


def flat(name: str, estimate: Estimate) -> dict[str, float | None]:
    """Return an estimate as two JSON keys, with null if undefined, such as a share of a zero difference."""
    return {name: defined(estimate.value), f"{name}_se": defined(estimate.error)}


def defined(value: float) -> float | None:
    """Return a figure for JSON, null if it is not finite."""
    return float(value) if math.isfinite(value) else None
