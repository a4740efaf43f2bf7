"""The commands: each takes the parsed arguments, calls the library, and returns one result, which `main` prints."""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamer.cli.layout import Screen, screen
from streamer.cli.threads import choose_threads
from streamer.errors import UsageError
from streamer.events import Monitor

if TYPE_CHECKING:
    from streamer.findings import Findings
    from streamer.intruders import DetectionOptions, MitigationOptions


Result = tuple[dict[str, Any], str]
"""The object that `--json` prints, and the text for people."""


def _inspect(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.cli.forecast import forecast_commands
    from streamer.cli.json_report import inspect_json
    from streamer.cli.tables import dtype_table, inspect_table
    from streamer.pipeline import choose_device
    from streamer.plan import make_plan
    from streamer.storage.checkpoint import open_checkpoint

    if args.adapter is not None:
        plan = make_plan(args.base, args.adapter, args.io, args.base_is_residual)
        monitor.warn(plan.warnings)
        tree = inspect_json(plan, forecast_commands(plan, choose_device("auto"), monitor))
        return tree, inspect_table(tree, _screen(args))
    base = open_checkpoint(args.base, args.io)
    monitor.warn(base.warnings)
    files = [(name, [(t.dtype, t.nbytes) for t in f.header.tensors]) for name, f in base.files.items()]
    tree = {"schema": "streamer.plan/1", "base": base.identity(), "warnings": list(base.warnings),
            "totals": {"tensors": len(base.weight_map), "base_bytes": base.data_bytes}}  # fmt: skip
    return tree, dtype_table(files, _screen(args))


def _detect(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.api import detect_intruder_dimensions
    from streamer.cli.forecast import forecast_detection, shared_by_detections, together
    from streamer.cli.json_report import dry_run, dry_runs, findings_json
    from streamer.cli.tables import findings_table
    from streamer.pipeline import choose_device, inspect_detections
    from streamer.plan import make_plans
    from streamer.several import findings_of, named_adapters

    options = _detection_options(args, None)
    adapters = _adapters(args)
    named = named_adapters(adapters)
    choose_threads(args.threads, monitor)
    if args.dry_run:
        device = choose_device(args.device)
        plans = make_plans(args.base, [*named.values()], args.io, args.base_is_residual)
        monitor.warn(warning for plan in plans for warning in plan.warnings)
        paths = [findings_of(args.output, name) for name in named]
        states = inspect_detections(plans, paths, options, args.overwrite, not args.no_resume)
        parts, todo, forecasts = {}, [], []
        for name, plan, path, state in zip(named, plans, paths, states, strict=True):
            forecast = None
            if state != "done":
                todo.append(plan)
                forecasts.append(forecast := forecast_detection(plan, options, device, monitor))
            parts[name] = dry_run(args.command, path, state, len(plan.targets), 1, None, forecast)
        return dry_runs(
            args.command, args.output, parts, together(forecasts, shared_by_detections(todo)), _screen(args)
        )
    found = detect_intruder_dimensions(
        args.base, adapters, args.output, top_k=options.top_k, threshold_epsilon=options.threshold_epsilon,
        solver=options.solver, max_memory=options.max_memory, device=args.device, io=args.io,
        base_is_residual=args.base_is_residual, resume=not args.no_resume,
        overwrite=args.overwrite,
        monitor=monitor,
    )  # fmt: skip
    each = found if isinstance(found, dict) else {"": found}
    shown = _screen(args)
    parts = {}
    for name, one in each.items():
        path = findings_of(args.output, name)
        tree = findings_json(one) | {"output": str(path), "state": monitor.outputs[path]}
        parts[name] = tree, findings_table(one, shown, path, monitor.outputs[path])
    return _each(parts, args.output, shown)


def _mitigate(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.adapted import AdapterSink
    from streamer.api import reduce_intruder_dimension
    from streamer.converted import LoraSink

    if args.to_lora is None:
        return _apply(args, monitor, AdapterSink, reduce_intruder_dimension)
    sink = functools.partial(LoraSink, rank=args.to_lora)
    return _apply(args, monitor, sink, functools.partial(reduce_intruder_dimension, to_lora=args.to_lora))


def _merge(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.api import merge_with_reduced_intruder_dimensions
    from streamer.apply import ModelSink

    return _apply(args, monitor, ModelSink, merge_with_reduced_intruder_dimensions, dequantize=args.dequantize)


def _apply(args: argparse.Namespace, monitor: Monitor, sink: Any, write: Any, **special: Any) -> Result:
    from streamer.api import findings_by_name, prepare
    from streamer.cli.forecast import forecast_output, shared_by_merges, together
    from streamer.cli.json_report import dry_run, dry_runs
    from streamer.cli.tables import record_table
    from streamer.findings import load_findings
    from streamer.outputs import inspect_jobs
    from streamer.several import model_of, named_adapters

    adapters = _adapters(args)
    named = named_adapters(adapters)
    given = findings_by_name(args.findings or None, named)
    special["model_card"] = not args.no_card
    detection = _detection_options(args, load_findings(given[0]) if isinstance(given[0], Path) else None)
    mitigation = _mitigation_options(args)
    if mitigation.needs_detection and given[0] is None:
        choose_threads(args.threads, monitor)
    if args.dry_run:
        jobs = prepare(args.base, [*named.values()], mitigation, detection, given, args.device, args.io,
                       base_is_residual=args.base_is_residual, **special)  # fmt: skip
        monitor.warn(warning for job in jobs for warning in job.plan.warnings)
        sinks = [sink(job, model_of(args.output, name)) for job, name in zip(jobs, named, strict=True)]
        states = inspect_jobs(sinks, args.overwrite, not args.no_resume)
        parts, todo, forecasts = {}, [], []
        for name, planned, state in zip(named, sinks, states, strict=True):
            forecast = None
            if state != "done":
                todo.append(planned)
                forecasts.append(forecast := forecast_output(planned, monitor=monitor))
            output, matrices = planned.output, len(planned.job.plan.targets)
            parts[name] = dry_run(
                args.command, output.path, state, matrices, len(output.files), output.total_bytes, forecast
            )
        return dry_runs(args.command, args.output, parts, together(forecasts, shared_by_merges(todo)), _screen(args))
    found = write(
        args.base, adapters, args.output, findings=args.findings or None, top_k=detection.top_k,
        threshold_epsilon=detection.threshold_epsilon, mitigation_lambda=mitigation.mitigation_lambda, method=mitigation.method,
        scale=mitigation.scale, solver=detection.solver, max_memory=detection.max_memory, device=args.device, io=args.io,
        base_is_residual=args.base_is_residual, resume=not args.no_resume, overwrite=args.overwrite, monitor=monitor, **special,
    )  # fmt: skip
    parts = {}
    for name, record in ({"": found} if "" in named else found).items():
        parts[name] = dict(record), record_table(record, record["output"], _screen(args))
    return _each(parts, args.output, _screen(args))


def _report(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.cli.json_report import findings_json
    from streamer.cli.tables import findings_table
    from streamer.findings import load_findings

    findings = load_findings(args.findings)
    return findings_json(findings), findings_table(findings, _screen(args))


def _verify(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.cli.verification import verification_text
    from streamer.verification.run import verify

    found = verify(args.output, args.base, args.adapter, args.sample, args.max_memory, monitor)
    return {**found}, verification_text(found)


def _demo(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.cli.demo import demo_table, run_demo

    _check_lambda(args.mitigation_lambda)
    if args.keep:
        if os.path.lexists(args.keep):
            raise UsageError(f"--keep: {args.keep} exists; name a directory that does not")
        result = run_demo(Path(args.keep), args.mitigation_lambda, monitor)
    else:
        with tempfile.TemporaryDirectory(prefix="streamer-demo-") as directory:
            result = run_demo(Path(directory), args.mitigation_lambda, monitor)
        result["directory"] = None  # is gone
    return result, demo_table(result, _screen(args))


COMMANDS = {
    "inspect": _inspect,
    "detect": _detect,
    "mitigate": _mitigate,
    "merge": _merge,
    "report": _report,
    "verify": _verify,
    "demo": _demo,
}


def _detection_options(args: argparse.Namespace, findings: Findings | None) -> DetectionOptions:
    """The options as given; what was not given is the findings', or the default."""
    from streamer.intruders import DetectionOptions

    default = findings.options if findings is not None else DetectionOptions()
    return DetectionOptions(
        top_k=default.top_k if args.top_k is None else args.top_k,
        threshold_epsilon=default.threshold_epsilon if args.epsilon is None else args.epsilon,
        solver=default.solver if args.solver is None else args.solver,
        max_memory=args.max_memory,  # of this run: that of the findings was their own
    )


def _mitigation_options(args: argparse.Namespace) -> MitigationOptions:
    from streamer.intruders import MitigationOptions

    options = MitigationOptions(args.mitigation_lambda, args.method, args.scale)
    if not args.amplify:
        _check_lambda(args.mitigation_lambda, "; --amplify permits others: above 1 intruders grow")
    return options


def _check_lambda(value: float, hint: str = "") -> None:
    """Refuse a lambda that does not mitigate: 75 for 0.75, or the share to remove with a minus. The library takes any, as PEFT's does."""
    if not 0 <= value <= 1:
        raise UsageError(f"--lambda: expected what is left of an intruder, in [0, 1], found {value:g}{hint}")


def _adapters(args: argparse.Namespace) -> str | list[str]:
    """The adapter, or several: a list, or a directory of adapters."""
    from streamer.several import holds_adapters

    if args.command not in ("detect", "merge"):
        return str(args.adapter)
    given: list[str] = args.adapter
    return given if len(given) > 1 or holds_adapters(given[0]) else given[0]


def _each(parts: Mapping[str, Result], output: str, shown: Screen) -> Result:
    """The result of the one adapter; or of several by their names, in full if all is asked for."""
    from streamer.cli.json_report import of_several
    from streamer.cli.tables import adapters_table, stood

    if "" in parts:
        return parts[""]
    tree, full = of_several(parts)
    present = all(part["state"] == "present" for part, _ in parts.values())
    last = stood(output, "present" if present else "written")
    return tree, full if shown.every else f"{adapters_table(tree['adapters'], shown)}\n\n{last}"


def _screen(args: argparse.Namespace) -> Screen:
    return screen(args.all)
