"""Model a convex function of many coefficients by a quadratic, and minimise that within bounds.

The curvature ``A = diag(d) + W diag(σ) Wᵀ`` is never formed: a product costs O(P k) for P coefficients and k columns; solving for the
free coefficients costs O(P k²) by the Woodbury identity. Sums over the coefficients use `np.einsum`: `@` splits sums over long vectors by
its library's threads, so that the last bits depend on the number of cores.

The model is built from gradients at a few points. Between points x_i and x_j a smooth function's gradients differ by
``y = ∇f(x_j) − ∇f(x_i) = H s``, ``s = x_j − x_i``, where H is the mean curvature between the two. Each point is paired with the nearest
earlier one, for which H has changed least. The model starts with the diagonal

    d_p = √( Σ y_p² / Σ s_p² )        over all pairs

which, unlike a quotient y_p / s_p, is positive and includes the contributions of p's neighbours. Then every pair is imposed in turn by the
update of Broyden, Fletcher, Goldfarb and Shanno (BFGS), which keeps the model positive definite:

    H ← H − H s sᵀ H / (sᵀ H s) + y yᵀ / (yᵀ s),        H s = y afterwards
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ITERATIONS = 200
"""Most Newton steps of `minimize_in_box`; ten to thirty are usual."""

TOLERANCE = 1e-10
"""The minimisation ends when the projected gradient is below this share of the largest gradient seen."""


@dataclass(frozen=True)
class Curvature:
    """A positive definite matrix ``diag(d) + W diag(σ) Wᵀ``.

    Attributes
    ----------
    diagonal
        d, positive: (P,).
    columns
        W: (P, k).
    signs
        σ, each 1 or another weight of either sign: (k,).
    """

    diagonal: Floats
    columns: Floats
    signs: Floats

    @classmethod
    def of_diagonal(cls, diagonal: Floats) -> Curvature:
        """Make ``diag(d)``."""
        return cls(diagonal, np.zeros((len(diagonal), 0)), np.zeros(0))

    def __matmul__(self, x: Floats) -> Floats:
        """Multiply by a vector (P,)."""
        weights = self.signs * np.einsum("pk,p->k", self.columns, x)
        product: Floats = self.diagonal * x + np.einsum("pk,k->p", self.columns, weights)
        return product

    def plus(self, other: Curvature, weight: float = 1.0) -> Curvature:
        """Make ``self + weight · other``."""
        return Curvature(
            self.diagonal + weight * other.diagonal,
            np.concatenate([self.columns, other.columns], axis=1),
            np.concatenate([self.signs, weight * other.signs]),
        )

    def with_columns(self, columns: Floats, signs: Floats) -> Curvature:
        """Make ``self + columns · diag(signs) · columnsᵀ``."""
        return Curvature(
            self.diagonal, np.concatenate([self.columns, columns], axis=1), np.concatenate([self.signs, signs])
        )

    def solve(self, b: Floats, free: NDArray[np.bool_]) -> Floats:
        """Solve ``A_FF x_F = b_F`` for the free coefficients F; the others of x are 0.

        With ``D = diag(d_F)`` and without columns of weight 0: ``x = D⁻¹ b − D⁻¹ W (diag(σ)⁻¹ + Wᵀ D⁻¹ W)⁻¹ Wᵀ D⁻¹ b``.
        """
        used = self.signs != 0
        W, d = self.columns[free][:, used], self.diagonal[free]
        y, scaled = b[free] / d, W / d[:, None]
        inner = np.diag(1 / self.signs[used]) + np.einsum("pi,pj->ij", W, scaled)
        x = np.zeros_like(b)
        x[free] = y - np.einsum("pk,k->p", scaled, np.linalg.solve(inner, np.einsum("pk,p->k", W, y)))
        return x


def dot(x: Floats, y: Floats) -> float:
    """Compute ``xᵀ y``."""
    return float(np.einsum("p,p->", x, y))


def minimize_in_box(A: Curvature, gradient: Floats, start: Floats, at: Floats | None = None) -> Floats:
    """Minimise ``gᵀ (x − a) + ½ (x − a)ᵀ A (x − a)`` over ``0 ≤ x ≤ 1`` by projected Newton steps (Bertsekas, 1982).

    A step solves for the coefficients that their gradient does not hold at a bound, then shortens the step along the projected path until
    the value falls. The minimum is unique because A is positive definite.

    Parameters
    ----------
    A
        The curvature.
    gradient
        g, the gradient at a: (P,).
    start
        Starting point within the bounds, (P,).
    at
        a, the point of the gradient; by default `start`.
    """
    a = start if at is None else at
    x = start.copy()
    slope = gradient + (A @ (x - a))
    largest = max(float(np.abs(gradient).max()), float(np.abs(slope).max()))
    for _ in range(ITERATIONS):
        at_bound = ((x <= 0) & (slope >= 0)) | ((x >= 1) & (slope <= 0))
        if at_bound.all() or float(np.abs(slope[~at_bound]).max()) <= TOLERANCE * largest:
            break
        direction = A.solve(-slope, ~at_bound)
        for halvings in range(40):
            step = np.clip(x + 0.5**halvings * direction, 0.0, 1.0) - x
            # Sufficient decrease; along the projected path the slope is evaluated for the step itself.
            fall = dot(slope, step)
            if fall + 0.5 * dot(step, A @ step) <= 1e-4 * min(0.0, fall):
                break
        else:
            break
        if not step.any():
            break
        x = np.clip(x + step, 0.0, 1.0)
        slope = gradient + (A @ (x - a))
    return x


DAMPING = 0.2
"""If ``yᵀ s`` is below this share of ``sᵀ H s``, y is moved towards H s until it is not (Powell, 1978): the function is not convex
there, or its gradients come from finite text."""

FLOOR = 1e-3
"""Least element of the diagonal, as a share of the mean."""


def secant_pairs(points: Sequence[Floats]) -> list[tuple[int, int]]:
    """Pair each point except the first with the nearest earlier one: ``(later, earlier)``.

    Points that coincide with an earlier one are omitted.
    """
    pairs = []
    for j in range(1, len(points)):
        distances = [float(np.sum((points[j] - points[i]) ** 2)) for i in range(j)]
        nearest = int(np.argmin(distances))
        if distances[nearest] > 0:
            pairs.append((j, nearest))
    return pairs


def secant_diagonal(pairs: Sequence[tuple[Floats, Floats]]) -> Floats:
    """Estimate ``d_p = √(Σ y_p² / Σ s_p²)`` from pairs (s, y), with a floor; a coefficient that never moved gets the mean."""
    s2 = np.sum([s * s for s, _ in pairs], axis=0)
    y2 = np.sum([y * y for _, y in pairs], axis=0)
    moved = s2 > 1e-12 * max(float(s2.max()), 1e-300)
    d = np.sqrt(np.divide(y2, s2, out=np.zeros_like(y2), where=moved))
    mean = float(d[moved].mean()) if moved.any() else 0.0
    d[~moved] = mean
    floored: Floats = np.maximum(d, max(FLOOR * mean, 1e-12))
    return floored


def secant_curvature(points: Sequence[Floats], gradients: Sequence[Floats]) -> Curvature:
    """Model the curvature of a function from its gradients at two or more points.

    ``H s = y`` holds for the last pair, and for every pair if the function is quadratic and the pairs are conjugate; H is always positive
    definite. The part added to the diagonal has a rank of at most two per pair.
    """
    pairs = [(points[j] - points[i], gradients[j] - gradients[i]) for j, i in secant_pairs(points)]
    H = Curvature.of_diagonal(secant_diagonal(pairs))
    for s, y in pairs:
        Hs = H @ s
        sHs, sy = dot(s, Hs), dot(s, y)
        share = (1 - DAMPING) * sHs / (sHs - sy) if sy < DAMPING * sHs else 1.0
        damped = share * y + (1 - share) * Hs
        columns = np.stack([damped / np.sqrt(dot(s, damped)), Hs / np.sqrt(sHs)], axis=1)
        H = H.with_columns(columns, np.array([1.0, -1.0]))
    return H
