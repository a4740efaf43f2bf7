"""Scale the intruders of one matrix's delta by λ, and project the result back onto an adapter's rank.

Notation as in `detection.intruders`: Δ is the adapter's delta, and ``U_I Σ_I V_Iᵀ`` the intruders' triplets of ``W0 + Δ``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from streamer.detection.intruders import Detection, Selection
from streamer.errors import UsageError
from streamer.linalg.low_rank import LowRank
from streamer.linalg.operators import Delta

MitigationMethod = Literal["paper", "project", "shrink"]


@dataclass(frozen=True)
class MitigationOptions:
    """Options that decide the mitigated delta, given the findings.

    Attributes
    ----------
    mitigation_lambda
        What is left of an intruder: 1 changes nothing, 0 removes it, above 1 amplifies it.
    method
        ``paper``: ``Δ' = Δ + (λ − 1) U_I Σ_I V_Iᵀ``. ``project``: ``Δ' = (I − (1 − λ) U_I U_Iᵀ) Δ``, which leaves the base's
        own share of the direction alone and needs no truncation. ``shrink``: ``Δ' = λ Δ``, the baseline; no detection.
    scale
        ``all`` intruders among the top k, or only the ``first`` (highest-ranked) of each matrix.
    """

    mitigation_lambda: float = 0.75
    method: MitigationMethod = "paper"
    scale: Selection = "all"

    def __post_init__(self) -> None:
        if isinstance(self.mitigation_lambda, bool) or not math.isfinite(self.mitigation_lambda):
            raise UsageError(f"lambda: expected a finite number, found {self.mitigation_lambda!r}")
        if self.method not in get_args(MitigationMethod):
            raise UsageError(f"method: expected one of {', '.join(get_args(MitigationMethod))}, found {self.method!r}")
        if self.scale not in get_args(Selection):
            raise UsageError(f"scale: expected one of {', '.join(get_args(Selection))}, found {self.scale!r}")

    @property
    def needs_detection(self) -> bool:
        """Test whether the result depends on the findings at all."""
        return self.method != "shrink" and self.mitigation_lambda != 1

    def as_dict(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        return asdict(self)

    def as_json(self) -> dict[str, Any]:
        """Return the options by the names that are written and printed."""
        return {"method": self.method, "scale": self.scale, "lambda": self.mitigation_lambda}


def mitigate(delta: Delta, detection: Detection | None, options: MitigationOptions) -> Delta:
    """Compute the mitigated delta Δ'; the delta itself, as it is, where nothing changes.

    Parameters
    ----------
    delta
        Δ, (m, n), in factors or dense.
    detection
        The findings on this matrix; may be None where the options do not need them.

    Returns
    -------
    LowRank or Dense
        Factors are in float64, for ``paper`` of rank r + q, for the others of rank r; a dense Δ' has the dtype of Δ.
        `MitigationOptions` has the formulas.
    """
    lam = options.mitigation_lambda
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
    """Project Δ' onto adapter factors with ``scaling · B @ A ≈ Δ'``, and measure the relative Frobenius norm that is dropped.

    Parameters
    ----------
    delta
        Δ' = L Rᵀ, (m, n).
    rank
        The adapter's rank r. Where Δ' has no more columns its factors are kept and nothing is dropped; else it is
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
