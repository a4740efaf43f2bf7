"""Format the result of a dry run from its record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamer.cli.forecast_table import forecast_text
from streamer.cli.layout import Screen, fit
from streamer.units import counted, format_size


def dry_run_text(record: Mapping[str, Any], command: str, screen: Screen) -> str:
    """Describe what a run would write and need, for one output or those of several adapters."""
    found = record.get("adapters")
    tree = record["forecast"]
    forecast = "" if tree is None else forecast_text(command, tree, record["free_bytes"])
    if found is None:
        return fit(f"{_line(record)}\n{forecast}".rstrip(), screen.width)
    parts = [f"{name}\n{_line(one)}" for name, one in found.items()]
    return "\n\n".join([*parts, f"all together\n{fit(forecast, screen.width)}"] if forecast else parts)


def _line(one: Mapping[str, Any]) -> str:
    says = {"new": "would write", "resume": "would resume", "done": "nothing to do: it exists already"}[one["state"]]
    written = "" if one["bytes"] is None else f", {format_size(one['bytes'])}"
    files, matrices = counted(one["files"], "file"), counted(one["matrices"], "matrix")
    return f"dry run: {says} {one['output']}: {files}{written}; {matrices}"
