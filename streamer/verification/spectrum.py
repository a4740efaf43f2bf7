"""Compute leading singular triplets and similarities with scipy, in float64: ARPACK on a `LinearOperator`, LAPACK for the base.

Notation: W0 (m, n) is the base weight, Δ is the adapter's delta, ``W = W0 + Δ``, and u_j, σ_j, v_j are W's leading singular triplets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from streamer.verification.result import NotRecomputed
from streamer.verification.tensors import Array, Matrix

DENSE_SIDE = 2048
"""Largest short side of a matrix that LAPACK decomposes whole."""

ANGLES = (2e-5, 1e-3)
"""Angle error of a vector, in radians, that findings may have besides rounding; the second applies if singular values decay slowly."""

MORE = 6
"""Singular values after the first k that measure the decay; the solver's block has at least this many additional columns."""

SLOW = 0.15
"""Relative decrease of the squared values over these, below which a block Krylov process misses the first of `ANGLES` in 16 steps: its
error decreases like ``2 exp(−2·16·√decrease)``."""

ROUNDINGS = 32 * 2.0**-23
"""Error of a residual in float32 relative to σ_1: a few roundings."""

DOUBLE_ROUNDINGS = 32 * 2.0**-52
"""The same in float64."""

ILL_DEFINED = 0.05
"""Angle error above which a vector belongs to a cluster, in which only the spanned subspace is defined."""


@dataclass(frozen=True)
class Triplets:
    """``W v_j = σ_j u_j``: U (m, k), falling S (k,), V (n, k); gaps (k,) from σ_j to its nearest neighbour; one of `ANGLES`."""

    U: Array
    S: Array
    V: Array
    gaps: Array
    angle: float

    def angle_errors(self, exact: bool = False) -> Array:
        """Bound the angle between each vector in findings and the one here, (k,); `exact` if findings have LAPACK's float64 vectors."""
        angle, roundings = (0.0, DOUBLE_ROUNDINGS) if exact else (self.angle, ROUNDINGS)
        errors: Array = np.minimum(1.0, angle + roundings * self.S[0] / np.maximum(self.gaps, 1e-300))
        return errors


def leading_triplets(W: Any, k: int) -> Triplets:
    """Compute the k leading triplets of an operator, by ARPACK if it can also give `MORE` further ones, else by LAPACK.

    Raises
    ------
    NotRecomputed
        If neither is possible.
    """
    from scipy.linalg import svd
    from scipy.sparse.linalg import ArpackError, svds

    side = min(W.shape)
    if k + MORE < side // 2:
        start = np.random.default_rng(0).standard_normal(side)
        try:
            U, S, Vh = svds(W, k=k + 1 + MORE, v0=start, tol=0, return_singular_vectors=True)
        except ArpackError as e:
            raise NotRecomputed(f"ARPACK did not converge ({e})") from None
    elif side <= DENSE_SIDE:
        U, S, Vh = svd(W @ np.eye(W.shape[1]), full_matrices=False)
    else:
        raise NotRecomputed(f"{k} directions of a matrix whose short side is over {DENSE_SIDE} are too many for ARPACK")
    order = np.argsort(-S, kind="stable")
    U, S, V = U[:, order], S[order], Vh[order].T
    padded = np.concatenate([[np.inf], S, [0.0 if W.shape[0] > W.shape[1] or k < side else -np.inf]])
    gaps = np.minimum(padded[:-2] - padded[1:-1], padded[1:-1] - padded[2:])
    beyond = float(S[min(k + MORE, len(S) - 1)])
    slow = k + MORE < len(S) and S[k - 1] ** 2 - beyond**2 < SLOW * beyond**2
    return Triplets(U[:, :k], S[:k], V[:, :k], gaps[:k], ANGLES[bool(slow)])


def base_vectors(W0: Matrix) -> tuple[Array, Array] | None:
    """Compute all left singular vectors and singular values of W0, (m, p) and (p,); None if its short side is over `DENSE_SIDE`."""
    from scipy.linalg import svd

    if min(W0.shape) > DENSE_SIDE:
        return None
    U, S, _ = svd(W0.whole(), full_matrices=False)
    return U, S


def similarities(U: Array, vectors: Array) -> Array:
    """Compute ``max_i |⟨u_j, u⁰_i⟩|`` for each column of U, (k,)."""
    if not vectors.shape[1]:
        return np.zeros(U.shape[1])
    largest: Array = np.abs(vectors.T @ U).max(axis=0)
    return largest
