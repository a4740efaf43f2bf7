"""Compute leading singular triplets and similarities by scipy, in float64: ARPACK on a `LinearOperator`, LAPACK for the base.

Notation: W0 (m, n) is the base weight, Δ the adapter's delta, ``W = W0 + Δ``, u_j, σ_j, v_j W's leading singular triplets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from streamer.verification.result import NotRecomputed
from streamer.verification.tensors import Array, Matrix

DENSE_SIDE = 2048
"""The longest short side of a matrix that LAPACK decomposes whole."""

ANGLES = (2e-5, 1e-3)
"""Error of a vector, in radians, that findings may have beside rounding; the second where singular values decay slowly."""

MORE = 6
"""Singular values after the first k that say how fast they decay; the solver's block has as many columns more at least."""

SLOW = 0.15
"""Relative fall of the squared values over these below which a block Krylov process of 16 steps does not reach the first of `ANGLES`:
its error falls like ``2 exp(−2·16·√fall)``."""

ROUNDINGS = 32 * 2.0**-23
"""Error of a residual in float32 relative to σ_1: some roundings."""

DOUBLE_ROUNDINGS = 32 * 2.0**-52
"""The same in float64."""

ILL_DEFINED = 0.05
"""An angle error above this makes a vector one of a cluster, of which only the space that they span is defined."""


@dataclass(frozen=True)
class Triplets:
    """``W v_j = σ_j u_j``: U (m, k), S (k,) falling, V (n, k); gaps (k,), each σ_j's distance to its nearest neighbour; one of `ANGLES`."""

    U: Array
    S: Array
    V: Array
    gaps: Array
    angle: float

    def angle_errors(self, exact: bool = False) -> Array:
        """Bound the angle by which each vector in findings may differ from these, (k,); `exact` are LAPACK's vectors in float64."""
        angle, roundings = (0.0, DOUBLE_ROUNDINGS) if exact else (self.angle, ROUNDINGS)
        errors: Array = np.minimum(1.0, angle + roundings * self.S[0] / np.maximum(self.gaps, 1e-300))
        return errors


def leading_triplets(W: Any, k: int) -> Triplets:
    """Compute the k leading triplets of an operator, by ARPACK where it can give some more, else by LAPACK.

    Raises
    ------
    NotRecomputed
        If neither can.
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


def base_vectors(base: Matrix) -> tuple[Array, Array] | None:
    """Compute all left singular vectors and singular values of W0, (m, p) and (p,); None where the short side is over `DENSE_SIDE`."""
    from scipy.linalg import svd

    if min(base.shape) > DENSE_SIDE:
        return None
    U, S, _ = svd(base.whole(), full_matrices=False)
    return U, S


def similarities(U: Array, vectors: Array) -> Array:
    """Compute ``max_i |⟨u_j, u⁰_i⟩|`` of each column of U, (k,)."""
    if not vectors.shape[1]:
        return np.zeros(U.shape[1])
    largest: Array = np.abs(vectors.T @ U).max(axis=0)
    return largest
