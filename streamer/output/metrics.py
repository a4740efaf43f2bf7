"""Measure a mitigation: the metrics of a matrix, as in an output's journal and record, and their totals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from streamer.detection.intruders import Detection
from streamer.errors import OutputError
from streamer.linalg.operators import Delta
from streamer.methods import Method
from streamer.output.records import MitigatedMatrix, Totals
from streamer.plan.targets import Target

MOST_LOST = 0.01
"""Largest share of a mitigated delta's Frobenius norm that may be lost without a warning."""


def matrix_metrics(
    target: Target, delta: Delta, after: Delta, found: Detection | None, method: Method, truncation_error: float = 0.0
) -> MitigatedMatrix:
    """Measure the mitigation of one matrix, as JSON values.

    Parameters
    ----------
    after
        Δ' as written.
    method
        The method of the mitigation.
    truncation_error
        ``‖Δ' − written‖_F / ‖Δ'‖_F``.
    """
    before = delta.norm()
    scaled = () if found is None else found.intruders if method.select == "all" else found.intruders[:1]
    return {"tensor": target.tensor, "module": target.module.name, "transposed": target.transposed, "intruders": list(scaled),
            "certified": None if found is None else found.certified, "delta_norm": before,
            "delta_norm_after": before if after is delta else after.norm(), "dropped": truncation_error}  # fmt: skip


def journalled(entry: dict[str, Any], path: Path) -> list[MitigatedMatrix]:
    """Return and check the journalled metrics of a finished file's matrices."""
    metrics: list[MitigatedMatrix] = entry.get("matrices", [])
    numbers = ("delta_norm", "delta_norm_after", "dropped")
    try:
        good = all(
            isinstance(m["intruders"], list)
            and type(m["transposed"]) is bool
            and m["certified"] in (True, False, None)
            and all(type(m.get(key, 0)) is int for key in ("values", "rounded_away"))
            and all(type(m[key]) is float and 0 <= m[key] < 1e100 for key in numbers)  # type: ignore[literal-required]  # keys of a record
            for m in metrics
        )
    except (KeyError, TypeError):
        good = False
    if not good:
        raise OutputError(
            f"{path}: the journal's figures of {entry['file']} are not of this version; --no-resume starts over"
        )
    return metrics


def totals(matrices: list[MitigatedMatrix], nbytes: int) -> Totals:
    """Sum the metrics of all matrices of an output of `nbytes` bytes."""
    before = math.sqrt(sum(m["delta_norm"] ** 2 for m in matrices))
    after = math.sqrt(sum(m["delta_norm_after"] ** 2 for m in matrices))
    return {"matrices": len(matrices), "intruders": sum(len(m["intruders"]) for m in matrices),
            "changed": sum(m["delta_norm_after"] != m["delta_norm"] for m in matrices),
            "delta_norm": before, "delta_norm_after": after, "equal_norm_shrink": after / before if before > 0 else 1.0,
            "dropped_max": max((m["dropped"] for m in matrices), default=0.0), "values": sum(m.get("values", 0) for m in matrices),
            "rounded_away": sum(m.get("rounded_away", 0) for m in matrices), "bytes": nbytes}  # fmt: skip


def truncation_warnings(matrices: Sequence[MitigatedMatrix], remedy: Callable[[], str]) -> list[str]:
    """Report how many matrices lose more than `MOST_LOST`, and which loses most; return an empty list if none does.

    Parameters
    ----------
    remedy
        Describes what to do instead.
    """
    lost = [m for m in matrices if m["dropped"] > MOST_LOST]
    if not lost:
        return []
    worst = max(lost, key=lambda m: m["dropped"])
    return [
        f"lost in projection: more than {100 * MOST_LOST:g} % of the delta in {len(lost)} of "
        f"{len(matrices)} matrices, most in {worst['tensor']!r} ({100 * worst['dropped']:.2f} %); {remedy()}"
    ]
