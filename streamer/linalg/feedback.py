"""Refit right factors after the inputs of a module changed, so that its outputs stay as they were.

Let x be the module's original inputs, x' its inputs after the modules before it changed, and ``Δ = Q D₀ᵀ`` with ``QᵀQ = I``:

    D' = argmin  E_t ‖(W + Q D'ᵀ) x' − (W + Δ) x‖² + μ E_g ‖(W + Q D'ᵀ) x' − W x‖² + s ‖D' − D₀‖²,      s = ε tr(C'_t) / n

Only the parts of the norms along Q depend on D'. With ``P = Wᵀ Q`` and ``C' = E[x' x'ᵀ]``,

    (C'_t + s I + μ C'_g) D' = E_t[x' (xᵀ(P + D₀) − x'ᵀP)] + s D₀ + μ E_g[x' (x − x')ᵀ] P

If x' = x, this is the regression mean of `linalg.regmean`. Each module corrects what the modules before it failed to remove, as
layer-by-layer pruning and quantization do (compare Frantar and Alistarh, Optimal Brain Compression, NeurIPS 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamer.linalg.regmean import GROWTH, MOST_RIDGE, RAISE, RIDGE, system_of
from streamer.linalg.second_moments import RowMoments

LEAST = 1e-3
"""Smallest singular value of L to refit, relative to the largest. Along weaker directions R stays unchanged: a change of Δ there would need
a change of R larger by the inverse factor."""


@dataclass(frozen=True)
class WeightDelta:
    """Delta ``L Rᵀ`` (m, n) together with a product of its weight W.

    Attributes
    ----------
    through
        Computes ``Wᵀ Q`` (n, r) from Q (m, r), in float64.
    """

    L: Tensor
    R: Tensor
    through: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class InputPair:
    """Second moments of a module's original and current inputs, with rows in the same order."""

    before: RowMoments
    now: RowMoments

    def cross(self, V: Tensor, P: Tensor) -> Tensor:
        """Compute ``E[x' (xᵀ V − x'ᵀ P)]`` (n, k)."""
        out = torch.zeros_like(V)
        for old, new in zip(self.before.blocks(), self.now.blocks(), strict=True):
            x = new.to(V.dtype)
            out.addmm_(x.T, old.to(V.dtype) @ V - x @ P)
        return out.div_(self.now.count)


def corrected(
    deltas: Sequence[WeightDelta], task: InputPair, general: InputPair, weight: float, memory: int
) -> list[Tensor] | None:
    """Compute R' (n, r) in float64 for deltas that share their inputs, for one weight μ.

    The factors and R' may be on a different device than the inputs.

    Parameters
    ----------
    memory
        Bytes that matrices the size of C' may occupy; see `is_direct`.

    Returns
    -------
    list of Tensor or None
        R' of each delta; None if some Δ' grows too much with every ridge.
    """
    device = task.now.device
    bases = [_basis(one.L) for one in deltas]
    before = torch.cat([one.R.double() @ T.T for one, (_, T) in zip(deltas, bases, strict=True)], 1).to(device)
    P = torch.cat([one.through(Q.to(device)) for one, (Q, _) in zip(deltas, bases, strict=True)], 1)
    wanted = task.cross(P + before, P).add_(general.cross(P, P), alpha=weight)
    ranks = [len(T) for _, T in bases]

    def sizes(whole: Tensor) -> list[float]:
        return [float(torch.linalg.matrix_norm(one)) for one in torch.split(whole, ranks, 1)]

    system = system_of(task.now, general.now, memory)
    most, ridge = [GROWTH * size for size in sizes(before)], RIDGE
    while ridge <= MOST_RIDGE:
        s = ridge * system.mean
        found = system.solve(wanted + s * before, s, [weight], sizes)
        if found is not None and all(a <= b for a, b in zip(sizes(found[0]), most, strict=True)):
            changes = torch.split(found[0] - before, ranks, 1)
            return [one.R.double() + change.to(T.device) @ torch.linalg.pinv(T).T
                    for one, (_, T), change in zip(deltas, bases, changes, strict=True)]  # fmt: skip
        ridge *= RAISE
    return None


def _basis(L: Tensor) -> tuple[Tensor, Tensor]:
    """Factor ``L ≈ Q T`` (m, k)(k, r) with orthonormal Q, keeping only directions above `LEAST`."""
    Q, R = torch.linalg.qr(L.double())
    U, S, Vh = torch.linalg.svd(R)
    k = int((LEAST * S[0] < S).sum())
    return Q @ U[:, :k], S[:k, None] * Vh[:k]
