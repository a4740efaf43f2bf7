"""Bound the effect of one rounding to a dtype."""

from __future__ import annotations

import numpy as np

from streamer.verification.tensors import FP8, Array

SIGNIFICANT_BITS = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8, FP8: 4}
LEAST_EXPONENT = {"F64": -1022, "F32": -126, "F16": -14, "BF16": -126, FP8: -6}
"""Exponent of the smallest normal numbers; below it values are evenly spaced."""

LARGEST_FP8 = 448.0


def half_spacing(values: Array, dtype: str) -> Array:
    """Compute half the distance between neighbouring values of a dtype: the largest error of rounding to nearest."""
    _, exponents = np.frexp(values)  # |value| in [0.5, 1) · 2^exponent
    exponents = np.where(values == 0, LEAST_EXPONENT[dtype], exponents - 1)
    out: Array = np.ldexp(0.5, np.maximum(exponents, LEAST_EXPONENT[dtype]) - (SIGNIFICANT_BITS[dtype] - 1))
    return out


def computing_precision(dtype: str) -> float:
    """Return the relative rounding of the dtype in which sums for a weight are computed: float64 for float64 weights, else float32."""
    return float(2.0**-53 if dtype == "F64" else 2.0**-24)
