"""Estimate figures of variants from sums over each sequence: means with standard errors.

Tokens of one sequence depend on each other; sequences are assumed independent. Because sequences have different numbers of counted tokens,
a mean over tokens is a ratio of two sums over S sequences. Its standard error is that of the ratio estimator (Cochran, Sampling Techniques,
3rd edition, 1977, chapter 6):

    R = Σ y_s / Σ x_s,        se(R) = √( S / (S − 1) · Σ (y_s − R x_s)² ) / |Σ x_s|

All variants run on the same sequences. A difference between two variants is estimated from the differences on each sequence (paired), in
which most of the variation between sequences cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import FunctionType
from typing import Any, Literal, NotRequired, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MEASURES = ("loss", "kl", "kl_from_adapter", "agree", "right")
"""Sums with one value for each variant and sequence."""

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
    return Estimate(
        value, float(np.sqrt(len(x) / (len(x) - 1) * (rest @ rest))) / abs(total), len(x)
    )


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
    """

    tokens: Floats
    loss: Floats
    kl: Floats
    kl_from_adapter: Floats
    agree: Floats
    right: Floats

    def joined(self, *others: SequenceSums) -> SequenceSums:
        """Append the variants of other sums on the same sequences."""
        arrays = {
            name: np.concatenate([getattr(sums, name) for sums in (self, *others)])
            for name in MEASURES
        }
        return replace(self, **arrays)

    def followed(self, other: SequenceSums) -> SequenceSums:
        """Append the sequences of other sums of the same variants."""
        names = ("tokens", *MEASURES)
        arrays = {
            name: np.concatenate([getattr(self, name), getattr(other, name)], -1) for name in names
        }
        return SequenceSums(**arrays)

    def take(self, variants: Sequence[int]) -> SequenceSums:
        """Take some of the variants, by number."""
        return replace(self, **{name: getattr(self, name)[list(variants)] for name in MEASURES})

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
        return (
            "forgets"
            if self.change.is_positive
            else "improves"
            if self.change.is_negative
            else "not told"
        )

    def share(self, name: str, variant: int) -> Estimate:
        """Estimate ``(variant − base) / (adapter − base)`` of the means: 0 is the base, 1 the unchanged adapter.

        The base's divergence from itself is 0, and so is the adapter's from itself: the share of ``kl_from_adapter``, the behaviour that is
        kept, is ``1 − KL(adapter ‖ variant) / KL(adapter ‖ base)``.
        """
        array: Floats = getattr(self, name)
        base = 0.0 if name == "kl" else array[BASE_ROW]
        return ratio(array[variant] - base, array[ADAPTER_ROW] - base)


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
        keys[key] = (
            next((item for item in metadata if isinstance(item, FunctionType)), None),
            optional,
        )
    return keys


def defined(value: float) -> float | None:
    """Return a figure for JSON, null if it is not finite."""
    return float(value) if math.isfinite(value) else None
