"""Compute the mitigated delta by its formula, in float64, from triplets computed here.

``paper``: ``Δ' = Δ + (λ − 1) U_I Σ_I V_Iᵀ``. ``project``: ``Δ' = Δ − (1 − λ) U_I U_Iᵀ Δ``. ``shrink``: ``Δ' = λ Δ``. U_I, Σ_I, V_I are the
singular triplets of ``W0 + Δ`` that the record calls intruders. ``regmean``: ``Δ' = L R'ᵀ`` for ``Δ = L Rᵀ``, with R' from the fit's file.
``nullspace``: see `null_space`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamer.verification.deltas import LowRankDelta, WitnessDelta
from streamer.verification.result import NotRecomputed
from streamer.verification.spectrum import ILL_DEFINED, Triplets
from streamer.verification.tensors import Array, Matrix


@dataclass(frozen=True)
class Mitigated:
    """``Δ' = factor · Δ + left · right`` with left (m, q) and right (q, n).

    Attributes
    ----------
    row_error, column_error
        (m,), (n,): an element of Δ' may differ by the sum of its row's and column's error, since the vectors in findings may differ
        from those computed here.
    error
        Frobenius norm by which Δ' may differ for this reason.
    """

    delta: WitnessDelta
    factor: float
    left: Array
    right: Array
    row_error: Array
    column_error: Array
    error: float

    def rows(self, i: int, j: int, W0: Array) -> tuple[Array, Array, Array]:
        """Compute rows i to j of Δ and of Δ', and a bound on the size of the summands of Δ'; W0 are the base's rows."""
        delta, bound = self.delta.rows(i, j, W0)
        change = self.left[i:j] @ self.right
        return delta, self.factor * delta + change, bound + np.abs(self.left[i:j]) @ np.abs(self.right)

    def in_factors(self, W0: Matrix) -> LowRankDelta:
        """Return Δ' as a product of factors (see `WitnessDelta.combined`)."""
        return self.delta.combined(self.factor, self.left, self.right, W0)


def by_factor(delta: WitnessDelta, R: Array) -> Mitigated:
    """Compute one matrix's Δ' for the method ``regmean``: ``L R'ᵀ`` with the right factor R' (n, r) of a fit.

    Raises
    ------
    NotRecomputed
        If the delta has no factors of that shape.
    """
    if not isinstance(delta, LowRankDelta) or R.shape != delta.R.shape:
        raise NotRecomputed("its delta has no right factor of that shape")
    m, n = len(delta.L), len(R)
    return Mitigated(delta, 0.0, delta.L, R.T, np.zeros(m), np.zeros(n), 0.0)


WITNESSED = {
    "paper": "findings",
    "project": "findings",
    "shrink": "nothing",
    "regmean": "factors",
    "nullspace": "map",
}
"""What each method needs besides λ, for all methods with a formula here."""


def mitigate(
    W0: Matrix, delta: WitnessDelta, triplets: Triplets | None, intruders: Sequence[int], record: dict[str, Any]
) -> Mitigated:
    """Compute Δ' of one matrix.

    Parameters
    ----------
    triplets
        Triplets of W0 + Δ, largest first; may be None if there are no intruders to scale.
    intruders
        0-based ranks of the scaled intruders.
    record
        The output's record, with method and lambda.

    Raises
    ------
    NotRecomputed
        If an intruder belongs to a cluster of directions.
    """
    lam, (m, n) = float(record["lambda"]), W0.shape
    none = np.zeros((m, 0)), np.zeros((0, n)), np.zeros(m), np.zeros(n)
    if record["method"] == "shrink":
        return Mitigated(delta, lam, *none, 0.0)
    if not intruders or lam == 1:
        return Mitigated(delta, 1.0, *none, 0.0)
    assert triplets is not None
    chosen = list(intruders)
    angles = triplets.angle_errors()[chosen]
    if angles.max() > ILL_DEFINED:
        raise NotRecomputed(
            f"its direction {chosen[int(angles.argmax())]} is one of a cluster, in which no single vector is defined"
        )
    U, S, V = triplets.U[:, chosen], triplets.S[chosen], triplets.V[:, chosen]
    if record["method"] == "paper":
        left, right, sizes = (lam - 1) * U * S, V.T, S
        columns = np.abs(V) @ (angles * S)
    elif record["method"] != "project":
        raise NotRecomputed(f"verify has no formula for method {record['method']!r}")
    else:
        right = delta.left_product(U, W0)
        left, sizes = (lam - 1) * U, np.full(len(S), delta.norm(W0))
        columns = np.abs(right.T) @ angles
    weights = abs(lam - 1) * angles * sizes
    rows = np.abs(U) @ weights + float(weights @ angles)
    return Mitigated(delta, 1.0, left, right, rows, abs(lam - 1) * columns, 2 * float(weights.sum()))
