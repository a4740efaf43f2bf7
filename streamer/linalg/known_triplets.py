"""Compute the leading singular triplets of a base once, for all adapters on it.

The process that bounds overlaps with W0's singular vectors need not find the leading ones again then, before it spreads over the rest. The
process for the triplets of ``W = W0 + Δ`` starts from random columns all the same: from W0's and Δ's leading vectors it ends two steps
earlier, but few random columns are left then to see a direction that neither of them shows, and one was missed: 16 directions of Δ that
damp W0's own in front of one that is new.
"""

from __future__ import annotations

import torch

from streamer.linalg.golub_kahan import GolubKahan, KnownTriplets
from streamer.linalg.operators import Matrix

KNOWN = 64
"""Triplets that are kept of a base, at most: (m + n)·64 values. Over a bulk below 64 outstanding values 48 left a step more, 32 three."""

WIDTH = 32
"""Columns of a block: a product costs per column three quarters of one with 16."""

STEPS = 12
"""Block steps, at most: what has not converged by then is left to each adapter's process."""

CONVERGED = 4
"""Residual of a known triplet, in roundings of the norm, at most: it is as good as a process of its own would find it."""


def known_triplets(base: Matrix, generator: torch.Generator) -> KnownTriplets:
    """Compute the leading triplets of W0 (m, n) that block Krylov finds to rounding in `STEPS`; none where the spectrum is flat.

    Parameters
    ----------
    base
        Scaled so that squares of its entries neither overflow nor vanish.

    Returns
    -------
    KnownTriplets
        On the CPU, up to `KNOWN`.
    """
    m, n = base.shape
    op = base if n <= m else base.T
    side = min(m, n)
    process = GolubKahan(
        op, torch.randn(side, min(WIDTH, side), generator=generator, dtype=torch.float32).to(base.like)
    )
    limit = CONVERGED * torch.finfo(base.like.dtype).eps
    while True:
        process.step()
        ended = process.exhausted or process.steps >= STEPS
        # Each block brings at most as many triplets as it has columns, and the last three have not converged.
        if not ended and (process.steps - 3) * WIDTH < KNOWN:
            continue
        ritz = process.ritz()
        residual = torch.linalg.vector_norm(ritz.tail[:, : len(ritz.S)], dim=0)
        good = (residual <= limit * ritz.S[0]) & (limit * ritz.S[0] < ritz.S)
        count = min(KNOWN, int(torch.cumprod(good.long(), 0).sum()), *process.B.shape)
        if ended or count == KNOWN:
            break
    right, left = process.P @ ritz.Y[:, :count].to(process.P), process.Q @ ritz.X[:, :count].to(process.Q)
    found = KnownTriplets(left.cpu(), ritz.S[:count], right.cpu())
    return found if op is base else found.T
