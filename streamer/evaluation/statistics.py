"""Estimate means per token and their standard errors from sums over sequences.

Tokens of one sequence are not independent, sequences are: with s_i the sum over sequence i and n_i its tokens, the mean is
``m = Σ s_i / Σ n_i`` and its standard error ``√(S/(S − 1) · Σ (s_i − m n_i)²) / Σ n_i``, the ratio estimator (Cochran,
*Sampling Techniques*, chapter 6). For sequences of one length that is the standard error of their means.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]


class Mean(NamedTuple):
    """A mean per token, and its standard error; None of a single sequence, which tells of no spread."""

    value: float
    error: float | None


def mean_of(sums: Floats, tokens: Floats) -> Mean:
    """Estimate a mean from sums over sequences, both (sequences,).

    >>> mean_of(np.array([2.0, 4.0]), np.array([2.0, 2.0]))
    Mean(value=1.5, error=0.5)
    """
    total, count = float(tokens.sum()), len(tokens)
    mean = float(sums.sum()) / total
    if count == 1:
        return Mean(mean, None)
    spread = float(np.square(sums - mean * tokens).sum())
    return Mean(mean, (count / (count - 1) * spread) ** 0.5 / total)
