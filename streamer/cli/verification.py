"""Format the result of a verification for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from streamer.units import counted, format_size


def verification_text(found: Mapping[str, Any]) -> str:
    """State what was compared and recomputed, and what was not and why."""
    totals = found["totals"]
    lines = [f"{found['output']}: {counted(totals['files'], 'file')}, {format_size(totals['bytes'])}, as recorded"]
    if "inputs" not in found:
        return "\n".join([*lines, "compared only with its own record; give BASE ADAPTER to compare it with them"])
    lines.append(f"{totals['recomputed']} of {totals['matrices']} matrices recomputed, each within its rounding")
    if totals["tensors"]:
        lines.append(f"{totals['compared']} of {totals['tensors']} other tensors compared with the inputs'")
    for what in ("not_recomputed", "not_compared"):
        reasons = Counter(skipped["reason"] for skipped in found[what])
        lines += [f"{what.replace('_', ' ')}: {count}: {reason}" for reason, count in reasons.items()]
    return "\n".join([*lines, left_out(found)])


def left_out(found: Mapping[str, Any]) -> str:
    """Count the matrices and tensors that were not compared with the inputs."""
    totals = found["totals"]
    matrices, tensors = totals["matrices"] - totals["recomputed"], totals["tensors"] - totals["compared"]
    counts = [counted(n, what) for n, what in ((matrices, "matrix"), (tensors, "other tensor")) if n]
    tried = totals["not_recomputed"] + len(found["not_compared"]) >= totals["not_compared"]
    return f"not compared: {' and '.join(counts) or 'nothing'}{'' if tried else '; --sample all compares everything'}"
