"""Represent second moments of inputs, reduce deltas by them, and solve systems with them.

Let ``C ≈ V diag(e) Vᵀ + ρ (I − V Vᵀ)`` (n, n), where V (n, k) are the leading eigenvectors and ρ is the mean of the other eigenvalues:

    Δ' = Δ (I + ν C)⁻ᵖ

Every direction v of the inputs keeps ``(1 + ν e)⁻ᵖ`` of ``Δ v``. For p = 1 this minimises ``‖Δ' − Δ‖² + ν E‖Δ' x‖²``, a soft projection on
the null space of general inputs. A smaller p spares the leading directions, which task inputs share. For factors ``Δ = L Rᵀ`` only R
changes, so the rank stays. ν is chosen so that Δ' keeps a share λ of the delta's energy ``E‖Δ x‖²``.

Represent second moments ``C = Σ x xᵀ / N`` (n, n) of inputs x: by rows read for each product, or by counts of one-hot inputs.

Solve ``(s I + C_t + μ C_g) X = B`` for several μ, using only products with C_t and C_g.

Preconditioned conjugate gradients run in float32; residuals in float64 refine their solutions. Inputs can be thousands of times larger
along a few directions than along the others, which makes such systems hard. A randomized Nyström preconditioner (Frangella, Tropp and
Udell, SIAM J. Matrix Anal. Appl. 44(2), 2023), built for both matrices in one basis, removes this difficulty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamer.linalg.operators import Delta, Dense, LowRank
from streamer.linalg.torch_state import CPU

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


def leading(V: Tensor, C_V: Tensor) -> tuple[Tensor, Tensor]:
    """Compute eigenvalues (k,), falling, and eigenvectors (n, k) of a symmetric C within the span of orthonormal V."""
    core = V.T @ C_V
    values, rotation = torch.linalg.eigh((core + core.T) / 2)
    return values.flip(0).clamp_min(0), V @ rotation.flip(1)


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
    gains, of_rest = _gains(spectrum, _weight(spectrum, energies, rest, share))
    if isinstance(delta, LowRank):
        return LowRank(delta.L.double(), _scaled(delta.R.double(), spectrum, gains, of_rest))
    assert isinstance(delta, Dense)
    return Dense(_scaled(delta.dense().T, spectrum, gains, of_rest).T)


def _energies(delta: Delta, spectrum: Spectrum) -> tuple[Tensor, float]:
    """Compute ``‖Δ v‖² e`` for each known direction (k,), and the sum over all others."""
    V = spectrum.vectors
    if isinstance(delta, LowRank):
        core, right = torch.linalg.qr(delta.L.double())[1], delta.R.double()
        known = core @ (right.T if V is None else right.T @ V)
        whole = torch.linalg.matrix_norm(core @ right.T)
    else:
        assert isinstance(delta, Dense)
        known = delta.dense() if V is None else delta.matmat(V.to(delta.like)).double()
        whole = torch.tensor(delta.norm())
    squares = torch.linalg.vector_norm(known, dim=0, dtype=torch.float64) ** 2
    return squares * spectrum.values, spectrum.rest * max(0.0, float(whole**2 - squares.sum()))


def _gains(spectrum: Spectrum, weight: float) -> tuple[Tensor, float]:
    """Compute the factor for each known direction (k,), and the one for all others."""
    if math.isinf(weight):
        return (spectrum.values == 0).double(), float(spectrum.rest == 0)
    return (1 + weight * spectrum.values) ** -POWER, float((1 + weight * spectrum.rest) ** -POWER)


def _weight(spectrum: Spectrum, energies: Tensor, rest: float, share: float) -> float:
    """Find the ν at which `share` of the energy remains; infinity for share 0."""
    if share == 0:
        return math.inf
    whole = float(energies.sum()) + rest
    middle = -math.log(max(float(spectrum.values.max()), spectrum.rest))
    low, high = middle - RANGE, middle + RANGE
    for _ in range(HALVINGS):
        weight = (low + high) / 2
        gains, of_rest = _gains(spectrum, math.exp(weight))
        left = float((energies * gains**2).sum()) + rest * of_rest**2
        low, high = (weight, high) if left > share * whole else (low, weight)
    return math.exp(low)


def _scaled(R: Tensor, spectrum: Spectrum, gains: Tensor, of_rest: float) -> Tensor:
    """Scale the row side of R (n, r) along each direction, in R's dtype."""
    V = spectrum.vectors
    if V is None:
        return R * gains.to(R)[:, None]
    V = V.to(R)
    return (R * of_rest).addmm_(V, (gains - of_rest).to(R)[:, None] * (V.T @ R))


@dataclass(frozen=True)
class RowMoments:
    """Second moments of inputs that are read a few at a time.

    Attributes
    ----------
    size
        n.
    count
        N. It may exceed the number of inputs: an expert receives only some of the text's tokens.
    trace
        Trace of C.
    blocks
        Reads all inputs in order, (t, n) at a time, in float32.
    device
        Device of the inputs and of the computation.
    """

    size: int
    count: int
    trace: float
    blocks: Callable[[], Iterator[Tensor]]
    device: torch.device = CPU

    def products(self, V: Tensor) -> Tensor:
        """Compute ``C V`` (n, k) for V (n, k), in V's dtype."""
        out = torch.zeros_like(V)
        for rows in self.blocks():
            x = rows.to(V.dtype)
            out.addmm_(x.T, x @ V)
        return out.div_(self.count)

    def matrix(self) -> Tensor:
        """Form C in float64."""
        out = torch.zeros(self.size, self.size, dtype=torch.float64, device=self.device)
        for rows in self.blocks():
            exact = rows.double()
            out.addmm_(exact.T, exact)
        return out.div_(self.count)


@dataclass(frozen=True)
class OneHotMoments:
    """Second moments of one-hot inputs.

    Attributes
    ----------
    diagonal
        Diagonal of C (n,), float64; all other entries are 0.
    """

    diagonal: Tensor

    @property
    def size(self) -> int:
        """Return n."""
        return len(self.diagonal)

    @property
    def device(self) -> torch.device:
        """Return the diagonal's device."""
        return self.diagonal.device

    @property
    def trace(self) -> float:
        """Return the sum of the diagonal."""
        return float(self.diagonal.sum())


Moments = RowMoments | OneHotMoments

SMALL = 512
"""Largest n for which C is formed and decomposed directly."""

MORE, ROUNDS = 16, 8
"""Extra vectors in the iteration, and products with C. They give eigenvalues to 1e-3 if the last iterated eigenvalue is a third of the last
one wanted."""


def leading_vectors(moments: RowMoments, count: int) -> tuple[Tensor, Tensor]:
    """Compute the leading eigenvalues (k,), falling, and eigenvectors (n, k) of C in float64, k = min(count, n).

    Above `SMALL`, uses subspace iteration (Halko, Martinsson and Tropp, SIAM Review 2011) from the same random vectors in every run.
    """
    if moments.size <= SMALL:
        values, vectors = torch.linalg.eigh(moments.matrix())
        return values.flip(0)[:count].clamp_min(0), vectors.flip(1)[:, :count]
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(moments.size, min(moments.size, count + MORE), generator=generator).to(moments.device)
    for _ in range(ROUNDS):
        V = moments.products(torch.linalg.qr(V)[0])
    basis = torch.linalg.qr(V.double())[0]
    values, vectors = leading(basis, moments.products(basis.float()).double())
    return values[:count], vectors[:, :count]


TOLERANCE = 1e-5
"""Largest relative error of a solution. No eigenvalue is below s, so the residual bounds the error; most errors are far smaller."""

SKETCH = 512
"""Most columns in the sketch of each matrix; a smaller matrix gets an eighth of its size."""

REDUCTION = 1e-4
"""Factor by which a residual shrinks before it is recomputed: the float32 recurrence drifts from the true residual."""

STEPS, REFINEMENTS = 500, 8
"""Most steps between two refinements, and most refinements. Moments of trained models took 40 to 150 steps and 2 or 3 refinements."""

SHIFT = 1e-6
"""Shift before the Cholesky factorisation, relative to the sketch's norm: float32 cannot distinguish smaller values from zero."""

Sizes = Callable[[Tensor], list[float]]
"""Function from columns to the sizes of their parts; each part must reach the tolerance by itself."""


class TwoMoments:
    """System of two second moments, with one basis to precondition it."""

    def __init__(self, task: RowMoments, general: RowMoments) -> None:
        self.task, self.general = task, general
        n, k = task.size, sketch_size(task.size)
        omega = torch.linalg.qr(torch.randn(n, k, generator=torch.Generator().manual_seed(0)).to(task.device))[0]
        sketches = torch.cat([task.products(omega), general.products(omega)], 1)
        inner = (omega.T @ sketches).double()
        self.basis, R = torch.linalg.qr(sketches)
        del sketches
        within = (self.basis.T @ omega).double()
        self._cores, self._rests = [], []
        for G, own, moments in zip(
            torch.split(inner, k, 1), torch.split(R.double(), k, 1), (task, general), strict=True
        ):
            shift = SHIFT * float(torch.linalg.matrix_norm(own))
            one = torch.eye(k, dtype=torch.float64, device=task.device)
            factor, _ = torch.linalg.cholesky_ex((G + G.T) / 2 + shift * one)
            half = torch.linalg.solve_triangular(factor, (own + shift * within).T, upper=False)
            self._cores.append(half.T @ half)
            self._rests.append(max(0.0, moments.trace - float(self._cores[-1].trace())) / n)

    def solve(self, B: Tensor, s: float, weights: Sequence[float], sizes: Sizes) -> list[Tensor] | None:
        """Solve the system for each μ.

        Parameters
        ----------
        B
            Right-hand side (n, k), float64.
        s
            Shift, above 0.

        Returns
        -------
        list of Tensor or None
            (n, k) in float64 for each μ; None if any solution misses `TOLERANCE`.
        """
        norms = torch.linalg.vector_norm(B, dim=0)
        norms[norms == 0] = 1
        B = B / norms
        inverses = [self._preconditioner(s, mu) for mu in weights]
        found = [inverse(B.float()).double() for inverse in inverses]
        left = list(range(len(weights)))
        for _ in range(REFINEMENTS + 1):
            products = self._products([found[i] for i in left], s, [weights[i] for i in left])
            residuals = {i: B - product for i, product in zip(left, products, strict=True)}
            errors = {
                i: max(
                    e / max(s * size, 1e-300)
                    for e, size in zip(sizes(one * norms), sizes(found[i] * norms), strict=True)
                )
                for i, one in residuals.items()
            }
            left = [i for i in left if not errors[i] <= TOLERANCE]
            if not left:
                return [one * norms for one in found]
            if not all(math.isfinite(errors[i]) for i in left):
                return None
            wanted = [max(REDUCTION, TOLERANCE / (2 * errors[i])) for i in left]
            changes = self._steps(
                [residuals[i].float() for i in left], s, [weights[i] for i in left], [inverses[i] for i in left], wanted
            )
            for i, change in zip(left, changes, strict=True):
                found[i] += change
        return None

    def _steps(
        self,
        residuals: list[Tensor],
        s: float,
        weights: Sequence[float],
        inverses: Sequence[Callable[[Tensor], Tensor]],
        wanted: Sequence[float],
    ) -> list[Tensor]:
        """Iterate for all μ at once, until every column's residual is at most `wanted` times its first."""
        tiny = torch.finfo(torch.float32).tiny
        changes = [torch.zeros_like(r) for r in residuals]
        directions = [inverse(r) for inverse, r in zip(inverses, residuals, strict=True)]
        squares = [(r * z).sum(0) for r, z in zip(residuals, directions, strict=True)]
        ends = [by * torch.linalg.vector_norm(r, dim=0) for by, r in zip(wanted, residuals, strict=True)]
        left = list(range(len(residuals)))
        for _ in range(STEPS):
            products = self._products([directions[i] for i in left], s, [weights[i] for i in left])
            for i, product in zip(list(left), products, strict=True):
                step = squares[i] / (directions[i] * product).sum(0).clamp_min(tiny)
                changes[i] += step * directions[i]
                residuals[i] -= step * product
                if bool((torch.linalg.vector_norm(residuals[i], dim=0) <= ends[i]).all()):
                    left.remove(i)
                    continue
                z = inverses[i](residuals[i])
                before, squares[i] = squares[i], (residuals[i] * z).sum(0)
                directions[i] = z + squares[i] / before.clamp_min(tiny) * directions[i]
            if not left:
                break
        return changes

    def _products(self, X: Sequence[Tensor], s: float, weights: Sequence[float]) -> list[Tensor]:
        """Compute ``(s I + C_t + μ C_g) X`` for each μ, in one pass over the inputs."""
        whole, sizes = torch.cat([*X], 1), [x.shape[1] for x in X]
        pairs = zip(*(torch.split(of.products(whole), sizes, 1) for of in (self.task, self.general)), strict=True)
        return [s * x + t + mu * g for x, mu, (t, g) in zip(X, weights, pairs, strict=True)]

    def _preconditioner(self, s: float, mu: float) -> Callable[[Tensor], Tensor]:
        """Approximate the inverse: by both sketches within the basis, by the mean of the remaining trace outside it."""
        Q = self.basis
        one = torch.eye(Q.shape[1], dtype=torch.float64, device=Q.device)
        rest = s + self._rests[0] + mu * self._rests[1]
        core = self._cores[0] + mu * self._cores[1] + rest * one
        inner = (torch.linalg.inv(core) - one / rest).float()
        return lambda V: Q @ (inner @ (Q.T @ V)) + V / rest


def sketch_size(n: int) -> int:
    """Return the number of columns of a sketch."""
    return min(SKETCH, -(-n // 8))


def solving_bytes(n: int, columns: int, weights: int) -> int:
    """Estimate the peak memory in bytes of solving: building the bases, or the vectors for each μ and the work within the basis."""
    k = sketch_size(n)
    return 4 * max(7 * n * k, n * (2 * k + 20 * columns * weights) + (2 * k) ** 2 * (14 + weights))
