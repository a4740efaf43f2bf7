"""Model the curvature of a convex function from its gradients at a few points.

Between points x_i and x_j a smooth function's gradients differ by ``y = ∇f(x_j) − ∇f(x_i) = H s``, ``s = x_j − x_i``, H its mean
curvature between the two. Each point is paired with the nearest before it, where H has changed least. The model begins with the diagonal

    d_p = √( Σ y_p² / Σ s_p² )        over all pairs

which, unlike a quotient y_p / s_p, is positive and counts what the neighbours of p contribute; then every pair is imposed in turn by the
update of Broyden, Fletcher, Goldfarb and Shanno (BFGS), which keeps it positive definite:

    H ← H − H s sᵀ H / (sᵀ H s) + y yᵀ / (yᵀ s),        H s = y afterwards
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from streamer.fitting.quadratic import Curvature, Floats, dot

DAMPING = 0.2
"""Where ``yᵀ s`` is under this share of ``sᵀ H s``, y is drawn towards H s until it is not (Powell, 1978): the function is not convex
there, or its gradients are of finite text."""

FLOOR = 1e-3
"""Least element of the diagonal, as a share of the mean."""


def secant_pairs(points: Sequence[Floats]) -> list[tuple[int, int]]:
    """Pair each point but the first with the nearest before it: ``(later, earlier)``.

    Points that coincide with an earlier one are left out.
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
    """Model the curvature of a function from its gradients at two points or more.

    ``H s = y`` holds for the last pair, and for every pair where the function is quadratic and the pairs conjugate; H is positive
    definite always. Its rank above the diagonal is at most two a pair.
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
