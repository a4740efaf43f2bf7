"""The result of a verification as text for people."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from streamer.units import counted, format_size

if TYPE_CHECKING:
    from streamer.verification.result import Verification


def verification_text(found: Verification) -> str:
    """Say what was compared, what was recomputed, and what was not and why."""
    totals = found["totals"]
    lines = [f"{found['output']}: {counted(totals['files'], 'file')}, {format_size(totals['bytes'])}, as recorded"]
    if "inputs" in found:
        lines.append(f"{totals['recomputed']} of {totals['matrices']} matrices recomputed, each within its rounding")
        undecided = sum(not r["decisions"] for r in found["recomputed"])
        if undecided and found["kind"] == "findings":
            lines.append(f"{undecided} of them without their similarities, being too large")
        reasons = Counter(skipped["reason"] for skipped in found["not_recomputed"])
        lines += [f"not recomputed: {count}: {reason}" for reason, count in reasons.items()]
    return "\n".join(lines)
