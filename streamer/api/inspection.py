"""Inspect inputs: what they contain, which tensor each module changes, and what each command would need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from streamer.api.options import Settings
from streamer.api.records import NameRule, PlannedMatrix, PlanRecord, _Forecasts
from streamer.detection.device import choose_device
from streamer.detection.options import DetectionOptions
from streamer.errors import UnsupportedError
from streamer.events import Monitor
from streamer.forecast import Forecast, forecast_commands, measure_rates
from streamer.plan.architectures import with_architecture
from streamer.plan.plan import Plan, make_plan
from streamer.plan.sources import BaseSource
from streamer.storage.checkpoint import open_checkpoint
from streamer.weights.model_config import read_model_config


@dataclass(frozen=True)
class Inspection:
    """The result of an inspection.

    Attributes
    ----------
    record
        The object that `streamer inspect --json` prints.
    files
        For a base alone: dtype and bytes of each tensor, by file.
    """

    record: PlanRecord
    files: Mapping[str, list[tuple[str, int]]] | None = None


@dataclass(frozen=True)
class InspectRequest:
    """A requested inspection of a base, or of a base and an adapter."""

    base: str | Path
    adapter: str | Path | None
    settings: Settings

    def run(self, monitor: Monitor) -> Inspection:
        """Open the inputs and forecast the commands."""
        settings, located = self.settings, self.settings.located(monitor, peek=True)
        base = located.path(self.base)
        if self.adapter is None:
            return self._base_alone(base, monitor)
        plan = make_plan(base, located.path(self.adapter), settings.io, settings.stated, settings.architecture)
        monitor.warn(plan.warnings)
        rates = measure_rates(plan.base, monitor)
        return Inspection(inspection_record(plan, forecast_commands(plan, choose_device("auto"), rates)))

    def _base_alone(self, path: str | Path, monitor: Monitor) -> Inspection:
        base = open_checkpoint(path, self.settings.io)
        with_architecture(read_model_config(base.directory), self.settings.architecture)
        monitor.warn(base.warnings)
        files = {name: [(t.dtype, t.nbytes) for t in file.header.tensors] for name, file in base.files.items()}
        record: PlanRecord = {
            "schema": "streamer.plan/1", "base": cast(BaseSource, base.identity()), "warnings": list(base.warnings),
            "totals": {"tensors": len(base.weight_map), "base_bytes": base.data_bytes},
        }  # fmt: skip
        return Inspection(record, files)


def inspection_record(plan: Plan, forecasts: Mapping[str, Forecast | UnsupportedError]) -> PlanRecord:
    """Describe the inputs, and forecast each command; a refused command has null and the reason."""
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
            "detection_cost": sum(DetectionOptions().cost(t.module.shape) for t in plan.targets),
        },
        "warnings": list(plan.warnings),
        "names": _names_json(plan),
        "matrices": matrices,
        "carried": plan.edits.listed(plan.base, plan.adapter.describes_model),
        "forecast": cast(_Forecasts, {c: asdict(f) if isinstance(f, Forecast) else None for c, f in forecasts.items()}),
        "refused": {c: str(f) for c, f in forecasts.items() if isinstance(f, UnsupportedError)},
    }


def _names_json(plan: Plan) -> list[NameRule]:
    """List the rules by which modules were found in the base, each with the number of modules and the first one."""
    groups: dict[str, NameRule] = {}
    for t in plan.targets:
        group = groups.setdefault(
            t.match.rule,
            {"rule": t.match.rule, "modules": 0, "module": t.module.name, "tensor": t.tensor, "why": t.match.why},
        )
        group["modules"] += 1
    return list(groups.values())
