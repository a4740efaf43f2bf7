"""Make a command's last line: what it did, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamer.cli.verification import left_out
from streamer.units import counted, format_size


def summary(tree: Mapping[str, Any]) -> str:
    """Summarise a result in half a line from its JSON object, including whether it existed before."""
    parts = [tree] if "adapters" not in tree else list(tree["adapters"].values())
    present = sum(part.get("state") == "present" for part in parts)
    if not present:
        return _held(tree)
    return f"{_held(tree)}, {'exists' if len(parts) == 1 else f'{present} of {len(parts)} exist'} already"


def _held(tree: Mapping[str, Any]) -> str:
    schema = str(tree["schema"]).partition("/")[0]
    if schema == "streamer.several":
        parts = list(tree["adapters"].values())
        keys = ("matrices", "intruders", "certified", "changed", "bytes")
        totals = {key: sum(part.get("totals", {}).get(key, 0) for part in parts) for key in keys}
        one = {**parts[0], "totals": totals, "files": [f for part in parts for f in _files(part)]}
        return f"{counted(len(parts), 'adapter')}, {_held(one)}"
    totals = tree.get("totals", {})
    if schema == "streamer.findings":
        return f"{counted(totals['matrices'], 'matrix')}, {counted(totals['intruders'], 'intruder')}, {totals['certified']} certified"
    if schema == "streamer.output":
        from streamer.api.views import takes_findings

        scaled = f"{counted(totals['intruders'], 'intruder')} scaled, " if takes_findings(tree["method"]) else ""
        merged = f"{counted(totals['matrices'], 'matrix')} merged, " if tree["command"] == "merge" else ""
        return (
            f"{merged}{totals['changed']} of {counted(totals['matrices'], 'matrix')} mitigated, {scaled}"
            f"{counted(len(tree['files']), 'file')}, {format_size(totals['bytes'])}"
        )
    if schema == "streamer.verification":
        compared = (
            f", {counted(totals['recomputed'], 'matrix')} recomputed, {left_out(tree)}" if "inputs" in tree else ""
        )
        return f"{counted(totals['files'], 'file')}, {format_size(totals['bytes'])}, nothing differs{compared}"
    if schema == "streamer.evaluation":
        chosen = tree["suggestion"]
        return f"{counted(len(tree['variants']), 'variant')}" + (
            f", {chosen['name']} suggested" if chosen["name"] else ""
        )
    if schema == "streamer.report":
        files = f", {counted(len(tree['files']), 'file')}" if "files" in tree else ""
        return f"{_held(tree['findings'] or tree['record'] or tree['evaluation'])}{files}"
    if schema == "streamer.diff":
        from streamer.api.views import fates_counted

        return fates_counted(totals)
    if schema == "streamer.fit":
        return f"{counted(len(tree['sets']), 'set')} of new factors"
    if schema == "streamer.map":
        return f"{counted(tree['inputs'], 'input')} of {counted(tree['matrices'], 'matrix')}"
    if schema == "streamer.repair":
        return f"{'converted to LoRA, ' if 'lora' in tree else ''}chose the {tree['chosen']}"
    if schema == "streamer.demo":
        return f"{totals['planted']} intruders planted, {totals['found']} found, {totals['gone']} gone"
    if schema == "streamer.dry-run":
        return "nothing written"
    if schema == "streamer.plan":
        return counted(totals["matrices"], "matrix") if "matrices" in totals else counted(totals["tensors"], "tensor")
    return ""


def _files(part: Mapping[str, Any]) -> list[Any]:
    files = part.get("files", [])
    return files if isinstance(files, list) else []  # a dry run has only their number
