"""Bound what one rounding to a dtype changes."""

from __future__ import annotations

import numpy as np

from streamer.verification.tensors import FP8, Array

SIGNIFICANT_BITS = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8, FP8: 4}
LEAST_EXPONENT = {"F64": -1022, "F32": -126, "F16": -14, "BF16": -126, FP8: -6}
"""Of normal numbers; below it values are evenly spaced."""

LARGEST_FP8 = 448.0


def half_spacing(values: Array, dtype: str) -> Array:
    """Compute half the distance between neighbours of a dtype at each value: what rounding to nearest changes at most."""
    _, exponents = np.frexp(values)  # |value| in [0.5, 1) · 2^exponent
    exponents = np.where(values == 0, LEAST_EXPONENT[dtype], exponents - 1)
    out: Array = np.ldexp(0.5, np.maximum(exponents, LEAST_EXPONENT[dtype]) - (SIGNIFICANT_BITS[dtype] - 1))
    return out


def computing_precision(dtype: str) -> float:
    """Return one rounding of the dtype in which sums of a weight are taken, relative: float64 of a float64 weight, else float32."""
    return float(2.0**-53 if dtype == "F64" else 2.0**-24)
