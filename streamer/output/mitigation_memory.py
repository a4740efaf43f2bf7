"""Estimate the memory of mitigating one matrix."""

from __future__ import annotations

from streamer.plan.memory_estimate import factor_bytes
from streamer.plan.plan import Plan
from streamer.plan.targets import Target

THIN = 48
"""Bytes for each row, column and rank of a mitigated delta: its factors in float64, the factors of its inputs, and their thin QRs."""

PROJECTED = 80
"""Bytes if it is also projected onto a rank."""


def mitigation_bytes(plan: Plan, target: Target, intruders: int, projected: bool = False) -> int:
    """Estimate the memory for Δ, Δ' and the norms of one matrix, in addition to resident memory.

    Parameters
    ----------
    intruders
        Number of directions that Δ' adds.
    projected
        Whether Δ' is projected onto the adapter's rank.
    """
    module, itemsize = target.module, plan.weights[target.tensor].compute.itemsize
    m, n = module.shape
    if module.low_rank:
        size = (PROJECTED if projected else THIN) * (m + n) * (module.factor_rank + intruders)
    else:
        # Δ, Δ', and one more if Δ is scaled.
        size = max(module.peak_bytes(itemsize), 3 * itemsize * m * n)
    return size + factor_bytes(plan, target, itemsize)
