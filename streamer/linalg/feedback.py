"""Fit new right factors to inputs that changed, such that a weight and its delta answer them as they answered what these were before.

With x the inputs of a module as they were, x' those that the modules before it make now, and ``Δ = Q D₀ᵀ``, ``QᵀQ = I``,

    D' = argmin  E_t ‖(W + Q D'ᵀ) x' − (W + Δ) x‖² + μ E_g ‖(W + Q D'ᵀ) x' − W x‖² + s ‖D' − D₀‖²,      s = ε tr(C'_t) / n

where only the part along Q of what is in ‖·‖ depends on D': with ``P = Wᵀ Q`` and ``C' = E[x' x'ᵀ]``,

    (C'_t + s I + μ C'_g) D' = E_t[x' (xᵀ(P + D₀) − x'ᵀP)] + s D₀ + μ E_g[x' (x − x')ᵀ] P

It is the regression mean of `linalg.regmean` if x' = x. What modules before left of what was to go, this one takes away, as layer by
layer in pruning and quantization (compare Frantar and Alistarh, Optimal Brain Compression, NeurIPS 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamer.linalg.regmean import GROWTH, MOST_RIDGE, RAISE, RIDGE, system_of
from streamer.linalg.second_moments import RowMoments

LEAST = 1e-3
"""Directions of L with singular values below this, relative to the largest, keep what R has along them: to change Δ there takes a change of
R that is as many times larger."""


@dataclass(frozen=True)
class WeightDelta:
    """A delta ``L Rᵀ`` (m, n) and the weight W that it is added to.

    Attributes
    ----------
    through
        Computes ``Wᵀ Q`` (n, r) of Q (m, r), in float64.
    """

    L: Tensor
    R: Tensor
    through: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class InputPair:
    """Moments of inputs as they were and as they are, whose rows are in one order."""

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
    """Compute R' (n, r) of deltas with the same inputs, float64, for one weight μ; None if Δ' grows too much with every ridge.

    Factors and R' may be on another device than the inputs.

    Parameters
    ----------
    memory
        Bytes that may be taken by matrices as large as C'; see `is_direct`.
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
    """Factor ``L ≈ Q T`` (m, k)(k, r) along the directions that are not below `LEAST`: Q orthonormal."""
    Q, R = torch.linalg.qr(L.double())
    U, S, Vh = torch.linalg.svd(R)
    k = int((LEAST * S[0] < S).sum())
    return Q @ U[:, :k], S[:k, None] * Vh[:k]
