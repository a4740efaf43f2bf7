"""Scale the intruders of one matrix's delta by λ, or its own directions by coefficients, and project it onto an adapter's rank.

Notation as in `detection.intruders`: Δ is the adapter's delta, and ``U_I Σ_I V_Iᵀ`` the intruders' triplets of ``W0 + Δ``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

from torch import Tensor

from streamer.detection.intruders import Detection, Selection
from streamer.errors import UsageError
from streamer.linalg.low_rank import LowRank
from streamer.linalg.operators import Delta
from streamer.output.coefficients import CoefficientSet, fitted_delta

MitigationMethod = Literal["paper", "project", "shrink", "fitted"]

DEFAULT_LAMBDA = 0.75


@dataclass(frozen=True)
class MitigationOptions:
    """Options that decide the mitigated delta, given the findings.

    Attributes
    ----------
    mitigation_lambda
        Share of an intruder that is kept: 1 changes nothing, 0 removes it. None for ``fitted``, and for it alone.
    method
        ``paper``: ``Δ' = Δ + (λ − 1) U_I Σ_I V_Iᵀ``. ``project``: ``Δ' = (I − (1 − λ) U_I U_Iᵀ) Δ``, which leaves the base's
        own share of the direction alone and needs no truncation. ``shrink``: ``Δ' = λ Δ``, the baseline; no detection.
        ``fitted``: ``Δ' = U diag(c) Uᵀ Δ``, coefficients of Δ's own directions (see `coefficients`); no detection.
    scale
        ``all`` intruders among the top k, or only the ``first`` (highest-ranked) of each matrix.
    coefficients
        Those of ``fitted``; None for the other methods.
    amplify
        Allow λ outside [0, 1]: above 1 an intruder grows, below 0 its sign changes.
    """

    mitigation_lambda: float | None = DEFAULT_LAMBDA
    method: MitigationMethod = "paper"
    scale: Selection = "all"
    coefficients: CoefficientSet | None = None
    amplify: bool = False

    @classmethod
    def fitted(cls, coefficients: CoefficientSet) -> MitigationOptions:
        """Make the options of ``fitted``."""
        return cls(None, "fitted", coefficients=coefficients)

    def __post_init__(self) -> None:
        if self.method not in get_args(MitigationMethod):
            raise UsageError(f"method: expected one of {', '.join(get_args(MitigationMethod))}, found {self.method!r}")
        if self.scale not in get_args(Selection):
            raise UsageError(f"scale: expected one of {', '.join(get_args(Selection))}, found {self.scale!r}")
        lam = self.mitigation_lambda
        if self.method == "fitted":
            if self.coefficients is None:
                raise UsageError("method 'fitted' needs coefficients; make them with `streamer fit`")
            if lam is not None:
                raise UsageError(f"lambda: method 'fitted' uses coefficients instead, got {lam!r}; leave it out")
            return
        if self.coefficients is not None:
            raise UsageError(f"coefficients: belong to method 'fitted', found {self.method!r}; pass one or the other")
        if not isinstance(lam, Real) or isinstance(lam, bool) or not math.isfinite(lam):
            raise UsageError(f"lambda must be a finite number, got {lam!r}; {_share_meant(lam)}".rstrip("; "))
        object.__setattr__(self, "mitigation_lambda", float(lam))
        if not (self.amplify or 0 <= lam <= 1):
            raise UsageError(
                f"lambda must be between 0 (remove) and 1 (keep), got {self.mitigation_lambda:g}; {_share_meant(lam)}"
                "`amplify=True` allows other values"
            )

    @property
    def needs_detection(self) -> bool:
        """Test whether the result depends on the findings at all."""
        return self.method in ("paper", "project") and self.mitigation_lambda != 1

    def as_dict(self) -> dict[str, Any]:
        """Return what decides the mitigated delta, given the findings, as JSON values."""
        return {
            "mitigation_lambda": self.mitigation_lambda,
            "method": self.method,
            "scale": self.scale,
            **self._fitted(),
        }

    def as_json(self) -> dict[str, Any]:
        """Return the options by the names that are written and printed."""
        return {"method": self.method, "scale": self.scale, "lambda": self.mitigation_lambda, **self._fitted()}

    def _fitted(self) -> dict[str, Any]:
        return {} if self.coefficients is None else {"coefficients": self.coefficients.record()}


def _share_meant(lam: object) -> str:
    """Ask whether a percentage, or a number in a string, was meant as a share; return an empty string if neither is likely."""
    text = str(lam)
    try:
        number = float(text.rstrip("% "))
    except ValueError:
        return ""
    share = number / 100 if "%" in text or number >= 2 else number
    return f"did you mean {share:g}? " if 0 <= share <= 1 else ""


def mitigate(delta: Delta, detection: Detection | None, options: MitigationOptions, tensor: str = "") -> Delta:
    """Compute the mitigated delta Δ'; the delta itself, as it is, where nothing changes.

    Parameters
    ----------
    delta
        Δ, (m, n), in factors or dense.
    detection
        The findings on this matrix; may be None where the options do not need them.
    tensor
        The matrix' name, by which its coefficients are found.

    Returns
    -------
    LowRank or Dense
        Factors are in float64, for ``paper`` of rank r + q, for the others of rank r; a dense Δ' has the dtype of Δ.
        `MitigationOptions` has the formulas.
    """
    if options.coefficients is not None:
        return fitted_delta(delta, options.coefficients.matrices[tensor], tensor)
    lam = options.mitigation_lambda
    assert lam is not None
    if lam == 1:
        return delta
    precise = delta.precise()
    if options.method == "shrink":
        return precise.scaled(lam)
    if detection is None:
        raise UsageError(f"method {options.method!r} at lambda {lam} needs findings")
    U, S, Vh = detection.factors(options.scale)
    if len(S) == 0:
        return delta
    if options.method == "project":
        return precise.plus_projection(U, lam - 1)
    return precise.plus_triplets(U, S, Vh, lam - 1)


def back_project(delta: LowRank, rank: int, scaling: float) -> tuple[Tensor, Tensor, float]:
    """Project Δ' onto adapter factors with ``scaling · B @ A ≈ Δ'``, and measure the relative Frobenius norm that is lost.

    Parameters
    ----------
    delta
        Δ' = L Rᵀ, (m, n).
    rank
        The adapter's rank r. If Δ' has no more columns, its factors are kept and nothing is lost; else it is
        truncated to the nearest matrix of rank r, and ``√Σ`` is shared evenly between B and A.
    scaling
        LoRA's s, not zero.

    Returns
    -------
    B, A, dropped
        (m, r), (r, n), and ``‖Δ' − s·B·A‖_F / ‖Δ'‖_F``.
    """
    delta = delta.precise()
    if delta.rank <= rank:
        return delta.L / scaling, delta.R.T, 0.0
    root, dropped = delta.scaled(1 / scaling).truncated(rank)
    return root.L, root.R.T, dropped
