"""Compute a report's curves from findings: number of intruders by threshold, and the norm that each λ removes."""

from __future__ import annotations

import math
from itertools import chain
from typing import Annotated, TypedDict

import numpy as np
from numpy.typing import NDArray

from streamer.detection.findings import Findings
from streamer.json_types import Count

LAMBDAS = (1.0, 0.9, 0.75, 0.5, 0.25, 0.0)
"""Values of λ for which a report shows the norm removed."""

THRESHOLDS = tuple(i / 50 for i in range(1, 51))
"""Thresholds ε at which to count intruders, in addition to the findings' own."""


# fmt: off
class ThresholdRecord(TypedDict):
    """A threshold, and bounds on the number of directions below it: at least `least`, at most `most`."""
    epsilon: Annotated[float, "The threshold."]
    intruders: Annotated[Count, "Directions whose similarity, as used for the decision, is below the threshold, over all matrices."]
    least: Annotated[Count, "Directions whose interval lies below the threshold."]
    most: Annotated[Count, "Directions whose interval begins below the threshold."]

# `lambda` is a Python keyword, so this cannot be a class.
LambdaRecord = TypedDict("LambdaRecord", {
    "lambda": Annotated[float, "Share of an intruder to keep."],
    "paper": Annotated[float, "Norm that --method paper removes, as a share of the delta's; above 1 if much of it belongs to the base."],
    "project": Annotated[float, "The same for --method project."],
    "norm_left": Annotated[float, "Norm of the delta that project leaves, as a share: lambda of the shrink with the same norm."],
})
LambdaRecord.__doc__ = """What a λ removes, over all matrices.

``paper``: ``‖Δ' − Δ‖ / ‖Δ‖ = (1 − λ) ‖Σ_I‖ / ‖Δ‖``; ``project``: ``(1 − λ) √e``, with the intruders' share e of the delta's energy;
``norm_left``: ``√(1 − (1 − λ²) e)``.
"""
# fmt: on


def delta_energy(findings: Findings) -> tuple[float, float]:
    """Sum ``‖Δ‖²`` over all matrices, and compute the intruders' share of it."""
    norms = [m.detection.delta_norm**2 for m in findings]
    taken = [m.detection.delta_norm**2 * m.detection.intruder_energy for m in findings]
    total = math.fsum(norms)
    return total, math.fsum(taken) / total if total > 0 else 0.0


def threshold_curve(findings: Findings) -> list[ThresholdRecord]:
    """Count the directions below each threshold, in rising order; the findings' own threshold is included."""
    names = ("similarity", "similarity_low", "similarity_high")
    columns: list[NDArray[np.float64]] = [
        np.sort(np.fromiter(chain.from_iterable(getattr(m.detection, name) for m in findings), np.float64))
        for name in names
    ]
    out: list[ThresholdRecord] = []
    for epsilon in sorted({*THRESHOLDS, findings.options.threshold_epsilon}):
        taken, most, least = (int(np.searchsorted(values, epsilon)) for values in columns)
        out.append({"epsilon": epsilon, "intruders": taken, "least": least, "most": most})
    return out


def lambda_curve(findings: Findings) -> list[LambdaRecord]:
    """Compute what each λ removes."""
    total, share = delta_energy(findings)
    intruding = math.fsum(m.detection.singular_values[j] ** 2 for m in findings for j in m.detection.intruders)
    paper, project = math.sqrt(intruding / total) if total > 0 else 0.0, math.sqrt(share)
    return [
        {"lambda": lam, "paper": (1 - lam) * paper, "project": (1 - lam) * project,
         "norm_left": math.sqrt(max(0.0, 1 - (1 - lam * lam) * share))}
        for lam in LAMBDAS
    ]  # fmt: skip
