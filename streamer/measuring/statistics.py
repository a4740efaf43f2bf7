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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from streamer.json_types import JsonObject
from streamer.measuring.sequences import GENERAL, TASK
from streamer.methods import METHODS, MethodName
from streamer.options import EvaluateOptions
from streamer.streaming.variants import ADAPTER_ROW, BASE_ROW, Variant

Floats = NDArray[np.float64]

MEASURES = ("loss", "kl", "kl_from_adapter", "agree", "right")
"""Sums with one value for each variant and sequence."""

SUM_ARRAYS = ("tokens", *MEASURES)


Effect = Literal["forgets", "improves", "not told"]

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
    def margin(self) -> float:
        """Return how far from zero the figure is significant."""
        return critical_value(self.sequences) * self.error

    @property
    def is_positive(self) -> bool:
        """Test whether the figure is significantly above zero."""
        return self.value > self.margin

    @property
    def is_negative(self) -> bool:
        """Test whether the figure is significantly below zero."""
        return -self.value > self.margin

    @property
    def divides(self) -> bool:
        """Test whether the figure can be the denominator of a share: it is at least twice as far from zero as significance needs.

        For smaller figures, the ratio estimator understates the error of a share: Fieller's interval is over a third wider.
        """
        return abs(self.value) > 2 * self.margin


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
    y = y[both]
    x = x[both]
    total = float(x.sum())
    if total == 0 or len(x) < 2:
        return Estimate(math.nan, math.inf, len(x))
    value = float(y.sum()) / total
    rest = y - value * x
    error = math.sqrt(len(x) / (len(x) - 1) * (rest @ rest)) / abs(total)
    return Estimate(value, error, len(x))


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

    def __getitem__(self, name: str) -> Floats:
        """Return one of the `SUM_ARRAYS`."""
        array: Floats = getattr(self, name)
        return array

    def joined(self, *others: SequenceSums) -> SequenceSums:
        """Append the variants of other sums on the same sequences."""
        return replace(
            self,
            **{name: np.concatenate([sums[name] for sums in (self, *others)]) for name in MEASURES},
        )

    def followed(self, other: SequenceSums) -> SequenceSums:
        """Append the sequences of other sums of the same variants."""
        return SequenceSums(
            **{name: np.concatenate([self[name], other[name]], -1) for name in SUM_ARRAYS}
        )

    def in_order(self, sequences: NDArray[np.int64]) -> SequenceSums:
        """Put the sequences into this order."""
        return SequenceSums(**{name: self[name][..., sequences] for name in SUM_ARRAYS})

    def take(self, variants: Sequence[int]) -> SequenceSums:
        """Take some of the variants, by number."""
        return replace(self, **{name: self[name][list(variants)] for name in MEASURES})

    def of(self, name: str, weights: Floats) -> Estimate:
        """Estimate a linear combination of the variants' means over tokens of one of `MEASURES`.

        Variants with a zero weight do not count, not even if they are NaN.
        """
        used = weights != 0
        return ratio(weights[used] @ self[name][used], self.tokens)

    def mean(self, name: str, variant: int, other: int | None = None) -> Estimate:
        """Estimate a variant's mean, see `of`, or how much it exceeds another variant's."""
        sums = self[name][variant]
        return ratio(sums if other is None else sums - self[name][other], self.tokens)

    def means(self, name: str, other: int | None = None) -> list[Estimate]:
        """Estimate the means of all variants, or how much they exceed another variant's."""
        return [self.mean(name, row, other) for row in range(len(self.loss))]

    @property
    def change(self) -> Estimate:
        """Estimate the unchanged adapter's mean loss minus the base's, the denominator of shares."""
        return self.mean("loss", ADAPTER_ROW, BASE_ROW)

    @property
    def effect(self) -> Effect:
        """Return the effect of the unchanged adapter on this text."""
        if self.change.is_positive:
            return "forgets"
        return "improves" if self.change.is_negative else "not told"

    def share(self, name: str, variant: int) -> Estimate:
        """Estimate ``(variant − base) / (adapter − base)`` of the means: 0 is the base, 1 the unchanged adapter.

        The base's divergence from itself is 0, and so is the adapter's from itself: the share of ``kl_from_adapter``, the behaviour that is
        kept, is ``1 − KL(adapter ‖ variant) / KL(adapter ‖ base)``.
        """
        sums = self[name]
        base = 0.0 if name == "kl" else sums[BASE_ROW]
        return ratio(sums[variant] - base, sums[ADAPTER_ROW] - base)


Sums = dict[str, SequenceSums]
"""On each text, the sums of variants."""


def flattened(**figures: Any) -> JsonObject:
    """Make JSON of figures: an estimate ``x`` becomes two keys, ``x`` and its error ``x_se``, null if undefined."""
    tree: dict[str, object] = {}
    for name, figure in figures.items():
        if isinstance(figure, Estimate):
            tree[name] = defined(figure.value)
            tree[f"{name}_se"] = defined(figure.error)
        else:
            tree[name] = figure
    return tree


def defined(value: float) -> float | None:
    """Return a figure for JSON, null if it is not finite, such as a share of a zero difference."""
    return float(value) if math.isfinite(value) else None


TABLE_ORDER = (None, *METHODS)


@dataclass(frozen=True)
class EvaluatedVariant:
    """A model that was evaluated; `VariantRecord` explains the attributes."""

    name: str
    method: MethodName | None
    mitigation_lambda: float | None
    keep: float | None = None

    @classmethod
    def of(cls, variant: Variant) -> EvaluatedVariant:
        """Describe a variant that was run."""
        return cls(variant.name, variant.method, variant.mitigation_lambda, variant.keep)

    @property
    def order(self) -> tuple[int, float]:
        """Return the sort key for tables: the base and the adapter come first, then each method from its mildest variant on."""
        known = self.method in TABLE_ORDER
        method = TABLE_ORDER.index(self.method) if known else len(TABLE_ORDER)
        return method, -(self.mitigation_lambda or self.keep or 0.0)


@dataclass(frozen=True, repr=False)
class Measured:
    """Losses of an adapted model's variants; `Evaluation` explains the attributes."""

    variants: tuple[EvaluatedVariant, ...]
    general: SequenceSums
    task: SequenceSums
    facts: JsonObject
    keep: float = EvaluateOptions.keep
    others: Mapping[str, SequenceSums] = field(default_factory=dict)

    @classmethod
    def of(
        cls, variants: Sequence[EvaluatedVariant], sums: Sums, facts: JsonObject, keep: float
    ) -> Self:
        """Make an object of this class from the sums on each text, by name."""
        others = dict(sums)
        general = others.pop(GENERAL)
        return cls(tuple(variants), general, others.pop(TASK), facts, keep, others)

    @property
    def sums(self) -> Sums:
        """Return the sums on each text, by name."""
        return {GENERAL: self.general, TASK: self.task, **self.others}

    def shares(self, row: int) -> dict[str, Estimate]:
        """Estimate a variant's shares of what the adapter changes; `VariantRecord` explains them."""
        return {
            "kept": self.task.share("loss", row),
            "behaviour_kept": self.task.share("kl_from_adapter", row),
            "top1_kept": self.task.share("right", row),
            "forgetting": self.general.share("loss", row),
            "divergence": self.general.share("kl", row),
        }

    @property
    def top1_gain(self) -> Estimate:
        """Estimate the adapter's gain in top-1 on the task's text."""
        return self.task.mean("right", ADAPTER_ROW, BASE_ROW)

    def reliable(self) -> dict[str, bool]:
        """Return which shares have a large enough denominator; see `ReliableRecord`."""
        return {
            "kept": self.task.change.divides,
            "forgetting": self.general.change.divides,
            "top1_kept": self.top1_gain.divides and self.top1_gain.value > 0,
        }

    def front(self) -> list[str]:
        """Name the variants that no other equals or beats in both the task's loss, by which they are ordered, and the divergence."""
        losses = self.task.loss.sum(axis=1)
        divergences = np.nansum(self.general.kl, axis=1)
        names = []
        least = np.inf
        for row in np.lexsort((divergences, losses)):
            if divergences[row] < least:
                least = divergences[row]
                names.append(self.variants[row].name)
        return names
