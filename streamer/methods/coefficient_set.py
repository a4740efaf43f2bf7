"""Hold coefficients in [0, 1], one for each singular direction of each matrix's delta, and apply them.

With the SVD ``Δ = U diag(s) Vᵀ`` of the adapter's delta, ``Δ' = U diag(c·s) Vᵀ = U diag(c) Uᵀ Δ``, which is exact at the adapter's rank. A
dense delta, from an adapter without factors, has a single coefficient, ``Δ' = c Δ``, and its norm is used as s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from streamer.errors import MismatchError, UsageError
from streamer.linalg.low_rank import LowRank
from streamer.linalg.operators import Delta
from streamer.methods.fit_set import FitSet, share_name
from streamer.units import counted

if TYPE_CHECKING:
    from streamer.plan.targets import Target

Floats = npt.NDArray[np.float64]

AGREEMENT = 1e-6
"""Singular values count as equal if they differ by less than this, relative to the matrix's largest one; machines round differently."""

CLUSTER = 1e-6
"""Neighbouring singular values share a coefficient if they differ by less than this, relative to the larger one."""

NEGLIGIBLE = 1e-7
"""Directions with singular values below this, relative to the largest one, have no effect and keep the coefficient 1."""


@dataclass(frozen=True, eq=False)
class MatrixCoefficients:
    """Coefficients of one matrix.

    Attributes
    ----------
    singular_values
        Singular values of Δ in descending order, (p,); for a dense Δ its Frobenius norm, p = 1.
    values
        Share of each direction to keep, in [0, 1], (p,).
    """

    singular_values: Floats
    values: Floats


@dataclass(frozen=True, eq=False, repr=False)
class CoefficientSet(FitSet):
    """Coefficients of all matrices; see `FitSet`."""

    matrices: Mapping[str, MatrixCoefficients]
    method: ClassVar[str] = "fitted"

    def stored(self, tensor: str) -> bytes:
        """Return the coefficients of a matrix in float64."""
        return self.matrices[tensor].values.astype("<f8").tobytes()

    def check(self) -> None:
        """Refuse values that no fit can produce.

        Raises
        ------
        UsageError
            If a coefficient is NaN or outside [0, 1], or if the singular values are invalid.
        """
        for tensor, matrix in self.matrices.items():
            if fault := fault_of(tensor, matrix.singular_values, matrix.values):
                raise UsageError(f"{self.name}: {fault}; use the coefficients of a fit")

    def __repr__(self) -> str:
        values = np.concatenate([np.zeros(0), *(matrix.values for matrix in self.matrices.values())])
        mean = f" of mean {values.mean():.3f}" if len(values) else ""
        count, matrices = counted(len(values), "coefficient"), counted(len(self.matrices), "matrix")
        return f"<CoefficientSet: keep {share_name(self.keep)}, {count}{mean} in {matrices}>"

    def fits(self, target: Target) -> bool:
        """Test whether a matrix has as many directions as there are coefficients; a dense delta has one."""
        matrix = self.matrices.get(target.tensor)
        if matrix is None or not target.module.low_rank:
            return matrix is not None and len(matrix.values) == 1
        factors = target.module.factors
        return factors is None or len(matrix.values) == min(factors.rank, *target.module.shape)

    def mitigated(self, delta: Delta, tensor: str) -> Delta:
        """Compute Δ' with the coefficients of a matrix; see `fitted_delta`."""
        return fitted_delta(delta, self.matrices[tensor], tensor)

    def row(self, tensor: str) -> dict[str, Any]:
        """Return the coefficients of a matrix."""
        return {"coefficients": self.matrices[tensor].values.tolist()}


def fault_of(tensor: str, singular_values: Floats, values: Floats) -> str:
    """Describe what is wrong with a matrix's singular values (p,) and coefficients (p,) or (K, p); return an empty string if nothing is."""
    if singular_values.ndim != 1 or values.shape[-1:] != singular_values.shape:
        return f"{tensor!r} has {list(singular_values.shape)} singular values, and coefficients of shape {list(values.shape)}"
    if not ((values >= 0) & (values <= 1)).all():
        return f"{tensor!r} has a coefficient that is NaN or outside [0, 1]"
    if not (
        np.isfinite(singular_values).all() and (singular_values >= 0).all() and (np.diff(singular_values) <= 0).all()
    ):
        return f"{tensor!r} has singular values that are not finite and in descending order"
    return ""


def directions(delta: Delta) -> Floats:
    """Compute the singular values (p,) of the directions that have coefficients, in descending order and float64.

    For a delta in factors, p = min(r, m, n). For a dense delta, p = 1 and the value is the Frobenius norm.
    """
    if not isinstance(delta, LowRank):
        return np.array([delta.norm()])
    return np.asarray(delta.svd()[1].cpu().numpy(), dtype=np.float64)


def groups(singular_values: Sequence[float] | Floats) -> npt.NDArray[np.int64]:
    """Number the free coefficients of a matrix, and return the number for each direction: (p,), −1 for none.

    Within a cluster of equal singular values, single directions are undefined and would differ between machines; therefore the cluster
    shares a coefficient. Directions without effect have no coefficient and stay unchanged.

    >>> groups([3.0, 2.0, 2.0, 1.0, 1e-9]).tolist()
    [0, 1, 1, 2, -1]
    """
    s = np.asarray(singular_values, dtype=np.float64)
    apart = s[:-1] - s[1:] > CLUSTER * s[:-1]
    numbers = np.concatenate([[0], np.cumsum(apart)]) if len(s) else np.zeros(0)
    return np.where((s > 0) & (s >= NEGLIGIBLE * s[:1]), numbers, -1).astype(np.int64)


def fitted_delta(delta: Delta, matrix: MatrixCoefficients, name: str) -> Delta:
    """Compute ``Δ' = U diag(c) Uᵀ Δ``, or ``c Δ`` for a dense Δ; return the given delta if all coefficients are 1.

    Parameters
    ----------
    delta
        Δ, (m, n), in factors or dense.
    matrix
        Coefficients of its directions.
    name
        Name of the tensor, for messages.

    Returns
    -------
    LowRank or Dense
        Factors are float64, with the rank and the right factor R of Δ.

    Raises
    ------
    MismatchError
        If the coefficients were fitted to other singular values.
    """
    if (matrix.values == 1).all():
        return delta
    if not isinstance(delta, LowRank):
        check_spectrum(np.array([delta.norm()]), matrix, name)
        return delta.scaled(float(matrix.values[0]))
    precise = delta.precise()
    U, S, _ = precise.svd()
    check_spectrum(np.asarray(S.cpu().numpy(), dtype=np.float64), matrix, name)
    return precise.plus_projection(U, torch.from_numpy(matrix.values - 1).to(U))


def check_spectrum(found: Floats, matrix: MatrixCoefficients, name: str) -> None:
    """Check that coefficients were fitted to the singular values found here, (p,), within `AGREEMENT`.

    Raises
    ------
    MismatchError
        If a singular value differs; the message names the direction.
    """
    stated = matrix.singular_values
    if found.shape != stated.shape:
        raise MismatchError(
            f"coefficients: has {len(stated)} for {name!r}, whose delta has {len(found)} directions; fit them to this adapter"
        )
    off = np.abs(found - stated)
    if not (off <= AGREEMENT * found.max(initial=0.0)).all():
        i = int(off.argmax())
        raise MismatchError(
            f"coefficients: direction {i} of {name!r} has a singular value of {found[i]:.9g} here, but had {stated[i]:.9g} in the fit; "
            "they belong to another adapter"
        )
