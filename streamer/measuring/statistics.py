"""Estimate means over tokens, and their standard errors over sequences, from sums of each sequence.

Tokens of a sequence depend on one another; sequences are taken as independent. They have different numbers of counted tokens, so a mean
over tokens is a ratio of two sums over S sequences, with the standard error of the ratio estimator (Cochran, Sampling Techniques, 3rd
edition, 1977, chapter 6):

    R = Σ y_s / Σ x_s,        se(R) = √( S / (S − 1) · Σ (y_s − R x_s)² ) / |Σ x_s|

Every variant runs on the same sequences: a difference between two is estimated from the differences of each sequence (paired), in which
most of what makes one sequence harder than another cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from streamer.measuring.divergences import BINS, Floats, quantile

SINCE = ("right", "p_change", "p_square", "kl_max")
"""Those of the measures that evaluations by earlier versions may lack."""

MEASURES = ("loss", "kl", "agree", *SINCE)
"""What is taken of each sequence and variant: sums, and a largest one."""

ARRAYS = (*MEASURES, "kl_bins")
"""All that is taken of each variant."""

ANSWERS = ("acc", "acc_norm")
"""Counts of right answers, of each question and variant."""

Effect = Literal["forgets", "improves", "not told"]

QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
"""Shares of the tokens whose largest divergence is reported, by name."""

MOST_LOSS = 700.0
"""Loss whose perplexity a float can hold."""

LEVEL = 0.975
"""A difference is told from none where it is beyond this quantile of Student's distribution of S − 1 degrees, in its standard errors: 12.7
for two sequences, 3.2 for four, 2.1 for sixteen, 2.0 for many."""


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
        Sequences that both are estimated from.
    """

    value: float
    error: float
    sequences: int

    @property
    def is_positive(self) -> bool:
        """Test whether it is told from zero, and above."""
        return self.value > telling(self.sequences) * self.error

    @property
    def is_negative(self) -> bool:
        """Test whether it is told from zero, and below."""
        return -self.value > telling(self.sequences) * self.error

    @property
    def divides(self) -> bool:
        """Test whether shares of it are worth printing: it is twice as far from zero as it takes to tell it from that.

        Below, an error of a ratio by the ratio estimator says too little: Fieller's interval of a share is over a third wider.
        """
        return abs(self.value) > 2 * telling(self.sequences) * self.error


def telling(sequences: int) -> float:
    """Count the standard errors beyond which a difference over so many sequences is told from none; see `LEVEL`.

    >>> [round(telling(S), 1) for S in (2, 4, 16)]
    [12.7, 3.2, 2.1]
    """
    from scipy.special import stdtrit  # Student's t; scipy.stats takes half a second to import

    return float(stdtrit(sequences - 1, LEVEL))


def ratio(y: Floats, x: Floats) -> Estimate:
    """Estimate ``Σ y / Σ x`` from sums y, x of each sequence: (S,). Where either is NaN it was not measured, and does not count.

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
    """Sums over the counted tokens of each sequence of a text, for each variant; the first is the base, the second the adapter as it is.

    They are NaN of sequences on which a variant did not run: a race dropped it before. What compares two is of those that both ran on.
    What is not given, as of evaluations by earlier versions, is NaN.

    Attributes
    ----------
    tokens
        Counted tokens of each sequence: (S,).
    loss
        Sums of the negative log likelihood in nats: (V, S).
    kl
        Sums of the Kullback-Leibler divergence ``KL(base ‖ variant)`` of the next token's distribution, in nats: (V, S).
    agree
        Counts of tokens where the variant's most likely token is the base's: (V, S).
    right
        Counts of tokens where it is the text's own: (V, S).
    p_change, p_square
        Sums of the change of the probability of the text's own token from the base's, and of the square of it: (V, S).
    kl_max
        The largest divergence of a token: (V, S).
    kl_bins
        Counts of tokens by their divergence, see `divergences`, of all sequences together: (V, BINS). NaN of questions.
    acc, acc_norm
        Of a text of questions, whose other sums are those of their right choices, 1 where the answer is right: (V, S). None of others.
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
        for name in (*SINCE, "kl_bins"):
            if not getattr(self, name).size:
                shape = (len(self.loss), BINS) if name == "kl_bins" else self.loss.shape
                object.__setattr__(self, name, np.full(shape, np.nan))

    @property
    def answers(self) -> tuple[str, ...]:
        """List the counts of right answers that it has."""
        return () if self.acc is None else ANSWERS

    def joined(self, *others: SequenceSums) -> SequenceSums:
        """Put the variants of others, on the same sequences, after its own."""
        return SequenceSums(
            self.tokens,
            *(np.concatenate([getattr(one, name) for one in (self, *others)]) for name in (*ARRAYS, *self.answers)),
        )

    def unknown(self, variants: int) -> SequenceSums:
        """Make the sums of so many variants that have not run."""
        none = np.full((variants, len(self.tokens)), np.nan)
        arrays = {name: none.copy() for name in (*MEASURES, *self.answers)}
        return SequenceSums(self.tokens, **arrays, kl_bins=np.zeros((variants, BINS)))

    def add(self, row: int, other: SequenceSums, of: int) -> None:
        """Add a row of another on sequences that its own lacks; if it has any of these, it keeps what it has."""
        there = np.isfinite(other.loss[of])
        if not np.isfinite(self.loss[row][there]).any():
            self.kl_bins[row] += other.kl_bins[of]
            for name in (*MEASURES, *self.answers):
                getattr(self, name)[row, there] = getattr(other, name)[of, there]

    def ran(self, variant: int) -> int:
        """Count the sequences that a variant ran on."""
        return int(np.isfinite(self.loss[variant]).sum())

    def dropped(self, variant: int) -> bool:
        """Test whether a variant ran on fewer sequences than the base: a race dropped it."""
        return self.ran(variant) < self.ran(0)

    def take(self, variants: Sequence[int]) -> SequenceSums:
        """Take some of the variants, by number."""
        return SequenceSums(self.tokens, *(getattr(self, name)[list(variants)] for name in (*ARRAYS, *self.answers)))

    def mean(self, sums: Floats) -> Estimate:
        """Estimate the mean over tokens of one of the sums: (S,)."""
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
        """Estimate by how much the mean loss of a variant is above another's."""
        return self.mean(self.loss[variant] - self.loss[other])

    def kl_difference(self, variant: int, other: int) -> Estimate:
        """Estimate by how much the divergence of a variant is above another's."""
        return self.mean(self.kl[variant] - self.kl[other])

    @property
    def change(self) -> Estimate:
        """Estimate by how much the mean loss of the adapter as it is is above the base's: what shares are of."""
        return self.loss_difference(1, 0)

    @property
    def effect(self) -> Effect:
        """Say what the adapter as it is does to the text."""
        change = self.change
        return "forgets" if change.is_positive else "improves" if change.is_negative else "not told"

    def share(self, variant: int) -> Estimate:
        """Estimate what part of the way from the base's loss to the adapter's a variant is: 0 is the base, 1 the adapter as it is."""
        base, adapter = self.loss[0], self.loss[1]
        return ratio(self.loss[variant] - base, adapter - base)

    @property
    def top1_gain(self) -> Estimate:
        """Estimate by how much the adapter as it is finds more of the text's own tokens likeliest than the base does."""
        return self.mean(self.right[1] - self.right[0])

    def top1_share(self, variant: int) -> Estimate:
        """Estimate what part of that gain a variant keeps."""
        return ratio(self.right[variant] - self.right[0], self.right[1] - self.right[0])

    def perplexity_ratio(self, variant: int) -> Estimate:
        """Estimate a variant's perplexity as a multiple of the base's."""
        rise = self.loss_difference(variant, 0)
        value = math.exp(rise.value) if rise.value < MOST_LOSS else math.inf
        return Estimate(value, value * rise.error, rise.sequences)

    def p_rms(self, variant: int) -> Estimate:
        """Estimate the root of the mean square change of the probability of the text's own token."""
        mean = self.mean(self.p_square[variant])
        root = math.sqrt(mean.value)
        return Estimate(root, mean.error / (2 * root) if root else mean.error, mean.sequences)

    def kl_quantile(self, variant: int, share: float) -> float:
        """Estimate the divergence that this share of the tokens does not exceed; see `quantile`."""
        return quantile(self.kl_bins[variant], self.kl_largest(variant), share)

    def kl_largest(self, variant: int) -> float:
        """Return the largest divergence of a token."""
        return float(self.kl_max[variant][np.isfinite(self.loss[variant])].max())

    def accuracy(self, name: str, variant: int, other: int | None = None) -> Estimate:
        """Estimate the share of questions that a variant answers right, or by how much it is above another's; a name of `ANSWERS`."""
        right: Floats = getattr(self, name)
        return ratio(right[variant] if other is None else right[variant] - right[other], np.ones(len(self.tokens)))

    def accuracy_share(self, name: str, variant: int) -> Estimate:
        """Estimate what part of the way from the base's accuracy to the adapter's a variant is, if that can be divided by; else NaN."""
        right: Floats = getattr(self, name)
        if not self.accuracy(name, 1, 0).divides:
            return Estimate(math.nan, math.inf, len(self.tokens))
        return ratio(right[variant] - right[0], right[1] - right[0])

    def kl_share(self, variant: int) -> Estimate:
        """Estimate a variant's divergence as a part of that of the adapter as it is."""
        return ratio(self.kl[variant], self.kl[1])


def _weighted(weights: Sequence[float] | Floats, sums: Floats) -> Floats:
    """Add up the variants that have a weight."""
    own = np.asarray(weights, float)
    total: Floats = own[own != 0] @ sums[own != 0]
    return total


def flat(name: str, estimate: Estimate) -> dict[str, float | None]:
    """Write an estimate under two keys of a JSON object, null where it is not defined: a share of no difference."""
    return {name: defined(estimate.value), f"{name}_se": defined(estimate.error)}


def defined(value: float) -> float | None:
    """Return a figure for JSON, null where it is not finite."""
    return float(value) if math.isfinite(value) else None
