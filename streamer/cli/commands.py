"""Run the commands: each builds a request from the parsed arguments, runs it, and returns a result for `main` to print."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamer.api.choices import shown
from streamer.cli.layout import Screen, screen
from streamer.errors import UsageError
from streamer.events import Monitor

if TYPE_CHECKING:
    from streamer.api.detection import Detected
    from streamer.output.job import Written
    from streamer.workers import Workers

Result = tuple[Mapping[str, Any], str]
"""JSON object for `--json`, and text for people."""


def _inspect(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.api.options import Settings, take
    from streamer.api.records import InspectRequest
    from streamer.cli.tables import dtype_table, inspect_table

    found = InspectRequest(args.base, args.adapter, take(Settings, vars(args))).run(monitor)
    if found.files is None:
        return found.record, inspect_table(found.record, _screen(args))
    return found.record, dtype_table(found.files.items(), _screen(args))


def _detect(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.api.detection import DetectRequest
    from streamer.api.threads import choose_threads
    from streamer.cli.tables import findings_table, next_step

    request = DetectRequest.of(args.base, _adapters(args), args.output, vars(args))
    workers = _workers(args, monitor)
    if workers is None:
        choose_threads(args.threads, monitor)
    if args.dry_run:
        return _forecast(request, args, monitor, workers)

    def result(one: Detected, shown: Screen) -> Result:
        assert one.path is not None
        assert one.state is not None
        record = {**one.findings.record(), "output": str(one.path), "state": one.state}
        return record, findings_table(one.findings, shown, one.path, one.state)

    found = request.run(monitor, workers)
    tree, text = _each(found, result, args.output, _screen(args))
    name, last = list(found.items())[-1] if isinstance(found, dict) else (None, found)
    base, given = shown(args.base), shown(args.adapter[0]) if name is None else "ADAPTER"
    return tree, f"{text}\n\n{next_step(last.findings, last.path, _screen(args), base, given)}"


def _write(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.api.threads import choose_threads
    from streamer.api.writing import OutputRequest
    from streamer.cli.tables import record_table

    merges = args.command == "merge"
    request = OutputRequest.of(merges, args.base, _adapters(args), args.output, vars(args))
    workers = _workers(args, monitor) if merges else None
    if request.detects and workers is None:
        choose_threads(args.threads, monitor)
    if args.dry_run:
        return _forecast(request, args, monitor, workers)

    def result(one: Written, shown: Screen) -> Result:
        return {**one}, record_table(one, one["output"], shown)

    return _each(request.run(monitor, workers), result, args.output, _screen(args))


def _report(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.api.report import ReportRequest
    from streamer.cli.tables import report_text

    report = ReportRequest(args.findings, args.evaluation, args.output, args.overwrite).run(monitor)
    return report.record(), report_text(report, args.findings, _screen(args))


def _diff(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.api.report import diff_files
    from streamer.cli.tables import diff_table

    found = diff_files(args.first, args.second, monitor)
    return found.to_dict(), diff_table(found, _screen(args))


def _verify(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.api.verification import verify_output
    from streamer.cli.layout import verification_text

    found = verify_output(
        args.output, args.base, args.adapter, sample=args.sample, coefficients=args.coefficients, map=args.map, monitor=monitor,
    )  # fmt: skip
    return {**found}, verification_text(found)


def _evaluate(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.api.evaluation import EvaluateRequest
    from streamer.api.views import Names
    from streamer.cli.tables import evaluation_table, stood

    request = EvaluateRequest.of(args.base, args.adapter, args.output, vars(args))
    if args.dry_run:
        return _forecast(request, args, monitor)
    found = request.run(monitor)
    output, options = Path(args.output), request.options
    state = monitor.outputs[output]
    files = (
        shlex.quote(file) if file else ""
        for file in (args.general, args.task, args.output, args.findings, args.coefficients, args.map)
    )
    read = {name: getattr(options, name) for name in ("sequences", "length")}
    reading = (f" --{name} {most}" for name, most in read.items() if most != getattr(type(options), name))
    others = "".join(f" --other {shlex.quote(file)}" for file in args.other or ())
    names = replace(
        Names(shlex.join(map(shown, (args.base, args.adapter))), *files), reading="".join(reading), others=others
    )
    tree = {**found.to_dict(), "output": args.output, "state": state}
    return tree, evaluation_table(found, names, _screen(args), stood(output, state))


def _fit(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.api.fitting import FitRequest
    from streamer.cli.tables import fitting_table, stood

    request = FitRequest.of(args.base, args.adapter, args.output, vars(args))
    if args.dry_run:
        return _forecast(request, args, monitor)
    found = request.run(monitor)
    output = Path(args.output)
    state = monitor.outputs[output]
    text = fitting_table(found.facts, (shown(args.base), shown(args.adapter)), args.output, _screen(args))
    tree = {"schema": "streamer.fit/1", **found.facts, "output": args.output, "state": state}
    return tree, f"{text}\n{stood(output, state)}"


def _map(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.api.fitting import MapRequest, map_record
    from streamer.cli.tables import map_text

    if len(args.base) > 1:
        raise UsageError(f"BASE: expected one, found {len(args.base)}; to map several texts, join them in one file")
    request = MapRequest.of(args.base[0], args.output, vars(args))
    if args.dry_run:
        return _forecast(request, args, monitor)
    tree = map_record(request.run(monitor), args.output, monitor.outputs[Path(args.output)])
    return {**tree}, map_text(tree, shown(args.base[0]), _screen(args))


def _repair(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.api.repair import RepairRequest
    from streamer.cli.tables import repair_table

    request = RepairRequest.of(args.base, args.adapter, args.output, vars(args))
    if args.dry_run:
        return _forecast(request, args, monitor)
    found = request.run(monitor)
    inputs = shown(args.base), shown(args.adapter)
    return found.record, repair_table(found.record, found.written, inputs, _screen(args))


def _demo(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.api.demo import DemoRequest
    from streamer.cli.tables import demo_table

    output = Path(args.output) if args.output else None
    result = DemoRequest(args.mitigation_lambda, args.amplify, output).run(monitor)
    return result, demo_table(result, _screen(args))


COMMANDS = {
    "inspect": _inspect, "detect": _detect, "mitigate": _write, "merge": _write, "report": _report, "diff": _diff, "verify": _verify,
    "evaluate": _evaluate, "fit": _fit, "map": _map, "repair": _repair, "demo": _demo,
}  # fmt: skip


def _adapters(args: argparse.Namespace) -> str | list[str]:
    """Return the adapter, or a list if there are several."""
    given: list[str] = args.adapter
    return given if len(given) > 1 else given[0]


def _workers(args: argparse.Namespace, monitor: Monitor) -> Workers | None:
    """Open the workers that the options ask for, if any."""
    from streamer.api.executors import open_workers

    return open_workers(args.workers, args.executor, args.threads, monitor)


def _forecast(request: Any, args: argparse.Namespace, monitor: Monitor, *workers: Workers | None) -> Result:
    """Return a request's forecast, for `--dry-run`."""
    from streamer.cli.tables import dry_run_text

    record = request.forecast(monitor, *workers)
    return record, dry_run_text(record, args.command, _screen(args))


def _screen(args: argparse.Namespace) -> Screen:
    """Describe the screen for tables; a page explains its figures, so tables beside it have no legend."""
    page = args.command == "report" and args.output is not None
    return screen(args.all, args.legend and not page)


def _each(found: Any, result: Callable[[Any, Screen], Result], output: str, shown: Screen) -> Result:
    """Combine results for several adapters by name, in full with `--all`; return a single adapter's result unchanged."""
    from streamer.api.records import ByName, several
    from streamer.cli.tables import adapters_table, stood

    if not isinstance(found, ByName):
        return result(found, shown)
    later = replace(shown, legend=False)  # one legend is enough
    parts = {name: result(one, later if i else shown) for i, (name, one) in enumerate(found.items())}
    trees = {name: tree for name, (tree, _) in parts.items()}
    if shown.every:
        text = "\n\n".join(f"{name}\n{text}" for name, (_, text) in parts.items())
    else:
        present = all(tree["state"] == "present" for tree in trees.values())
        text = f"{adapters_table(trees, shown)}\n\n{stood(output, 'present' if present else 'written')}"
    return several(trees), text
