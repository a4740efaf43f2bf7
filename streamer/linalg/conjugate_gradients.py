"""Solve ``(s I + C_t + μ C_g) X = B`` for several μ, using only products with C_t and C_g.

Preconditioned conjugate gradients run in float32; residuals in float64 refine their solutions. Inputs can be thousands of times larger
along a few directions than along the others, which makes such systems hard. A randomized Nyström preconditioner (Frangella, Tropp and
Udell, SIAM J. Matrix Anal. Appl. 44(2), 2023), built for both matrices in one basis, removes this difficulty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from streamer.linalg.second_moments import RowMoments

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
