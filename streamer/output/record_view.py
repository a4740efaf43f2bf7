"""Show a record to people in a few lines instead of its hundreds of values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamer.errors import printable
from streamer.methods import METHODS, Shrink, takes_findings
from streamer.units import counted, format_size


class WrittenView(dict[str, Any]):
    """A `Written` for Python's shells: the record itself, shown as `record_lines`."""

    def __repr__(self) -> str:
        title = f"{self['output']} ({self['command']}, {self['state']})"
        return "<Written: " + "\n ".join(record_lines(self, title)) + ">"


def record_lines(record: Mapping[str, Any], title: str) -> list[str]:
    """Summarise what was written and how, what became of the delta's norm, and what was lost or left out, one line each.

    Parameters
    ----------
    title
        Start of the first line: the output's location.
    """
    head = f"{title}: {counted(len(record['files']), 'file')}, {format_size(record['totals']['bytes'])}"
    return [printable(head), *mitigation_lines(record)]


def mitigation_lines(record: Mapping[str, Any]) -> list[str]:
    """Give the lines of `record_lines` that need no files."""
    t, method, lam, fitted = record["totals"], record["method"], record["lambda"], record.get("coefficients")
    mitigated, norms = f"{t['changed']} of {t['matrices']} matrices mitigated", f"|delta| {t['delta_norm']:.4g}"
    if fitted is not None:
        each = METHODS[method].changes if method in METHODS else "as it was fitted"
        how = f"method {method}, to keep {100 * fitted['keep']:g}% of the learning: {mitigated}, {each}"
    elif lam == 1:
        how = "lambda 1: the unchanged adapter, nothing mitigated"
    elif not takes_findings(method):
        how = f"method {method}, lambda {lam:g}: {mitigated}, each {METHODS[method].changes if method in METHODS else 'as a whole'}"
    else:
        how = f"method {method}, select {record['scale']}, lambda {lam:g}: {mitigated}, {counted(t['intruders'], 'intruder')} scaled"
    if lam != 1:
        norms += f" -> {t['delta_norm_after']:.4g}"
    if lam != 1 and method != Shrink.name and t["equal_norm_shrink"] <= 1:  # a shrink cannot make a delta larger
        norms += f"; baseline of equal norm: --method shrink --lambda {t['equal_norm_shrink']:.4f}"
    asked = record["to_lora"]
    kept = f"; written at the smallest ranks that keep {100 * (asked or 0):g} % of the energy"
    rank = kept if isinstance(asked, float) else f"; written at rank {asked}" if asked else ""
    lines = [how + rank, norms]
    if record["left_out"]:
        names = ", ".join(record["left_out"][:4]) + (", …" if len(record["left_out"]) > 4 else "")
        lines.append(f"not copied: {names} (weights or training state that would be stale)")
    if carried := record["carried"]:
        lines.append(
            f"carried along: {counted(len(carried), 'tensor')} beside the factors, {carried[0]['tensor']} first"
        )
    if record["command"] == "merge" and record["tokenizer"] == "adapter":
        lines.append("the tokenizer and its chat template are the adapter's own")
    share = 100 * t.get("rounded_away", 0) / (t.get("values") or 1)  # earlier versions did not count them
    if share >= 0.05:  # not 0.0%
        lines.append(
            f"rounding left {share:.1f}% of the values in these matrices unchanged: the result is not exactly base + delta"
        )
    if record["command"] == "mitigate":
        most = f"lost in projection: at most {100 * t['dropped_max']:.2f}% of a matrix's mitigated delta"
        worst = max(record["matrices"], key=lambda m: m["dropped"], default={"dropped": 0.0})
        lines.append(f"{most}, in {worst['tensor']}" if worst["dropped"] >= 5e-5 else most)  # not 0.00%
    return [printable(line) for line in lines]
