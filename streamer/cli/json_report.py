"""Make the JSON of plans and dry runs that scripts rely on; that of findings is `Findings.record`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from streamer.cli.forecast import Forecast
from streamer.cli.forecast_table import forecast_text
from streamer.cli.layout import Screen, fit
from streamer.cli.tables import NO_LIMIT
from streamer.detection.matrices import cost
from streamer.detection.options import DetectionOptions
from streamer.errors import UnsupportedError
from streamer.plan.plan import Plan
from streamer.storage.output_checks import free_bytes
from streamer.units import counted, format_size


def inspect_json(plan: Plan, forecasts: Mapping[str, Forecast | UnsupportedError]) -> dict[str, Any]:
    """Say what is there, and what a run would read, compute and take; null for a command that is refused, and why it is."""
    matrices = [
        {"tensor": t.tensor, "module": t.module.name, "shape": list(t.module.shape), "dtype": plan.weights[t.tensor].label,
         "rank": t.module.rank, "scale": t.module.scaling, "transposed": t.transposed, "matched": t.match.rule}
        for t in plan.targets
    ]  # fmt: skip
    largest = max(plan.targets, key=lambda t: plan.weights[t.tensor].nbytes)
    return {
        "schema": "streamer.plan/1",
        "base": {**plan.sources[0]},
        "adapter": {**plan.sources[1]},
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
        "forecast": {c: asdict(f) if isinstance(f, Forecast) else None for c, f in forecasts.items()},
        "refused": {c: str(f) for c, f in forecasts.items() if isinstance(f, UnsupportedError)},
    }


def _names_json(plan: Plan) -> list[dict[str, Any]]:
    """List the rules by which modules were found in the base: how many each, and the first of them."""
    groups: dict[str, dict[str, Any]] = {}
    for t in plan.targets:
        group = groups.setdefault(
            t.match.rule,
            {"rule": t.match.rule, "modules": 0, "module": t.module.name, "tensor": t.tensor, "why": t.match.why},
        )
        group["modules"] += 1
    return list(groups.values())


def dry_run(command: str, output: Path, state: str, matrices: int, files: int, nbytes: int | None,
            forecast: Forecast | None) -> tuple[dict[str, Any], str]:  # fmt: skip
    """Describe what a dry run found: the object, and the line without its forecast.

    Parameters
    ----------
    state
        ``new``, ``resume`` or ``done``.
    nbytes
        Of the output; None where they are not known.
    """
    says = {"new": "would write", "resume": "would resume", "done": "nothing to do: already stands"}[state]
    written = "" if nbytes is None else f", {format_size(nbytes)}"
    tree = {"schema": "streamer.dry-run/1", "command": command, "output": str(output), "state": state,
            "matrices": matrices, "files": files, "bytes": nbytes,
            "free_bytes": free_bytes(output), "forecast": None if forecast is None else asdict(forecast)}  # fmt: skip
    return tree, f"dry run: {says} {output}: {counted(files, 'file')}{written}; {counted(matrices, 'matrix')}"


def dry_runs(command: str, output: str, parts: Mapping[str, tuple[dict[str, Any], str]],
             forecast: Forecast | None, screen: Screen = NO_LIMIT) -> tuple[dict[str, Any], str]:  # fmt: skip
    """Describe what dry runs found, by adapter, and what all of it would take."""
    free, tree = free_bytes(Path(output)), None if forecast is None else asdict(forecast)
    text = "" if tree is None else forecast_text(command, tree, free)
    if "" in parts:
        one, line = parts[""]
        return one, fit(f"{line}\n{text}".rstrip(), screen.width)
    text = fit(text, screen.width)
    return of_several(parts, {"free_bytes": free, "forecast": tree}, text and f"all together\n{text}")


def of_several(
    parts: Mapping[str, tuple[dict[str, Any], str]], more: Mapping[str, Any] | None = None, last: str = ""
) -> tuple[dict[str, Any], str]:
    """Combine the objects and texts on several adapters, by their names; with `more` on all of them, and a `last` text."""
    trees = {name: tree for name, (tree, _) in parts.items()}
    tree = {"schema": "streamer.several/1", "adapters": trees, **(more or {})}
    texts = [f"{name}\n{text}" for name, (_, text) in parts.items()]
    return tree, "\n\n".join([*texts, last] if last else texts)
