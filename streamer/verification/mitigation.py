"""Compute the mitigated delta by its formula, in float64, from triplets that are computed here.

``paper``: ``Δ' = Δ + (λ − 1) U_I Σ_I V_Iᵀ``. ``project``: ``Δ' = Δ − (1 − λ) U_I U_Iᵀ Δ``. ``shrink``: ``Δ' = λ Δ``. U_I, Σ_I, V_I are the
singular triplets of ``W0 + Δ`` that the record calls intruders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamer.verification.formulas import Delta, LowRankDelta
from streamer.verification.result import NotRecomputed
from streamer.verification.spectrum import ILL_DEFINED, Triplets
from streamer.verification.tensors import Array, Matrix


@dataclass(frozen=True)
class Mitigated:
    """``Δ' = factor · Δ + left · right``, left (m, q), right (q, n).

    Attributes
    ----------
    row_error, column_error
        (m,), (n,): an element of Δ' may differ by the sum of its row's and its column's, as vectors of findings may from those here.
    error
        Frobenius norm by which Δ' may differ for that reason.
    """

    delta: Delta
    factor: float
    left: Array
    right: Array
    row_error: Array
    column_error: Array
    error: float

    def rows(self, i: int, j: int, W0: Array) -> tuple[Array, Array, Array]:
        """Rows i to j of Δ, of Δ', and of a bound on the size of the terms that Δ' is the sum of; W0 are the base's rows."""
        delta, bound = self.delta.rows(i, j, W0)
        change = self.left[i:j] @ self.right
        return delta, self.factor * delta + change, bound + np.abs(self.left[i:j]) @ np.abs(self.right)

    def low_rank(self) -> LowRankDelta | None:
        """Δ' in factors, where Δ is."""
        if not isinstance(self.delta, LowRankDelta):
            return None
        L = np.concatenate([self.factor * self.delta.L, self.left], axis=1)
        return LowRankDelta(L, np.concatenate([self.delta.R, self.right.T], axis=1))


def mitigate(
    base: Matrix, delta: Delta, triplets: Triplets | None, intruders: Sequence[int], record: dict[str, Any]
) -> Mitigated:
    """Compute Δ' of one matrix.

    Parameters
    ----------
    triplets
        Of W0 + Δ, the largest first; may be None where there are no intruders to scale.
    intruders
        0-based ranks of those that were scaled.
    record
        The output's record: method and lambda.

    Raises
    ------
    NotRecomputed
        If an intruder is one of a cluster of directions.
    """
    lam, (m, n) = float(record["lambda"]), base.shape
    none = np.zeros((m, 0)), np.zeros((0, n)), np.zeros(m), np.zeros(n)
    if record["method"] == "shrink":
        return Mitigated(delta, lam, *none, 0.0)
    if not intruders or lam == 1:
        return Mitigated(delta, 1.0, *none, 0.0)
    assert triplets is not None
    chosen = list(intruders)
    angles = triplets.angle_errors[chosen]
    if angles.max() > ILL_DEFINED:
        raise NotRecomputed(
            f"its direction {chosen[int(angles.argmax())]} is one of a cluster, and no single vector is defined"
        )
    U, S, V = triplets.U[:, chosen], triplets.S[chosen], triplets.V[:, chosen]
    if record["method"] == "paper":
        left, right, sizes = (lam - 1) * U * S, V.T, S
        columns = np.abs(V) @ (angles * S)
    else:
        right = delta.left_product(U, base)
        left, sizes = (lam - 1) * U, np.full(len(S), _norm(base, delta))
        columns = np.abs(right.T) @ angles
    weights = abs(lam - 1) * angles * sizes
    rows = np.abs(U) @ weights + float(weights @ angles)
    return Mitigated(delta, 1.0, left, right, rows, abs(lam - 1) * columns, 2 * float(weights.sum()))


def _norm(base: Matrix, delta: Delta) -> float:
    return float(np.sqrt(sum(float(np.sum(delta.rows(i, j, base.rows(i, j))[0] ** 2)) for i, j in base.blocks())))


@dataclass(frozen=True)
class Truncated:
    """The nearest matrix of rank r, ``L Rᵀ``; what is left out relative to the whole; how far it moves if the whole does by 1."""

    low_rank: LowRankDelta
    dropped: float
    sensitivity: float


def truncate(delta: LowRankDelta, rank: int) -> Truncated:
    """Truncate ``L Rᵀ`` to a rank by QR of both and the SVD of the small core.

    Raises
    ------
    NotRecomputed
        If the last value that is kept is as large as the first that is not.
    """
    if delta.L.shape[1] <= rank:
        return Truncated(delta, 0.0, 1.0)
    Q, left = np.linalg.qr(delta.L)
    P, right = np.linalg.qr(delta.R)
    U, S, Vh = np.linalg.svd(left @ right.T)
    rest = S[rank:] if len(S) > rank else np.zeros(1)
    gap, size = S[rank - 1] - rest[0] if len(S) > rank else S[-1], float(np.linalg.norm(S))
    if size and rest[0] > 1e-12 * S[0] and gap < ILL_DEFINED * 1e-3 * S[0]:
        raise NotRecomputed("its delta has no single nearest matrix of the adapter's rank")
    kept = LowRankDelta((Q @ U)[:, :rank] * S[:rank], P @ Vh[:rank].T)
    sensitivity = 1.0 if rest[0] <= 1e-12 * S[0] else 1 + S[rank - 1] / gap
    return Truncated(kept, float(np.linalg.norm(rest)) / size if size else 0.0, float(sensitivity))
