"""Inspect inputs, and define the JSON that no other folder defines: plans, dry runs, several adapters, errors and events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, cast

from streamer.adapters.finetuned import AdapterPaths, ByName
from streamer.api.requests import Request
from streamer.detection.findings import FindingsRecord
from streamer.detection.options import DetectionOptions
from streamer.errors import UnsupportedError
from streamer.events import Monitor
from streamer.forecast import Forecast, ForecastRecord
from streamer.json_types import (
    Amount,
    Count,
    Keywords,
    MatrixHead,
    ModuleName,
    OutputPath,
    TensorName,
)
from streamer.linalg.torch_state import CPU
from streamer.methods import Paper
from streamer.options import InspectOptions
from streamer.output.form import Form
from streamer.output.layout import Command
from streamer.output.mitigation import Mitigation
from streamer.output.record import Written
from streamer.output.write import plan_output
from streamer.plan.carried_tensors import CarriedRecord
from streamer.plan.plan import Plan, make_plan
from streamer.plan.side_files import AdapterSource, BaseSource
from streamer.storage.transaction import free_bytes


# fmt: off
class _PlanTotals(TypedDict):
    tensors: Annotated[Count, "Tensors of the base."]
    base_bytes: Annotated[Count, "Their bytes, without headers."]
    matrices: Annotated[Count, "Matrices that the adapter changes."]
    adapted_bytes: Annotated[Count, "Their bytes in the base."]
    largest_matrix: Annotated[str, "The tensor of the largest matrix."]
    largest_matrix_bytes: Annotated[Count, "Its bytes in the base."]
    detection_cost: Annotated[Count, "Units of work of a detection, as counted by its progress."]

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

class PlanRecord(TypedDict):
    """What `streamer inspect --json` prints: the inputs, and what each module changes."""
    schema: Literal["streamer.plan/2"]
    base: Annotated[BaseSource, "The base model: its name, and what identifies it, wherever it is stored."]
    adapter: Annotated[AdapterSource, "The adapter, or the fine-tuned model in its place, described in the same way."]
    totals: Annotated[_PlanTotals, "Sums."]
    warnings: Annotated[list[str], "What may make the result differ from what was trained, one line each."]
    names: Annotated[list[NameRule], "The rules that found modules in the base."]
    matrices: Annotated[list[PlannedMatrix], "One entry per matrix, in the base's file order."]
    carried: Annotated[list[CarriedRecord], "Tensors of the adapter other than factors; of a model, those that differ."]
    refused: Annotated[dict[str, str], "For each command that is refused with its defaults: why, in one line."]

class DryRun(TypedDict):
    """What `--dry-run --json` prints of detect, mitigate, merge, evaluate, map and repair: all checks passed, nothing was written."""
    schema: Literal["streamer.dry-run/1"]
    command: Annotated[str, Keywords(enum=["detect", "mitigate", "merge", "evaluate", "map", "repair"]), "The command."]
    output: OutputPath
    state: Annotated[str, Keywords(enum=["new", "resume", "done"]), "What a run would do: write it, finish an interrupted run, or nothing."]
    matrices: Annotated[Count, "Matrices that the adapter changes; 0 for map, which takes no adapter."]
    files: Annotated[Count, "Files that the output has, or will have, without the record."]
    bytes: Annotated[Count | None, "Their bytes; null if unknown in advance."]
    free_bytes: Annotated[Count, "Free bytes on the output's disk."]
    forecast: Annotated[ForecastRecord | None, "What the command needs, from the beginning; null if there is nothing to do."]

class SeveralRecord(TypedDict):
    """What detect, mitigate and merge print for several adapters: one object for each."""
    schema: Literal["streamer.several/1"]
    adapters: Annotated[dict[str, FindingsRecord | Written | DryRun], "By name of the adapter's directory."]
    free_bytes: NotRequired[Annotated[Count, "For a dry run: free bytes on the output's disk."]]
    forecast: NotRequired[Annotated[ForecastRecord | None, "For a dry run: what all runs together need; null if there is nothing to do."]]
# fmt: on


def dry_run(
    command: str,
    output: Path,
    state: str,
    matrices: int,
    files: int,
    nbytes: int | None,
    forecast: Forecast | None,
) -> DryRun:
    """Describe the result of a dry run.

    Parameters
    ----------
    state
        ``new``, ``resume`` or ``done``.
    nbytes
        Bytes of the output; None if unknown.
    """
    return {
        "schema": "streamer.dry-run/1",
        "command": command,
        "output": str(output),
        "state": state,
        "matrices": matrices,
        "files": files,
        "bytes": nbytes,
        "free_bytes": free_bytes(output),
        "forecast": None if forecast is None else asdict(forecast),
    }


def dry_runs(
    adapters: AdapterPaths, output: Path, runs: Sequence[DryRun], forecast: Forecast | None
) -> DryRun | SeveralRecord:
    """Join the results of dry runs; for several adapters, by name and with the forecast for all."""
    collected = adapters.collected(runs)
    if not isinstance(collected, ByName):
        return collected
    return several(
        collected,
        free_bytes=free_bytes(output),
        forecast=None if forecast is None else asdict(forecast),
    )


def several(by_name: Mapping[str, Mapping[str, Any]], **totals: Any) -> SeveralRecord:
    """Join the records of several adapters, with keys for all of them."""
    return cast(
        SeveralRecord, {"schema": "streamer.several/1", "adapters": dict(by_name), **totals}
    )


# fmt: off
class ErrorEntry(TypedDict):
    """An error."""
    kind: Annotated[str, "Name of the error's class in streamer.errors, or of Python's own class."]
    exit_code: Annotated[int, Keywords(minimum=1, maximum=255), "Exit code of the command."]
    message: Annotated[str, "Where, what was expected and found, and what to do next, in one line."]
    path: Annotated[str | None, "The file or directory that it is about; null if it is about none or several."]
    lines: NotRequired[Annotated[list[str], "More about it: the choices, if there are some."]]

class ErrorsRecord(TypedDict):
    """What any command prints with --json if it fails; the message also goes to stderr."""
    schema: Literal["streamer.error/1"]
    errors: Annotated[list[ErrorEntry], Keywords(minItems=1), "What went wrong; at present always one."]

class EventRecord(TypedDict):
    """A line that --json-events writes to stderr while a command runs; the last is `done` or `error`."""
    schema: Literal["streamer.event/1"]
    event: Annotated[Literal["progress", "warning", "note", "error", "done"], "A step; a message (warning, note); or the end."]
    seconds: Annotated[Amount, "Wall time in s since the command began."]
    stage: NotRequired[Annotated[Literal["download", "probe", "detect", "write", "verify", "recompute", "evaluate", "fit", "map"],
        "For progress, in bytes: download (hub: files), write, verify; in work: detect; in matrices: recompute; in products: others."]]
    name: NotRequired[Annotated[str, "For progress: the matrix or file that has just begun; empty at the end of a stage."]]
    done: NotRequired[Annotated[Count, "For progress: units that are done."]]
    total: NotRequired[Annotated[Count, "For progress: total number of units."]]
    items: NotRequired[Annotated[Count, "For progress: matrices (detect, recompute), tensors and files (write), files or layers done."]]
    of: NotRequired[Annotated[Count, "For progress: their total number; 0 if unknown."]]
    adapter: NotRequired[Annotated[str, "For progress: name of the adapter if there are several, else empty."]]
    kind: NotRequired[Annotated[str, "For an error: name of its class in streamer.errors, or of Python's own class."]]
    exit_code: NotRequired[Annotated[int, Keywords(minimum=1, maximum=255), "For an error: exit code of the command."]]
    path: NotRequired[Annotated[str | None, "For an error: the file or directory that it is about; null if it is about none or several."]]
    message: NotRequired[Annotated[str, "The text of a warning or note; what was wrong and what to do next; or whether it existed."]]
# fmt: on


class InspectRequest(Request, InspectOptions):
    """A requested inspection of a base and an adapter."""

    def run(self, monitor: Monitor) -> PlanRecord:
        """Open the inputs, and find out which commands are refused."""
        base, adapter = self.located(monitor, peek=True).paths(self.base, self.adapter)
        plan = make_plan(base, adapter, self.io, self.stated, self.architecture)
        monitor.warn(plan.warnings)
        return inspection_record(plan)


def inspection_record(plan: Plan) -> PlanRecord:
    """Describe the inputs, and say which outputs are refused."""
    mitigation = Mitigation(plan, Paper(), DetectionOptions(), CPU)
    commands: tuple[Command, ...] = ("mitigate", "merge")
    refused: dict[str, str] = {}
    for command in commands:
        try:
            plan_output(command, mitigation, Form(), Path("output"))
        except UnsupportedError as e:
            refused[command] = str(e)
    weights = [plan.weights[t.tensor] for t in plan.targets]
    matrices: list[PlannedMatrix] = [
        {
            "tensor": target.tensor,
            "module": target.module.name,
            "shape": target.module.shape,
            "dtype": weight.label,
            "rank": target.module.rank,
            "scale": target.module.scaling,
            "transposed": target.transposed,
            "matched": target.match.rule,
        }
        for target, weight in zip(plan.targets, weights, strict=True)
    ]
    rules: dict[str, NameRule] = {}
    for target in plan.targets:
        match = target.match
        rule = rules.setdefault(
            match.rule,
            {
                "rule": match.rule,
                "modules": 0,
                "module": target.module.name,
                "tensor": target.tensor,
                "why": match.why,
            },
        )
        rule["modules"] += 1
    largest = max(plan.targets, key=lambda t: plan.weights[t.tensor].nbytes)
    return {
        "schema": "streamer.plan/2",
        "base": plan.sources[0],
        "adapter": plan.sources[1],
        "totals": {
            "matrices": len(matrices),
            "tensors": len(plan.base.weight_map),
            "base_bytes": plan.base.data_bytes,
            "adapted_bytes": sum(weight.nbytes for weight in weights),
            "largest_matrix": largest.tensor,
            "largest_matrix_bytes": plan.weights[largest.tensor].nbytes,
            "detection_cost": sum(mitigation.detection.cost(t.module.shape) for t in plan.targets),
        },
        "warnings": list(plan.warnings),
        "names": [*rules.values()],
        "matrices": matrices,
        "carried": plan.edits.listed(plan.base, plan.adapter.describes_model),
        "refused": refused,
    }
