"""Estimate figures of variants from sums over each sequence: means with standard errors, and quantiles of divergences.

Tokens of one sequence depend on each other; sequences are assumed independent. Because sequences have different numbers of counted tokens,
a mean over tokens is a ratio of two sums over S sequences. Its standard error is that of the ratio estimator (Cochran, Sampling Techniques,
3rd edition, 1977, chapter 6):

    R = Σ y_s / Σ x_s,        se(R) = √( S / (S − 1) · Σ (y_s − R x_s)² ) / |Σ x_s|

All variants run on the same sequences. A difference between two variants is estimated from the differences on each sequence (paired), in
which most of the variation between sequences cancels.

Quantiles are estimated from counts of the tokens' divergences in a fixed logarithmic histogram. From `LEAST` nats on, each bin ends at
`STEP` times its beginning, independent of the data, so that counts of parts add up. A divergence is represented by the geometric middle of
its bin, within 1 %. Below `LEAST`, rounding dominates, and a divergence counts as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import FunctionType
from typing import Annotated, Any, Literal, NotRequired, TypedDict, get_args, get_origin, get_type_hints

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
        The largest divergence, which is known exactly.
    """
    ends = np.cumsum(bins)
    tokens = int(ends[-1])
    place = share * (tokens - 1)
    low = int(place)
    ranks = [low, min(low + 1, tokens - 1)]
    bins_of = [int(number) for number in np.searchsorted(ends, ranks, "right")]
    middles = [float(LEAST * STEP ** (number - 0.5)) if number else 0.0 for number in bins_of]
    a, b = (largest if rank == tokens - 1 else min(largest, x) for rank, x in zip(ranks, middles, strict=True))
    return a + (place - low) * (b - a)


def to_record(bins: Floats) -> BinsRecord:
    """Convert the counts of bins (BINS,) to JSON."""
    used = np.flatnonzero(bins)
    first, end = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
    return {"first": first, "counts": [int(n) for n in bins[first:end]]}


def from_record(record: BinsRecord) -> Floats:
    """Read the counts that `to_record` made."""
    first, counts = record["first"], np.array(record["counts"], np.float64)
    return np.pad(counts, (first, BINS - first - len(counts)))  # an error if they begin or end outside


MEASURES = ("loss", "kl", "kl_from_adapter", "agree", "right", "p_change", "p_square", "kl_max")
"""Arrays with one value for each variant and sequence: sums, and one maximum."""

ARRAYS = (*MEASURES, "kl_bins")
"""All arrays with a row for each variant."""

BASE_ROW, ADAPTER_ROW = 0, 1
"""Row numbers of the first two variants."""

Effect = Literal["forgets", "improves", "not told"]

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
        return self.value > critical_value(self.sequences) * self.error

    @property
    def is_negative(self) -> bool:
        """Test whether the figure is significantly below zero."""
        return -self.value > critical_value(self.sequences) * self.error

    @property
    def divides(self) -> bool:
        """Test whether the figure can be the denominator of a share: it is at least twice as far from zero as significance needs.

        For smaller figures, the ratio estimator understates the error of a share: Fieller's interval is over a third wider.
        """
        return abs(self.value) > 2 * critical_value(self.sequences) * self.error


def critical_value(sequences: int) -> float:
    """Return the standard errors beyond which a difference over this many sequences is significant; see `LEVEL`.

    >>> [round(critical_value(S), 1) for S in (2, 4, 16)]
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


@dataclass(frozen=True)
class SequenceSums:
    """Sums over the counted tokens of each sequence of a text, for each variant; the first is the base, the second the unchanged adapter.

    Attributes
    ----------
    tokens
        Counted tokens of each sequence: (S,).
    loss
        Sums of the negative log likelihood in nats: (V, S). On text that the adapter wrote, sums of its expectation over the adapter's
        next-token distributions, which has less noise.
    kl, kl_from_adapter
        Sums of the Kullback-Leibler divergences ``KL(base ‖ variant)`` and ``KL(adapter ‖ variant)`` between next-token distributions, in
        nats: (V, S).
    agree
        Counts of tokens for which the variant's most likely token is the base's: (V, S).
    right
        Counts of tokens for which the variant's most likely token is the text's own: (V, S).
    p_change, p_square
        Sums of the change from the base in the probability of the text's own token, and of its square: (V, S).
    kl_max
        The largest divergence of a token: (V, S).
    kl_bins
        Counts of tokens by divergence over all sequences, see `counted_bins`: (V, BINS).
    """

    tokens: Floats
    loss: Floats
    kl: Floats
    kl_from_adapter: Floats
    agree: Floats
    right: Floats
    p_change: Floats
    p_square: Floats
    kl_max: Floats
    kl_bins: Floats

    def joined(self, *others: SequenceSums) -> SequenceSums:
        """Append the variants of other sums on the same sequences."""
        arrays = {name: np.concatenate([getattr(sums, name) for sums in (self, *others)]) for name in ARRAYS}
        return replace(self, **arrays)

    def followed(self, other: SequenceSums) -> SequenceSums:
        """Append the sequences of other sums of the same variants."""
        names = ("tokens", *MEASURES)
        arrays = {name: np.concatenate([getattr(self, name), getattr(other, name)], -1) for name in names}
        return SequenceSums(**arrays, kl_bins=self.kl_bins + other.kl_bins)

    def take(self, variants: Sequence[int]) -> SequenceSums:
        """Take some of the variants, by number."""
        return replace(self, **{name: getattr(self, name)[list(variants)] for name in ARRAYS})

    def of(self, name: str, weights: Sequence[float] | Floats) -> Estimate:
        """Estimate a linear combination of the variants' means over tokens of one of `MEASURES`.

        Variants with a zero weight do not count, not even if they are NaN.
        """
        weight_array = np.asarray(weights, float)
        total: Floats = weight_array[weight_array != 0] @ getattr(self, name)[weight_array != 0]
        return ratio(total, self.tokens)

    def mean(self, name: str, variant: int, other: int | None = None) -> Estimate:
        """Estimate a variant's mean, see `of`, or how much it exceeds another variant's."""
        array: Floats = getattr(self, name)
        sums = array[variant] if other is None else array[variant] - array[other]
        return ratio(sums, self.tokens)

    @property
    def change(self) -> Estimate:
        """Estimate the unchanged adapter's mean loss minus the base's, the denominator of shares."""
        return self.mean("loss", ADAPTER_ROW, BASE_ROW)

    @property
    def effect(self) -> Effect:
        """Return the effect of the unchanged adapter on this text."""
        return "forgets" if self.change.is_positive else "improves" if self.change.is_negative else "not told"

    def share(self, name: str, variant: int) -> Estimate:
        """Estimate ``(variant − base) / (adapter − base)`` of the means: 0 is the base, 1 the unchanged adapter.

        The base's divergence from itself is 0, and so is the adapter's from itself: the share of ``kl_from_adapter``, the behaviour that is
        kept, is ``1 − KL(adapter ‖ variant) / KL(adapter ‖ base)``.
        """
        array: Floats = getattr(self, name)
        base = 0.0 if name == "kl" else array[BASE_ROW]
        return ratio(array[variant] - base, array[ADAPTER_ROW] - base)

    def perplexity_ratio(self, variant: int) -> Estimate:
        """Estimate a variant's perplexity as a multiple of the base's."""
        rise = self.mean("loss", variant, BASE_ROW)
        value = math.exp(rise.value) if rise.value < MOST_LOSS else math.inf
        return Estimate(value, value * rise.error, rise.sequences)

    def p_rms(self, variant: int) -> Estimate:
        """Estimate the root mean square change in the probability of the text's own token."""
        mean = self.mean("p_square", variant)
        root = math.sqrt(mean.value)
        return Estimate(root, mean.error / (2 * root) if root else mean.error, mean.sequences)

    def kl_quantile(self, variant: int, share: float) -> float:
        """Estimate the divergence that this share of the tokens do not exceed; see `quantile`."""
        return quantile(self.kl_bins[variant], self.kl_largest(variant), share)

    def kl_largest(self, variant: int) -> float:
        """Return the largest divergence of a token."""
        return float(self.kl_max[variant].max())


def flat(name: str, estimate: Estimate) -> dict[str, float | None]:
    """Return an estimate as two JSON keys, with null if undefined, such as a share of a zero difference."""
    return {name: defined(estimate.value), f"{name}_se": defined(estimate.error)}


def record(kind: Any, *of: Any) -> dict[str, Any]:
    """Make the JSON of a record: the function in a key's annotation computes its value from `of`; else it is an attribute of the first.

    A key that need not be there is left out if its value is None.
    """
    tree: dict[str, Any] = {}
    for key, (formula, optional) in keys_of(kind).items():
        value = getattr(of[0], key) if formula is None else formula(*of)
        if isinstance(value, Estimate):
            tree |= flat(key, value)
        elif isinstance(value, float):
            tree[key] = defined(value)
        elif value is not None or not optional:
            tree[key] = list(value) if isinstance(value, tuple) else value
    return tree


@cache
def keys_of(kind: Any) -> dict[str, tuple[Callable[..., Any] | None, bool]]:
    """List the keys of a record, each with its function, if it has one, and whether it may be absent."""
    keys: dict[str, tuple[Callable[..., Any] | None, bool]] = {}
    for key, hint in get_type_hints(kind, include_extras=True).items():
        optional = get_origin(hint) is NotRequired
        metadata = getattr(get_args(hint)[0] if optional else hint, "__metadata__", ())
        keys[key] = next((item for item in metadata if isinstance(item, FunctionType)), None), optional
    return keys


def defined(value: float) -> float | None:
    """Return a figure for JSON, null if it is not finite."""
    return float(value) if math.isfinite(value) else None
