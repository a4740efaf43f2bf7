"""Memory of mitigating one matrix, and of making one weight anew a few rows at a time."""

from __future__ import annotations

from streamer.output.recipes import BLOCK_BYTES
from streamer.plan.memory import factor_bytes
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.weights.base import DECODED_BYTES, QuantizedWeight, Weight

THIN = 48
"""Bytes for each row, column and rank of a mitigated delta: its factors in float64, those that it was made from, and their thin QRs."""

PROJECTED = 80
"""The same where it is also projected back, for which the singular vectors are formed."""

DECODED = 8
"""Rows in float32 that decoding a few rows takes at most, of which the rows themselves are one: codes and scales spread out to int32."""


def mitigation_bytes(plan: Plan, target: Target, intruders: int, projected: bool = False) -> int:
    """Memory for Δ, Δ' and the norms of one matrix, beside what is resident.

    Parameters
    ----------
    intruders
        How many of them Δ' takes up.
    projected
        Whether Δ' is projected back onto the adapter's rank.
    """
    module = target.module
    m, n = module.shape
    if module.low_rank:
        size = (PROJECTED if projected else THIN) * (m + n) * (module.factor_rank + intruders)
    else:
        # Δ, Δ', and one more where Δ is scaled.
        itemsize = plan.weights[target.tensor].compute.itemsize
        size = max(module.peak_bytes(itemsize), 3 * itemsize * m * n)
    return size + factor_bytes(plan, target)


def rows_bytes(weight: Weight) -> int:
    """Memory for making a weight anew a few rows at a time: what is read or decoded, summed, and rounded twice by turns."""
    m, n = weight.matrix
    row = max(1, n * weight.compute.itemsize)
    block = max(row, min(m * row, max(BLOCK_BYTES, DECODED_BYTES)))
    return (3 + (DECODED if isinstance(weight, QuantizedWeight) else 1)) * block + weight.held_bytes
