"""Refit right factors so that a delta keeps its response to one text's inputs, and loses its response to those of another.

Let x be a module's inputs in the model to imitate, x' its inputs in the model that is being repaired, and ``Δ = Q D₀ᵀ`` with ``QᵀQ = I``:

    D' = argmin  E_t ‖(W + Q D'ᵀ) x' − (W + Δ) x‖² + s ‖D' − D₀‖² + μ (E_g ‖(W + Q D'ᵀ) x' − W x‖² + g ‖D'‖²)
    s = ε tr(C'_t) / n,   g = γ tr(C'_g) / n

Only the parts of the norms along Q depend on D'. With ``P = Wᵀ Q`` and ``C' = E[x' x'ᵀ]``,

    (C'_t + s I + μ (C'_g + g I)) D' = E_t[x' ((x − x')ᵀP + xᵀD₀)] + s D₀ + μ E_g[x' (x − x')ᵀ] P

Both ridges say what is expected of inputs that the texts do not contain: the task has them a little, and general text too.
If x' = x, this is the regression mean of the delta and zero (Jin, Ren, Preotiuc-Pietro and Cheng, Dataless Knowledge Fusion by Merging
Weights of Language Models, ICLR 2023). Each module corrects what the modules before it failed to remove, as layer-by-layer pruning and
quantization do (compare Frantar and Alistarh, Optimal Brain Compression, NeurIPS 2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from streamer.linalg.operators import linear

RIDGE = 0.3
"""ε. From 0.3 to 3, what is kept and what diverges on unseen text is the same; at 0.1 a pretrained model diverges half as much again."""

GENERAL_RIDGE = 0.05
"""γ. From 0.02 to 0.25, what is kept and what diverges on unseen text lies on one curve; at 0 it diverges more for what it keeps."""

LEAST = 1e-3
"""Smallest singular value of L to refit, relative to the largest. Along weaker directions R stays unchanged: a change of Δ there would need
a change of R larger by the inverse factor."""

TOLERANCE = 1e-5
"""Largest relative error of a solution. No eigenvalue is below the shift, so the residual bounds the error."""

REFINEMENTS = 8
"""Most refinements of a solution by the float32 Gram matrix; one or two are usual. Then everything is float64."""

ROWS = 512
"""Rows that are converted to float64 at a time."""


class System:
    """``C'_t + μ C'_g`` of a module's inputs, as the rows ``[X'_t / √N_t; √(μ / N_g) X'_g]``.

    With fewer rows than inputs, the Gram matrix of the rows serves to solve, by Woodbury's identity; with more, the matrix itself.

    Parameters
    ----------
    task, general
        Inputs (t, n) in the model that is being repaired.
    tokens
        N_t and N_g: tokens of both texts, of which an expert receives only some.

    Attributes
    ----------
    s, shift
        s, and s + μ g.
    """

    def __init__(self, task: Tensor, general: Tensor, tokens: tuple[int, int], weight: float) -> None:
        scales = tokens[0] ** -0.5, (weight / tokens[1]) ** 0.5
        self.rows = torch.cat([task * scales[0], general * scales[1]])
        traces = [
            float(torch.linalg.vector_norm(own, dtype=torch.float64)) ** 2
            for own in self.rows.tensor_split([len(task)])
        ]
        self.s = RIDGE * traces[0] / task.shape[1]
        self.shift = self.s + GENERAL_RIDGE * traces[1] / task.shape[1]
        self.few = len(self.rows) < task.shape[1]

    @cached_property
    def _gram(self) -> Tensor:
        return (linear(self.rows, self.rows) if self.few else self.rows.T @ self.rows).double()

    @cached_property
    def _exact_gram(self) -> Tensor:
        size = len(self.rows) if self.few else self.rows.shape[1]
        out = torch.zeros(size, size, dtype=torch.float64, device=self.rows.device)
        for block in torch.split(self.rows, ROWS, 1 if self.few else 0):
            exact = block.double()
            out.addmm_(*((exact, exact.T) if self.few else (exact.T, exact)))
        return out

    def solve(self, B: Tensor) -> Tensor | None:
        """Solve ``(C'_t + s I + μ (C'_g + g I)) X = B`` for B (n, k) in float64; None if the residual stays too large."""
        s = self.shift
        for gram, dtype in (("_gram", torch.float32), ("_exact_gram", torch.float64)):
            matrix: Tensor = getattr(self, gram).clone()
            matrix.diagonal().add_(s)
            factor, failed = torch.linalg.cholesky_ex(matrix)
            if failed:
                continue
            X = self._inverse(factor, B, dtype)
            for _ in range(REFINEMENTS):
                residual = B - s * X - self._products(X)
                size = torch.linalg.vector_norm(X, dim=0)
                if bool((torch.linalg.vector_norm(residual, dim=0) <= TOLERANCE * s * size).all()):
                    return X
                X = X + self._inverse(factor, residual, dtype)
        return None

    def _inverse(self, factor: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
        if not self.few:
            return torch.cholesky_solve(B, factor)
        rows = self.rows.to(dtype)
        inner = torch.cholesky_solve((rows @ B.to(dtype)).double(), factor)
        return (B - (rows.T @ inner.to(dtype)).double()) / self.shift

    def _products(self, X: Tensor) -> Tensor:
        out = torch.zeros_like(X)
        for block in torch.split(self.rows, ROWS):
            exact = block.double()
            out.addmm_(exact.T, exact @ X)
        return out


@dataclass(frozen=True)
class Refit:
    """What the refit of one delta for all candidates shares: ``Δ = Q D₀ᵀ``, and ``P = Wᵀ Q``, in float64.

    Attributes
    ----------
    R
        The delta's right factor (n, r).
    T
        ``L ≈ Q T`` (k, r).
    D, P
        D₀ and P (n, k).
    """

    R: Tensor
    T: Tensor
    D: Tensor
    P: Tensor


def basis(L: Tensor) -> tuple[Tensor, Tensor]:
    """Factor ``L ≈ Q T`` (m, k)(k, r) with orthonormal Q, keeping only directions above `LEAST`."""
    Q, R = torch.linalg.qr(L.double())
    U, S, Vh = torch.linalg.svd(R)
    k = int((LEAST * S[0] < S).sum())
    return Q @ U[:, :k], S[:k, None] * Vh[:k]


@dataclass(frozen=True)
class TextInputs:
    """A module's inputs on a text: in the model to imitate and in the model that is being repaired, with rows in the same order.

    Attributes
    ----------
    tokens
        Tokens of the text.
    """

    before: Tensor
    now: Tensor
    tokens: int

    def cross(self, P: Tensor, D: Tensor | None = None) -> Tensor:
        """Compute ``E[x' ((x − x')ᵀP + xᵀD)]`` (n, k)."""
        target = 0 if D is None else self.before @ D.float()
        if self.before is not self.now:
            target = target + (self.before - self.now) @ P.float()
        return (self.now.T @ target).double() / self.tokens


def refit(delta: Refit, task: TextInputs, general: TextInputs, weight: float, system: System) -> Tensor | None:
    """Compute R' (n, r) in float64; None if the system cannot be solved."""
    wanted = task.cross(delta.P, delta.D) + system.s * delta.D
    if general.before is not general.now:
        wanted += weight * general.cross(delta.P)
    found = system.solve(wanted)
    if found is None:
        return None
    change: Tensor = (found - delta.D).to(delta.T.device) @ torch.linalg.pinv(delta.T).T
    return delta.R.double() + change


def refit_one_hot(R: Tensor, task: Tensor, general: Tensor, weight: float) -> Tensor:
    """Compute R' for one-hot inputs, which no module changes, from the frequency of each (n,); tokens in neither text keep theirs."""
    kept = task + RIDGE * task.mean()
    return R.double() * (kept / (kept + weight * general))[:, None].to(R.device)
