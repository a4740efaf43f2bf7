"""Compute how much coefficients keep of the intruders, beside how much they keep of the whole delta.

Notation: ``Δ = U diag(s) Vᵀ``, with a coefficient c_i for each direction; u_j is the left singular vector of intruder j of
``W0 + Δ``. The delta has the energy ``‖u_jᵀ Δ‖²`` along u_j. Direction i contributes ``w_ji = (s_i u_jᵀU_i)²`` of it; the contributions
sum to the energy because V has orthonormal columns, and over all intruders of a matrix to `Detection.intruder_energy` times ``‖Δ‖²``. So
``Σ_i w_ji c_i / Σ_i w_ji`` is the mean coefficient of intruder j. ``Σ_i s_i² c_i / Σ_i s_i²``, weighted by the energies of the whole delta,
is the mean coefficient of the matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from streamer.detection.findings import Findings
from streamer.detection.findings_records import FindingsRecord
from streamer.linalg.low_rank import LowRank
from streamer.linalg.operators import Delta
from streamer.methods.coefficient_set import CoefficientSet, Floats, MatrixCoefficients, check_spectrum
from streamer.output.prepare import check_coefficients
from streamer.plan.plan import Plan


@dataclass(frozen=True, eq=False)
class Weighted:
    """The parts of a weighted mean, ``Σ w c`` and ``Σ w``, so that means can be combined."""

    coefficients: float
    weights: float

    @property
    def mean(self) -> float | None:
        """Return ``Σ w c / Σ w``; None if all weights are zero."""
        return self.coefficients / self.weights if self.weights > 0 else None


@dataclass(frozen=True, eq=False)
class MatrixMeans:
    """Mean coefficients of one matrix: of the whole delta, and of each intruder in descending order of singular values."""

    whole: Weighted
    intruders: tuple[Weighted, ...]


def together(parts: Iterable[Weighted]) -> Weighted:
    """Combine means by their weights."""
    listed = list(parts)
    return Weighted(sum(p.coefficients for p in listed), sum(p.weights for p in listed))


def matrix_means(delta: Delta, matrix: MatrixCoefficients, U: Tensor, name: str) -> MatrixMeans:
    """Compute the mean coefficients of one matrix.

    Parameters
    ----------
    delta
        Δ (m, n); if it is dense, all means equal its only coefficient.
    matrix
        Coefficients of the delta's directions.
    U
        (m, q) left singular vectors of the matrix's intruders.
    name
        The tensor's name, for messages.

    Raises
    ------
    MismatchError
        If its singular values differ from those to which the coefficients were fitted.
    """
    if isinstance(delta, LowRank):
        own, S, _ = delta.svd()
        s, overlaps = S.cpu().numpy(), (U.to(own).T @ own).cpu().numpy()
    else:
        s = np.array([delta.norm()])
        overlaps = np.array([[delta.projected_norm(u[:, None])] for u in U.T]).reshape(-1, 1) / max(s[0], 1e-300)
    check_spectrum(s, matrix, name)
    return MatrixMeans(
        _weighted(s**2, matrix.values), tuple(_weighted((s * row) ** 2, matrix.values) for row in overlaps)
    )


def findings_means(plan: Plan, findings: Findings, coefficients: CoefficientSet) -> dict[str, MatrixMeans]:
    """Compute the mean coefficients of every matrix in the findings, by `Target.tensor`.

    Raises
    ------
    MismatchError
        If findings or coefficients belong to another base or adapter.
    """
    findings.check_matches(plan.base_identity, plan.adapter_identity, None)
    check_coefficients(plan, coefficients)
    targets = {target.tensor: target for target in plan.targets}
    return {
        found.tensor: matrix_means(
            plan.delta(targets[found.tensor]), coefficients.matrices[found.tensor], found.detection.U, found.tensor
        )
        for found in findings
    }


def with_means(
    record: FindingsRecord, coefficients: CoefficientSet, means: Mapping[str, MatrixMeans]
) -> FindingsRecord:
    """Add the mean coefficients of each matrix, and of all together, to the JSON of findings."""
    for matrix in record["matrices"]:
        own = means[matrix["tensor"]]
        matrix["coefficients"] = {
            "mean": own.whole.mean,
            "intruders_mean": together(own.intruders).mean,
            "intruders": [one.mean for one in own.intruders],
        }
    every = means.values()
    record["totals"]["coefficients"] = {
        **coefficients.record(),
        "mean": together(m.whole for m in every).mean,
        "intruders_mean": together(one for m in every for one in m.intruders).mean,
    }
    return record


def _weighted(weights: Floats, coefficients: Floats) -> Weighted:
    return Weighted(float(weights @ coefficients), float(weights.sum()))
