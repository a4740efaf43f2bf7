"""Return what a command found as a JSON object and as text."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from streamer.api import views
from streamer.api.addresses import shown
from streamer.cli import tables
from streamer.cli.layout import Result, Screen, screen
from streamer.events import Monitor
from streamer.options import EvaluateOptions


def dry_run_result(record: Any, args: argparse.Namespace) -> Result:
    """Return a forecast."""
    return record, tables.dry_run_text(record, args.command, screen(args.all, args.legend))


def result(found: Any, args: argparse.Namespace, monitor: Monitor) -> Result:
    """Return what the command's request returned."""
    page = args.command == "report" and args.output is not None  # explains its figures: the table needs no legend
    on = screen(args.all, args.legend and not page)
    output = getattr(args, "output", None) or ""
    state = monitor.outputs.get(Path(output), "")
    match args.command:
        case "inspect":
            files = found.files
            text = tables.inspect_table(found.record, on) if files is None else tables.dtype_table(files.items(), on)
            return found.record, text
        case "detect":
            return _detected(found, args, on)
        case "mitigate" | "merge":
            return _each(found, lambda one, on: ({**one}, tables.record_table(one, one["output"], on)), output, on)
        case "report":
            return found.record(), tables.report_text(found, args.findings, on)
        case "diff":
            return found.to_dict(), tables.diff_table(found, on)
        case "evaluate":
            tree = {**found.to_dict(), "output": output, "state": state}
            return tree, tables.evaluation_table(found, _names(args), on, tables.stood(output, state))
        case "fit":
            text = tables.fitting_table(found.facts, (shown(args.base), shown(args.adapter)), output, on)
            tree = {"schema": "streamer.fit/1", **found.facts, "output": output, "state": state}
            return tree, f"{text}\n{tables.stood(output, state)}"
        case "map":
            tree = {**views.map_record(found, output, monitor.outputs[Path(output)])}
            return tree, tables.map_text(tree, shown(args.base[0]), on)
        case "repair":
            inputs = shown(args.base), shown(args.adapter)
            return found.record, tables.repair_table(found.record, found.written, inputs, on)
        case _:
            return found, tables.demo_table(found, on)


def _detected(found: Any, args: argparse.Namespace, on: Screen) -> Result:
    def result(one: Any, on: Screen) -> Result:
        record = {**one.findings.record(), "output": str(one.path), "state": one.state}
        return record, tables.findings_table(one.findings, on, one.path, one.state)

    tree, text = _each(found, result, args.output, on)
    name, last = list(found.items())[-1] if isinstance(found, dict) else (None, found)
    base, given = shown(args.base), shown(args.adapter[0]) if name is None else "ADAPTER"
    return tree, f"{text}\n\n{tables.next_step(last.findings, last.path, on, base, given)}"


def _names(args: argparse.Namespace) -> views.Names:
    """Return the words of the commands to run after an evaluation."""
    files = (args.general, args.task, args.output, args.findings, args.coefficients, args.map)
    default = {field.name: field.default for field in fields(EvaluateOptions)}
    read = {name: getattr(args, name) for name in ("sequences", "length")}
    return replace(
        views.Names(
            shlex.join(map(shown, (args.base, args.adapter))), *(shlex.quote(file) if file else "" for file in files)
        ),
        reading="".join(f" --{name} {most}" for name, most in read.items() if most != default[name]),
        others="".join(f" --other {shlex.quote(file)}" for file in args.other),
    )


def _each(found: Any, result: Callable[[Any, Screen], Result], output: str, on: Screen) -> Result:
    """Combine results for several adapters by name, in full with `--all`; return a single adapter's result unchanged."""
    if not isinstance(found, views.ByName):
        return result(found, on)
    later = replace(on, legend=False)  # one legend is enough
    parts = {name: result(one, later if i else on) for i, (name, one) in enumerate(found.items())}
    trees = {name: tree for name, (tree, _) in parts.items()}
    if on.every:
        text = "\n\n".join(f"{name}\n{text}" for name, (_, text) in parts.items())
    else:
        present = all(tree["state"] == "present" for tree in trees.values())
        text = f"{tables.adapters_table(trees, on)}\n\n{tables.stood(output, 'present' if present else 'written')}"
    return views.several(trees), text
