"""Define the JSON that commands print and no other folder defines: plans, dry runs, and results for several adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, cast

from streamer.adapters.one_or_several import ByName, One, Several
from streamer.detection.findings_records import FindingsRecord, MatrixHead
from streamer.forecast import Forecast, ForecastRecord
from streamer.json_types import Count, Keywords, ModuleName, OutputPath, ReportFile, TensorName
from streamer.output.records import Written
from streamer.plan.carried_tensors import CarriedRecord
from streamer.plan.sources import AdapterSource, BaseSource
from streamer.storage.output_checks import free_bytes

__all__ = [
    "ByName",
    "DryRun",
    "NameRule",
    "PlanRecord",
    "PlannedMatrix",
    "SeveralRecord",
    "dry_run",
    "dry_runs",
    "several",
]

# fmt: off
CommandForecast = Annotated[ForecastRecord | None, "What the command needs, from the beginning; null if there is nothing to do or the "
    "command is refused."]

class _PlanTotals(TypedDict):
    tensors: Annotated[Count, "Tensors of the base."]
    base_bytes: Annotated[Count, "Their bytes, without headers."]
    matrices: NotRequired[Annotated[Count, "Matrices that the adapter changes."]]
    adapted_bytes: NotRequired[Annotated[Count, "Their bytes in the base."]]
    largest_matrix: NotRequired[Annotated[str, "The tensor of the largest matrix."]]
    largest_matrix_bytes: NotRequired[Annotated[Count, "Its bytes in the base."]]
    detection_cost: NotRequired[Annotated[Count, "Units of work of a detection, as counted by its progress."]]

class NameRule(TypedDict):
    """A rule, and the first module that it found."""
    rule: Annotated[str, "exact, rename, or a change of prefix."]
    modules: Annotated[Count, "Modules that it found."]
    module: ModuleName
    tensor: TensorName
    why: Annotated[str, "The evidence for the rule."]

class PlannedMatrix(MatrixHead):
    """A matrix that the adapter changes."""
    transposed: Annotated[bool, "Whether it is stored as (inputs, outputs)."]
    matched: Annotated[str, "The rule that found it; see `names`."]

class _Forecasts(TypedDict):
    detect: CommandForecast
    mitigate: CommandForecast
    merge: CommandForecast

class PlanRecord(TypedDict):
    """What `streamer inspect --json` prints: the inputs, and what a run would need; for a base alone, only part of it."""
    schema: Literal["streamer.plan/1"]
    base: Annotated[BaseSource, "The base model: its name, and what identifies it, wherever it is stored."]
    adapter: NotRequired[Annotated[AdapterSource, "The adapter, or the fine-tuned model in its place, described in the same way."]]
    totals: Annotated[_PlanTotals, "Sums."]
    warnings: Annotated[list[str], "What may make the result differ from what was trained, one line each."]
    names: NotRequired[Annotated[list[NameRule], "The rules that found modules in the base."]]
    matrices: NotRequired[Annotated[list[PlannedMatrix], "One entry per matrix, in the base's file order."]]
    carried: NotRequired[Annotated[list[CarriedRecord], "Tensors of the adapter that are not factors; for a fine-tuned model, those that "
        "differ from the base."]]
    forecast: NotRequired[Annotated[_Forecasts, "For each command, with its defaults; for mitigate and merge, from findings."]]
    refused: NotRequired[Annotated[dict[str, str], "For each command without a forecast: why it is refused, in one line."]]

class DryRun(TypedDict):
    """What `--dry-run --json` prints of detect, mitigate, merge, evaluate, fit, map and repair: all checks passed, nothing was written."""
    schema: Literal["streamer.dry-run/1"]
    command: Annotated[str, Keywords(enum=["detect", "mitigate", "merge", "evaluate", "fit", "map", "repair"]), "The command."]
    output: OutputPath
    state: Annotated[str, Keywords(enum=["new", "resume", "done"]), "What a run would do: write the output, finish an interrupted run, or "
        "nothing."]
    matrices: Annotated[Count, "Matrices that the adapter changes; 0 for map, which takes no adapter."]
    files: Annotated[Count, "Files that the output has, or will have, without the record."]
    bytes: Annotated[Count | None, "Their bytes; null if unknown in advance."]
    free_bytes: Annotated[Count, "Free bytes on the output's disk."]
    forecast: CommandForecast

class SeveralRecord(TypedDict):
    """What detect, mitigate and merge print for several adapters, and report for a directory of findings: one object for each."""
    schema: Literal["streamer.several/1"]
    adapters: Annotated[dict[str, FindingsRecord | Written | DryRun], "By name of the adapter's directory: findings/1, output/2 "
        "or dry-run/1."]
    output: NotRequired[Annotated[str, "Path of the page of `report`, as given. Only with -o."]]
    state: NotRequired[Annotated[Literal["written", "present"], "Whether `report` wrote the page, or found the same bytes there. Only with "
        "-o."]]
    files: NotRequired[Annotated[list[ReportFile], "The files of `report`. Only with -o."]]
    free_bytes: NotRequired[Annotated[Count, "For a dry run: free bytes on the output's disk."]]
    forecast: NotRequired[Annotated[ForecastRecord | None, "For a dry run: what all runs together need; null if there is nothing to do."]]
# fmt: on


def dry_run(
    command: str, output: Path, state: str, matrices: int, files: int, nbytes: int | None, forecast: Forecast | None
) -> DryRun:
    """Describe the result of a dry run.

    Parameters
    ----------
    state
        ``new``, ``resume`` or ``done``.
    nbytes
        Bytes of the output; None if unknown.
    """
    return {"schema": "streamer.dry-run/1", "command": command, "output": str(output), "state": state,
            "matrices": matrices, "files": files, "bytes": nbytes,
            "free_bytes": free_bytes(output), "forecast": None if forecast is None else asdict(forecast)}  # fmt: skip


def dry_runs(
    adapters: One | Several, output: Path, found: Sequence[DryRun], forecast: Forecast | None
) -> DryRun | SeveralRecord:
    """Join the results of dry runs; for several adapters, by name and with the forecast for all."""
    if isinstance(adapters, One):
        return adapters.collected(found)
    tree = None if forecast is None else asdict(forecast)
    return several(adapters.collected(found), {"free_bytes": free_bytes(output), "forecast": tree})


def several(by_name: Mapping[str, Mapping[str, Any]], more: Mapping[str, Any] | None = None) -> SeveralRecord:
    """Join the records of several adapters, with the keys `more` for all of them."""
    return cast(SeveralRecord, {"schema": "streamer.several/1", "adapters": dict(by_name), **(more or {})})
