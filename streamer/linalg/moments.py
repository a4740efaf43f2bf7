"""Change deltas by second moments of inputs: reduce them on general inputs, or refit them to two texts.

`reduced` computes a smaller Δ'. Let ``C ≈ V diag(e) Vᵀ + ρ (I − V Vᵀ)`` (n, n), where V (n, k) are the leading eigenvectors and ρ is the
mean of the other eigenvalues:

    Δ' = Δ (I + ν C)⁻ᵖ

Every direction v of the inputs keeps ``(1 + ν e)⁻ᵖ`` of ``Δ v``. For p = 1 this minimises ``‖Δ' − Δ‖² + ν E‖Δ' x‖²``, a soft projection on
the null space of general inputs. A smaller p spares the leading directions, which task inputs share. For factors ``Δ = L Rᵀ`` only R
changes, so the rank stays. ν is chosen so that Δ' keeps a share λ of the delta's energy ``E‖Δ x‖²``.

`refit` computes right factors with which a delta keeps its response to one text's inputs, and loses its response to those of another. Let x
be a module's inputs in the model to imitate, x' its inputs in the model that is being repaired, and ``Δ = Q D₀ᵀ`` with ``QᵀQ = I``:

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

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from streamer.linalg.operators import Delta, Dense, LowRank, linear

POWER = 0.25
"""p. On ten adapters of two bases, at nine tenths of the learning kept, p = 1, 1/2 and 1/4 leave 0.87, 0.85 and 0.84 of the forgetting that
`shrink` leaves (0.98, 0.93 and 0.90 at worst). One ν for all matrices leaves more: 0.91 with p = 1, 1.13 at worst."""

HALVINGS = 100
"""Bisection steps for the logarithm of ν; enough to meet the share to the last bits of float64."""

RANGE = 100.0
"""Search range for ν: the logarithm extends this far on each side of the inverse of the largest eigenvalue."""


@dataclass(frozen=True)
class Spectrum:
    """Approximate spectrum of the second moments C (n, n) of a module's inputs; float64.

    Attributes
    ----------
    values
        The leading eigenvalues e (k,); for one-hot inputs the whole diagonal (n,).
    rest
        Mean ρ of the other eigenvalues.
    vectors
        Eigenvectors V (n, k), orthonormal; None for one-hot inputs.
    """

    values: Tensor
    rest: float = 0.0
    vectors: Tensor | None = None


def reduced(delta: Delta, spectrum: Spectrum, share: float) -> Delta:
    """Compute the Δ' that keeps `share` (in [0, 1]) of Δ's energy on inputs with this spectrum; return Δ itself if it has no energy.

    Returns
    -------
    LowRank or Dense
        Float64 factors with Δ's L and rank; a dense Δ' has Δ's dtype.
    """
    energies, rest = _energies(delta, spectrum)
    if share == 1 or not float(energies.sum()) + rest > 0:
        return delta
    gains, of_rest = _gains(spectrum, _find_nu(spectrum, energies, rest, share))
    if isinstance(delta, LowRank):
        return LowRank(delta.L.double(), _scaled(delta.R.double(), spectrum, gains, of_rest))
    return Dense(_scaled(delta.dense().T, spectrum, gains, of_rest).T)


def _energies(delta: Delta, spectrum: Spectrum) -> tuple[Tensor, float]:
    """Compute ``‖Δ v‖² e`` for each known direction (k,), and the sum over all others."""
    V = spectrum.vectors
    if isinstance(delta, LowRank):
        core = torch.linalg.qr(delta.L.double())[1]
        right = delta.R.double()
        known = core @ (right.T if V is None else right.T @ V)
        norm = torch.linalg.matrix_norm(core @ right.T)
    else:
        known = delta.dense() if V is None else delta.matmat(V.to(delta.like)).double()
        norm = torch.tensor(delta.norm())
    squares = torch.linalg.vector_norm(known, dim=0, dtype=torch.float64) ** 2
    return squares * spectrum.values, spectrum.rest * max(0.0, float(norm**2 - squares.sum()))


def _gains(spectrum: Spectrum, nu: float) -> tuple[Tensor, float]:
    """Compute the factor for each known direction (k,), and the one for all others."""
    if math.isinf(nu):
        return (spectrum.values == 0).double(), float(spectrum.rest == 0)
    return (1 + nu * spectrum.values) ** -POWER, float((1 + nu * spectrum.rest) ** -POWER)


def _find_nu(spectrum: Spectrum, energies: Tensor, rest: float, share: float) -> float:
    """Find the ν at which `share` of the energy remains; infinity for share 0."""
    if share == 0:
        return math.inf
    total = float(energies.sum()) + rest
    middle = -math.log(max(float(spectrum.values.max()), spectrum.rest))
    low = middle - RANGE
    high = middle + RANGE
    for _ in range(HALVINGS):
        log_nu = (low + high) / 2
        gains, of_rest = _gains(spectrum, math.exp(log_nu))
        remaining = float((energies * gains**2).sum()) + rest * of_rest**2
        if remaining > share * total:
            low = log_nu
        else:
            high = log_nu
    return math.exp(low)


def _scaled(R: Tensor, spectrum: Spectrum, gains: Tensor, of_rest: float) -> Tensor:
    """Scale the row side of R (n, r) along each direction, in R's dtype."""
    V = spectrum.vectors
    if V is None:
        return R * gains.to(R)[:, None]
    V = V.to(R)
    return (R * of_rest).addmm_(V, (gains - of_rest).to(R)[:, None] * (V.T @ R))


DECOMPOSED = 512
"""Largest n for which C is formed and decomposed directly."""

MORE = 16
ROUNDS = 8
"""Extra vectors in the iteration, and products with C. They give eigenvalues to 1e-3 if the last iterated eigenvalue is a third of the last
one wanted."""

ROWS = 512
"""Rows that are converted to float64 at a time."""


def leading_vectors(inputs: Sequence[Tensor], tokens: int, count: int) -> tuple[Tensor, Tensor]:
    """Compute the leading eigenvalues (k,), falling, and eigenvectors (n, k) of ``C = Σ x xᵀ / tokens`` in float64, k = min(count, n).

    Above `DECOMPOSED`, uses subspace iteration (Halko, Martinsson and Tropp, SIAM Review 2011) from the same random vectors in every run.

    Parameters
    ----------
    inputs
        Inputs x, (t, n) each, in float32.
    tokens
        Number of tokens, which may exceed the number of inputs: an expert receives only some of them.
    """
    n = inputs[0].shape[1]
    device = inputs[0].device

    def products(V: Tensor) -> Tensor:
        out = torch.zeros_like(V)
        for rows in (rows.to(V.dtype) for x in inputs for rows in torch.split(x, ROWS)):
            out.addmm_(rows.T, rows @ V)
        return out.div_(tokens)

    if n <= DECOMPOSED:
        basis = torch.eye(n, dtype=torch.float64).to(device)
    else:
        V = torch.randn(n, min(n, count + MORE), generator=torch.Generator().manual_seed(0)).to(
            device
        )
        for _ in range(ROUNDS):
            V = products(torch.linalg.qr(V)[0])
        basis = torch.linalg.qr(V.double())[0]
    core = basis.T @ products(basis)
    values, rotation = torch.linalg.eigh((core + core.T) / 2)
    return values.flip(0)[:count].clamp_min(0), basis @ rotation.flip(1)[:, :count]


RIDGE = 0.3
"""ε. From 0.3 to 3, what is kept and what diverges on unseen text is the same; at 0.1 a pretrained model diverges half as much again."""

GENERAL_RIDGE = 0.05
"""γ. From 0.02 to 0.25, what is kept and what diverges on unseen text lies on one curve; at 0 it diverges more for what it keeps."""

LEAST = 1e-3
"""Smallest singular value of L to refit, relative to the largest. Along weaker directions R stays unchanged: a change of Δ there would need
a change of R larger by the inverse factor."""

SOLVE_TOLERANCE = 1e-5
"""Largest relative error of a solution. No eigenvalue is below the shift, so the residual bounds the error."""

REFINEMENTS = 8
"""Most refinements of a solution by the float32 Gram matrix; one or two are usual. Then everything is float64."""


class System:
    """``C'_t + μ C'_g`` of a module's inputs, as the rows ``[X'_t / √N_t; √(μ / N_g) X'_g]``, which are never joined: they are large.

    With fewer rows than inputs, the Gram matrix of the rows serves to solve, by Woodbury's identity; with more, the matrix itself.

    Parameters
    ----------
    task, general
        Inputs (t, n) in the model that is being repaired, in parts.
    tokens
        N_t and N_g: tokens of both texts, of which an expert receives only some.

    Attributes
    ----------
    parts
        At most `ROWS` inputs each, with the scale of the rows.
    s, shift
        s, and s + μ g.
    """

    def __init__(
        self,
        task: Sequence[Tensor],
        general: Sequence[Tensor],
        tokens: tuple[int, int],
        weight: float,
    ) -> None:
        n = task[0].shape[1]
        traces = list[float]()
        self.parts: list[tuple[Tensor, float]] = []
        for inputs, scale in ((task, tokens[0] ** -0.5), (general, (weight / tokens[1]) ** 0.5)):
            self.parts += [(rows, scale) for x in inputs for rows in torch.split(x, ROWS)]
            norms = (float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in inputs)
            traces.append(sum((scale * norm) ** 2 for norm in norms))
        self.s = RIDGE * traces[0] / n
        self.shift = self.s + GENERAL_RIDGE * traces[1] / n
        self.few = sum(len(x) for x, _ in self.parts) < n
        self._grams: dict[torch.dtype, Tensor] = {}

    def _gram(self, dtype: torch.dtype) -> Tensor:
        """Return the lower triangle of the Gram matrix of the rows, or of the columns if there are more rows, with products in a dtype."""
        if dtype not in self._grams:
            n = self.parts[0][0].shape[1]
            ends = [*accumulate(len(x) for x, _ in self.parts)]
            size = ends[-1] if self.few else n
            out = self._grams[dtype] = torch.zeros(
                size, size, dtype=torch.float64, device=self.parts[0][0].device
            )
            for a, (x, scale) in enumerate(self.parts):
                rows = x.to(dtype)
                if not self.few:
                    out.add_(rows.T @ rows, alpha=scale**2)
                for b, (y, other) in enumerate(self.parts[: a + 1] if self.few else ()):
                    block = linear(rows, y.to(dtype)).double() * (scale * other)
                    out[ends[a] - len(x) : ends[a], ends[b] - len(y) : ends[b]] = block
        return self._grams[dtype]

    def solve(self, B: Tensor) -> Tensor | None:
        """Solve ``(C'_t + s I + μ (C'_g + g I)) X = B`` for B (n, k) in float64; None if the residual stays too large."""
        s = self.shift
        for dtype in (torch.float32, torch.float64):
            matrix = self._gram(dtype).clone()
            matrix.diagonal().add_(s)
            factor, failed = torch.linalg.cholesky_ex(matrix)
            if failed:
                continue
            X = self._inverse(factor, B, dtype)
            for _ in range(REFINEMENTS):
                residual = B - s * X - self._products(X)
                size = torch.linalg.vector_norm(X, dim=0)
                if bool(
                    (torch.linalg.vector_norm(residual, dim=0) <= SOLVE_TOLERANCE * s * size).all()
                ):
                    return X
                X = X + self._inverse(factor, residual, dtype)
        return None

    def _inverse(self, factor: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
        if not self.few:
            return torch.cholesky_solve(B, factor)
        right = torch.cat([(x.to(dtype) @ B.to(dtype)).double() * scale for x, scale in self.parts])
        rest = B.clone()
        inner = torch.cholesky_solve(right, factor)
        for (x, scale), part in zip(
            self.parts, torch.split(inner, [len(x) for x, _ in self.parts]), strict=True
        ):
            rest -= (x.to(dtype).T @ (part * scale).to(dtype)).double()
        return rest / self.shift

    def _products(self, X: Tensor) -> Tensor:
        out = torch.zeros_like(X)
        for x, scale in self.parts:
            rows = x.double()
            out.addmm_(rows.T, rows @ X, alpha=scale**2)
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
    """A module's inputs on a text: in the model to imitate and in the one that is being repaired, the same rows in the same parts.

    Attributes
    ----------
    tokens
        Tokens of the text.
    """

    before: Sequence[Tensor]
    now: Sequence[Tensor]
    tokens: int

    def cross(self, P: Tensor, D: Tensor | None = None) -> Tensor | float:
        """Compute ``E[x' ((x − x')ᵀP + xᵀD)]`` (n, k); 0 if x is x' and D is None."""
        total: Tensor | float = 0.0
        for x, y in zip(self.before, self.now, strict=True):
            terms = ([] if D is None else [x @ D.float()]) + (
                [] if x is y else [(x - y) @ P.float()]
            )
            if terms:
                total = total + (y.T @ sum(terms)).double() / self.tokens
        return total


def refit(
    delta: Refit, task: TextInputs, general: TextInputs, weight: float, system: System
) -> Tensor | None:
    """Compute R' (n, r) in float64; None if the system cannot be solved."""
    solution = system.solve(
        task.cross(delta.P, delta.D) + system.s * delta.D + weight * general.cross(delta.P)
    )
    if solution is None:
        return None
    change: Tensor = (solution - delta.D).to(delta.T.device) @ torch.linalg.pinv(delta.T).T
    return delta.R.double() + change


def refit_one_hot(R: Tensor, task: Tensor, general: Tensor, weight: float) -> Tensor:
    """Compute R' for one-hot inputs, which no module changes, from the frequency of each (n,); tokens in neither text keep theirs."""
    ridged = task + RIDGE * task.mean()
    return R.double() * (ridged / (ridged + weight * general))[:, None].to(R.device)
