"""Keep a delta's response to the inputs of one text, and reduce its response to those of another.

Let ``C = Σ x xᵀ / N`` (n, n) be the second moments of a module's inputs, on task text (C_t) and general text (C_g):

    Δ' = argmin  E_t ‖(Δ' − Δ) x‖² + μ E_g ‖Δ' x‖²  =  Δ C̃_t (C̃_t + μ C_g)⁻¹,      C̃_t = C_t + ε tr(C_t) / n · I

This is the regression mean of the delta and zero (Jin, Ren, Preotiuc-Pietro and Cheng, Dataless Knowledge Fusion by Merging Weights of
Language Models, ICLR 2023). For factors ``Δ = L Rᵀ`` only R changes, ``R' = (C̃_t + μ C_g)⁻¹ C̃_t R``, so the rank stays.

Refit right factors after the inputs of a module changed, so that its outputs stay as they were.

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

from streamer.errors import NumericError
from streamer.linalg.moments import Moments, OneHotMoments, RowMoments, Sizes, TwoMoments

RIDGE = 0.1
"""ε. From 0.01 to 0.3 the trade-off on unseen text is the same. A small ε keeps less on unseen text than on the text used for the fit: with
90 % requested, 87 % at 0.01, 88 % at 0.03, 89 % at 0.1."""

GROWTH = 30.0
"""Largest ‖Δ'‖/‖Δ‖; beyond it ε is raised. Trained adapters grow 2 to 7 times, along inputs that are rare in both texts."""

RAISE = 10**0.5
"""Factor by which each attempt raises ε."""

MOST_RIDGE = 12.0
"""Largest ε; ``C̃_t`` is then nearly a multiple of I."""

RESIDUAL = 1e-8
"""Largest relative residual of a solution by matrices."""

MATRICES_BYTES = 32
"""Bytes for each pair of inputs if the system is solved as a matrix."""

DIRECT_BYTES = 1 << 30
"""Bytes that matrices may use if no budget is given: enough for 5,792 inputs. Above that, products with the inputs are faster anyway."""


def answers(
    factors: Sequence[tuple[Tensor, Tensor]],
    task: Moments,
    general: Moments,
    weights: Sequence[float],
    name: str,
    memory: int = DIRECT_BYTES,
) -> tuple[list[list[Tensor]], float]:
    """Compute ``R' = (C̃_t + μ C_g)⁻¹ C̃_t R`` for deltas that share their inputs.

    Parameters
    ----------
    factors
        L (m, r) and R (n, r) of each delta.
    task, general
        C_t and C_g, both nonzero.
    weights
        Each μ > 0.
    name
        Name of the first matrix, for messages.
    memory
        Bytes that matrices the size of C may occupy; see `is_direct`.

    Returns
    -------
    right, ridge
        R' of each delta for each μ, float64, on the factors' device; and the ε used, raised until no delta grows beyond `GROWTH`
        times its norm.

    Raises
    ------
    NumericError
        If no ridge gives an accurate solution whose deltas stay within `GROWTH`.
    """
    ranks, home = [R.shape[1] for _, R in factors], factors[0][1].device
    whole = torch.cat([R.double() for _, R in factors], 1).to(task.device)
    cores = [torch.linalg.qr(L.double())[1].to(task.device) for L, _ in factors]

    def own(rights: Tensor) -> list[Tensor]:
        return list(torch.split(rights, ranks, 1))

    def sizes(rights: Tensor) -> list[float]:
        return [float(torch.linalg.matrix_norm(core @ R.T)) for core, R in zip(cores, own(rights), strict=True)]

    system = system_of(task, general, memory)
    most, ridge = [GROWTH * size for size in sizes(whole)], RIDGE
    while ridge <= MOST_RIDGE:
        s = ridge * system.mean
        found = system.solve(system.products(whole) + s * whole, s, weights, sizes)
        if found is not None and all(a <= b for right in found for a, b in zip(sizes(right), most, strict=True)):
            return [list(rights) for rights in zip(*(own(right.to(home)) for right in found), strict=True)], ridge
        ridge *= RAISE
    raise NumericError(
        f"{name}: its inputs give no delta that can be computed; give more text, or use `mitigate --method shrink`"
    )


class _OneHot:
    """Diagonal system of one-hot inputs."""

    def __init__(self, task: Tensor, general: Tensor) -> None:
        self.task, self.general, self.mean = task, general, float(task.mean())

    def products(self, R: Tensor) -> Tensor:
        """Compute ``C_t R``."""
        return R * self.task[:, None]

    def solve(self, B: Tensor, s: float, weights: Sequence[float], sizes: Sizes) -> list[Tensor]:
        """Solve ``(s I + C_t + μ C_g) X = B`` for each μ."""
        return [B / (self.task + s + mu * self.general)[:, None] for mu in weights]


class _Direct:
    """System as a dense matrix. Memory holds four: two moments, the system for one μ, and its Cholesky factor."""

    def __init__(self, task: RowMoments, general: RowMoments) -> None:
        self.task, self.general = task.matrix(), general.matrix()
        self.mean = task.trace / task.size

    def products(self, R: Tensor) -> Tensor:
        """Compute ``C_t R``."""
        return self.task @ R

    def solve(self, B: Tensor, s: float, weights: Sequence[float], sizes: Sizes) -> list[Tensor] | None:
        """Solve for each μ; return None if any solution misses `RESIDUAL`."""
        found = []
        for mu in weights:
            system = torch.add(self.task, self.general, alpha=mu)
            system.diagonal().add_(s)
            factor, failed = torch.linalg.cholesky_ex(system)
            if failed:
                return None
            right = torch.cholesky_solve(B, factor)
            if not torch.linalg.matrix_norm(system @ right - B) <= RESIDUAL * torch.linalg.matrix_norm(B):
                return None
            found.append(right)
        return found


class _Products(TwoMoments):
    """System accessed by products with the inputs."""

    def __init__(self, task: RowMoments, general: RowMoments) -> None:
        super().__init__(task, general)
        self.mean = task.trace / task.size

    def products(self, R: Tensor) -> Tensor:
        """Compute ``C_t R``."""
        return self.task.products(R)


def matrices_bytes(n: int) -> int:
    """Return the bytes that a system of n inputs needs when it is solved as a matrix."""
    return MATRICES_BYTES * n * n


def is_direct(n: int, memory: int) -> bool:
    """Test whether a system of n inputs fits in `memory` as a matrix; otherwise it is solved by products with the inputs."""
    return matrices_bytes(n) <= memory


def system_of(task: Moments, general: Moments, memory: int) -> _OneHot | _Direct | _Products:
    """Choose how to solve the system."""
    if isinstance(task, OneHotMoments):
        assert isinstance(general, OneHotMoments)
        return _OneHot(task.diagonal, general.diagonal)
    assert isinstance(general, RowMoments)
    return (_Direct if is_direct(task.size, memory) else _Products)(task, general)


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
