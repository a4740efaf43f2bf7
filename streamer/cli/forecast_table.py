"""Format forecasts for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamer.cli.layout import Column, Screen, fit, table
from streamer.units import counted, format_duration, format_size


def forecast_table(forecasts: Mapping[str, Mapping[str, Any] | None], screen: Screen) -> str:
    """Format the forecasts of all commands, one line for each."""
    rows = []
    for command, f in forecasts.items():
        if f is None:
            rows.append([command, "refused", "", "", ""])
            continue
        most = "at most " if command == "detect" else ""
        memory = format_size(f["peak_memory_bytes"])
        if f["escalated_memory_bytes"] > f["peak_memory_bytes"]:
            memory += f" to {format_size(f['escalated_memory_bytes'])}"
        read, written = _read(f), most + format_size(f["write_bytes"])
        rows.append([command, memory, read, written, _time(f["seconds"])])
    cells = list(zip(*rows, strict=True)) if rows else [()] * 5
    threads = next((f" on {counted(f['threads'], 'thread')}" for f in forecasts.values() if f), "")
    columns = [
        Column("forecast", cells[0], "what each command needs; mitigate and merge with findings", left=True),
        Column("memory", cells[1], "at its peak; the larger number if the dense solver, or float64, must decide", priority=3),
        Column("read", cells[2], priority=1),
        Column("written", cells[3], "--dry-run shows the free disk", priority=2),
        Column("time", cells[4], f"work divided by the rates of a product and a read at this load{threads}, within a factor of 3", 4),
    ]  # fmt: skip
    return table(columns, screen)


def forecast_text(command: str, forecast: Mapping[str, Any], free: int) -> str:
    """Format one command's forecast in one line."""
    beside = (
        f" and at most {format_size(forecast['temporary_bytes'])} temporarily" if forecast["temporary_bytes"] else ""
    )
    most = "at most " if command == "detect" else ""
    return (
        f"forecast: memory {_memory(forecast)}; "
        f"reads {_read(forecast)}, writes {most}{format_size(forecast['write_bytes'])}{beside}; "
        f"{format_size(free)} free; time {_time(forecast['seconds'])}, "
        f"on {counted(forecast['threads'], 'thread')}, within a factor of 3 if the load stays as it is and the disk keeps up"
    )


def _read(forecast: Mapping[str, Any]) -> str:
    """Format the bytes to read, with those that cross the network."""
    far = forecast["network_bytes"]
    return format_size(forecast["read_bytes"]) + (f" ({format_size(far)} over the network)" if far else "")


def _memory(forecast: Mapping[str, Any]) -> str:
    usual, most = forecast["peak_memory_bytes"], forecast["escalated_memory_bytes"]
    there = forecast["device_memory_bytes"]
    return format_size(usual) + (
        f", {format_size(most)} if the dense solver, or float64, must decide" if most > usual
        else f", of it {format_size(there)} on the GPU" if there else ""
    )  # fmt: skip


def _time(seconds: float | None) -> str:
    return "not estimated" if seconds is None else f"about {format_duration(seconds)}"


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
