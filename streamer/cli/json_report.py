"""Make the JSON of plans and dry runs that scripts rely on; that of findings is `Findings.record`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, cast

from streamer.cli.forecast import Forecast, ForecastRecord
from streamer.cli.forecast_table import forecast_text
from streamer.cli.layout import Screen, fit
from streamer.cli.tables import NO_LIMIT
from streamer.detection.findings_records import FindingsRecord, MatrixHead
from streamer.detection.matrices import cost
from streamer.detection.options import DetectionOptions
from streamer.errors import UnsupportedError
from streamer.json_types import Count, Keywords, ModuleName, OutputPath, ReportFile, TensorName
from streamer.output.records import Written
from streamer.plan.carried_tensors import CarriedRecord
from streamer.plan.plan import Plan
from streamer.plan.sources import AdapterSource, BaseSource
from streamer.storage.output_checks import free_bytes
from streamer.units import counted, format_size

# fmt: off
CommandForecast = Annotated[ForecastRecord | None, "What the command takes, from the beginning; null where there is nothing to do or the "
    "command is refused."]

class _PlanTotals(TypedDict):
    tensors: Annotated[Count, "Tensors of the base."]
    base_bytes: Annotated[Count, "Bytes of them, headers excluded."]
    matrices: NotRequired[Annotated[Count, "Matrices that the adapter changes."]]
    adapted_bytes: NotRequired[Annotated[Count, "Bytes of these in the base."]]
    largest_matrix: NotRequired[Annotated[str, "The tensor of the largest one."]]
    largest_matrix_bytes: NotRequired[Annotated[Count, "Its bytes in the base."]]
    detection_cost: NotRequired[Annotated[Count, "Units of work of a detection, in which its progress counts."]]

class NameRule(TypedDict):
    """A rule, and the first module that it found."""
    rule: Annotated[str, "exact, rename, or an exchange of prefixes."]
    modules: Annotated[Count, "Modules that it found."]
    module: ModuleName
    tensor: TensorName
    why: Annotated[str, "What speaks for it."]

class PlannedMatrix(MatrixHead):
    """A matrix that the adapter changes."""
    transposed: Annotated[bool, "Stored as (inputs, outputs)."]
    matched: Annotated[str, "The rule that found it, see `names`."]

class _Forecasts(TypedDict):
    detect: CommandForecast
    mitigate: CommandForecast
    merge: CommandForecast

class PlanRecord(TypedDict):
    """What `streamer inspect --json` prints: what is there, and what a run would take; of a base alone only part of it."""
    schema: Literal["streamer.plan/1"]
    base: Annotated[BaseSource, "The base model: its name, and what tells it from another, wherever it lies."]
    adapter: NotRequired[Annotated[AdapterSource, "The adapter, or the fine-tuned model in its place, in the same way."]]
    totals: Annotated[_PlanTotals, "Sums."]
    warnings: Annotated[list[str], "What may make the result differ from what was trained, a line each."]
    names: NotRequired[Annotated[list[NameRule], "By which rules modules were found in the base."]]
    matrices: NotRequired[Annotated[list[PlannedMatrix], "One entry a matrix, in the base's file order."]]
    carried: NotRequired[Annotated[list[CarriedRecord], "Tensors of the adapter that are no factors; of a fine-tuned model those that "
        "differ from the base."]]
    forecast: NotRequired[Annotated[_Forecasts, "By command, with its defaults; mitigate and merge from findings."]]
    refused: NotRequired[Annotated[dict[str, str], "Of the commands whose forecast is null: why each is refused, in one line."]]

class DryRun(TypedDict):
    """What `--dry-run --json` prints of detect, mitigate, merge, evaluate and fit: all checks passed, nothing written."""
    schema: Literal["streamer.dry-run/1"]
    command: Annotated[str, Keywords(enum=["detect", "mitigate", "merge", "evaluate", "fit"]), "The command."]
    output: OutputPath
    state: Annotated[str, Keywords(enum=["new", "resume", "done"]), "What a run would do: write it, finish an interrupted run, or nothing."]
    matrices: Annotated[Count, "Matrices that the adapter changes."]
    files: Annotated[Count, "Files that the output has, or will have, but the record."]
    bytes: Annotated[Count | None, "Bytes of them; null where they are not known beforehand."]
    free_bytes: Annotated[Count, "Bytes that are free on the output's disk."]
    forecast: CommandForecast

class SeveralRecord(TypedDict):
    """What detect, mitigate and merge print for several adapters, and report for a directory of findings: an object for each."""
    schema: Literal["streamer.several/1"]
    adapters: Annotated[dict[str, FindingsRecord | Written | DryRun], "By name of the adapter's directory: findings/1, output/2 "
        "or dry-run/1."]
    output: NotRequired[Annotated[str, "Path of the page of `report`, as it was given. With -o only."]]
    state: NotRequired[Annotated[Literal["written", "present"], "Whether `report` wrote the page, or found the same bytes there. -o only."]]
    files: NotRequired[Annotated[list[ReportFile], "The files of `report`. With -o only."]]
    free_bytes: NotRequired[Annotated[Count, "Of a dry run: bytes that are free on the output's disk."]]
    forecast: NotRequired[Annotated[ForecastRecord | None, "Of a dry run: what all of them take together; null if nothing is to do."]]
# fmt: on


def inspect_json(plan: Plan, forecasts: Mapping[str, Forecast | UnsupportedError]) -> PlanRecord:
    """Say what is there, and what a run would read, compute and take; null for a command that is refused, and why it is."""
    matrices: list[PlannedMatrix] = [
        {"tensor": t.tensor, "module": t.module.name, "shape": list(t.module.shape), "dtype": plan.weights[t.tensor].label,
         "rank": t.module.rank, "scale": t.module.scaling, "transposed": t.transposed, "matched": t.match.rule}
        for t in plan.targets
    ]  # fmt: skip
    largest = max(plan.targets, key=lambda t: plan.weights[t.tensor].nbytes)
    return {
        "schema": "streamer.plan/1",
        "base": plan.sources[0],
        "adapter": plan.sources[1],
        "totals": {
            "matrices": len(matrices),
            "tensors": len(plan.base.weight_map),
            "base_bytes": plan.base.data_bytes,
            "adapted_bytes": sum(plan.weights[t.tensor].nbytes for t in plan.targets),
            "largest_matrix": largest.tensor,
            "largest_matrix_bytes": plan.weights[largest.tensor].nbytes,
            "detection_cost": sum(cost(t, DetectionOptions()) for t in plan.targets),
        },
        "warnings": list(plan.warnings),
        "names": _names_json(plan),
        "matrices": matrices,
        "carried": plan.edits.listed(plan.base, plan.adapter.describes_model),
        "forecast": cast(_Forecasts, {c: asdict(f) if isinstance(f, Forecast) else None for c, f in forecasts.items()}),
        "refused": {c: str(f) for c, f in forecasts.items() if isinstance(f, UnsupportedError)},
    }


def _names_json(plan: Plan) -> list[NameRule]:
    """List the rules by which modules were found in the base: how many each, and the first of them."""
    groups: dict[str, NameRule] = {}
    for t in plan.targets:
        group = groups.setdefault(
            t.match.rule,
            {"rule": t.match.rule, "modules": 0, "module": t.module.name, "tensor": t.tensor, "why": t.match.why},
        )
        group["modules"] += 1
    return list(groups.values())


def dry_run(command: str, output: Path, state: str, matrices: int, files: int, nbytes: int | None,
            forecast: Forecast | None) -> tuple[DryRun, str]:  # fmt: skip
    """Describe what a dry run found: the object, and the line without its forecast.

    Parameters
    ----------
    state
        ``new``, ``resume`` or ``done``.
    nbytes
        Of the output; None where they are not known.
    """
    says = {"new": "would write", "resume": "would resume", "done": "nothing to do: it exists already"}[state]
    written = "" if nbytes is None else f", {format_size(nbytes)}"
    tree: DryRun = {"schema": "streamer.dry-run/1", "command": command, "output": str(output), "state": state,
            "matrices": matrices, "files": files, "bytes": nbytes,
            "free_bytes": free_bytes(output), "forecast": None if forecast is None else asdict(forecast)}  # fmt: skip
    return tree, f"dry run: {says} {output}: {counted(files, 'file')}{written}; {counted(matrices, 'matrix')}"


def dry_runs(command: str, output: str, parts: Mapping[str, tuple[Mapping[str, Any], str]],
             forecast: Forecast | None, screen: Screen = NO_LIMIT) -> tuple[Mapping[str, Any], str]:  # fmt: skip
    """Describe what dry runs found, by adapter, and what all of it would take."""
    free, tree = free_bytes(Path(output)), None if forecast is None else asdict(forecast)
    text = "" if tree is None else forecast_text(command, tree, free)
    if "" in parts:
        one, line = parts[""]
        return one, fit(f"{line}\n{text}".rstrip(), screen.width)
    text = fit(text, screen.width)
    return of_several(parts, {"free_bytes": free, "forecast": tree}, text and f"all together\n{text}")


def of_several(
    parts: Mapping[str, tuple[Mapping[str, Any], str]], more: Mapping[str, Any] | None = None, last: str = ""
) -> tuple[SeveralRecord, str]:
    """Combine the objects and texts on several adapters, by their names; with `more` on all of them, and a `last` text."""
    trees = {name: tree for name, (tree, _) in parts.items()}
    tree = cast(SeveralRecord, {"schema": "streamer.several/1", "adapters": trees, **(more or {})})
    texts = [f"{name}\n{text}" for name, (_, text) in parts.items()]
    return tree, "\n\n".join([*texts, last] if last else texts)
