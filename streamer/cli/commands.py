"""Run the commands: each takes the parsed arguments, calls the library, and returns one result, which `main` prints."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from streamer.cli.layout import Screen, screen
from streamer.cli.threads import choose_threads
from streamer.errors import OutputExistsError
from streamer.events import Monitor

if TYPE_CHECKING:
    from streamer.adapters.stated import Stated
    from streamer.cli.json_report import PlanRecord
    from streamer.detection.findings import Findings
    from streamer.detection.findings_records import FindingsRecord
    from streamer.detection.options import DetectionOptions, RunOptions
    from streamer.output.output_spec import Writer
    from streamer.plan.sources import BaseSource


Result = tuple[Mapping[str, Any], str]
"""The object that `--json` prints, and the text for people."""


def _inspect(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.cli.forecast import forecast_commands
    from streamer.cli.json_report import inspect_json
    from streamer.cli.tables import dtype_table, inspect_table
    from streamer.detection.device import choose_device
    from streamer.plan.architectures import with_architecture
    from streamer.plan.plan import make_plan
    from streamer.storage.checkpoint import open_checkpoint
    from streamer.weights.model_config import read_model_config

    if args.adapter is not None:
        plan = make_plan(args.base, args.adapter, args.io, _stated(args), args.architecture)
        monitor.warn(plan.warnings)
        tree = inspect_json(plan, forecast_commands(plan, choose_device("auto"), monitor))
        return tree, inspect_table(tree, _screen(args))
    base = open_checkpoint(args.base, args.io)
    with_architecture(read_model_config(base.directory), args.architecture)
    monitor.warn(base.warnings)
    files = [(name, [(t.dtype, t.nbytes) for t in f.header.tensors]) for name, f in base.files.items()]
    part: PlanRecord = {"schema": "streamer.plan/1", "base": cast("BaseSource", base.identity()), "warnings": list(base.warnings),
            "totals": {"tensors": len(base.weight_map), "base_bytes": base.data_bytes}}  # fmt: skip
    return part, dtype_table(files, _screen(args))


def _detect(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.adapters.batch import findings_of, named_adapters
    from streamer.cli.executors import workers_of
    from streamer.cli.tables import findings_table, next_step
    from streamer.detection.parts import Part
    from streamer.detection.run import detect_many

    options = _detection_options(args, None)
    adapters = named_adapters(_adapters(args))
    run = _run_options(args, monitor)
    run = replace(run, workers=workers_of(args, monitor))
    if run.workers is None and args.part is None:  # other parts are to have as many
        choose_threads(args.threads, monitor)
    if args.dry_run:
        return _dry_detect(args, adapters, options, run)
    shown, parts, part = _screen(args), {}, None if args.part is None else Part(*args.part)
    made = detect_many(args.base, adapters, args.output, options, run, part)
    for name, found in made.items():
        path = findings_of(args.output, name) if part is None else part.path(findings_of(args.output, name))
        record: FindingsRecord = {**found.record(), "output": str(path), "state": monitor.outputs[path]}
        parts[name] = record, findings_table(found, shown, path, monitor.outputs[path])
        shown = replace(shown, legend=False)  # one legend is enough
    tree, text = _each(parts, args.output, _screen(args))
    if part is not None:
        return tree, text
    (base, given), several = args.given, "" not in made
    adapter = "ADAPTER" if several else given[0]
    path = findings_of(args.output, adapter if several else "")
    return tree, f"{text}\n\n{next_step(found, path, shown, base, adapter)}"


def _dry_detect(
    args: argparse.Namespace, adapters: Mapping[str, Path], options: DetectionOptions, run: RunOptions
) -> Result:
    from streamer.adapters.batch import findings_of
    from streamer.cli.forecast import forecast_detection, on_workers, shared_by_detections, together
    from streamer.cli.json_report import dry_run, dry_runs
    from streamer.detection.parts import Part
    from streamer.detection.run import inspect_detections
    from streamer.plan.batch import Batch
    from streamer.plan.memory import resident_bytes
    from streamer.plan.plan import make_batch

    batch = make_batch(args.base, list(adapters.values()), run.io, run.stated, run.architecture)
    run.monitor.warn(batch.warnings)
    paths, resident = [findings_of(args.output, name) for name in adapters], resident_bytes(batch)
    if run.workers is not None:
        options = run.workers.shared(batch, options, resident)
    if args.part is not None:
        batch, paths = Part(*args.part).take(batch, paths, options)
    states = inspect_detections(batch, paths, options, run)
    pending = [plan for plan, (state, _) in zip(batch.plans, states, strict=True) if state != "done"]
    todo = Batch(batch.base, tuple(pending))
    forecasts = [
        None
        if state == "done"
        else on_workers(
            forecast_detection(plan, options, run.device, resident, size, run.monitor), args.workers, resident
        )
        for plan, (state, size) in zip(batch.plans, states, strict=True)
    ]
    parts = {
        name: dry_run(args.command, path, state, len(plan.targets), 1, None, forecast)
        for name, plan, path, (state, _), forecast in zip(adapters, batch.plans, paths, states, forecasts, strict=True)
    }
    return dry_runs(args.command, args.output, parts, together(forecasts, shared_by_detections(todo)), _screen(args))


def _write(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.adapters.batch import named_adapters
    from streamer.api.keywords import mitigation_options
    from streamer.cli.tables import record_table
    from streamer.detection.findings import load_findings
    from streamer.output.prepare import OutputOptions, findings_by_name, prepare_outputs
    from streamer.output.run import run_jobs

    adapters = named_adapters(_adapters(args))
    found = findings_by_name(args.findings or None, adapters)
    given = [load_findings(one) if isinstance(one, Path) else one for one in found]
    detection = _detection_options(args, given[0])
    mitigation = mitigation_options(
        args.mitigation_lambda, args.method, args.scale, args.coefficients, args.keep, args.amplify
    )
    if mitigation.needs_detection and given[0] is None:
        choose_threads(args.threads, monitor)
    merges, run = args.command == "merge", _run_options(args, monitor)
    own = {"dequantize": args.dequantize} if merges else {"to_lora": args.to_lora}
    form = OutputOptions(merges, model_card=not args.no_card, **own)
    writers = prepare_outputs(args.base, adapters, args.output, given, mitigation, detection, form, run)
    if args.dry_run:
        return _dry_write(args, adapters, writers, run)
    shown, parts = _screen(args), {}
    for name, record in zip(adapters, run_jobs(writers, run), strict=True):
        parts[name] = dict(record), record_table(record, record["output"], shown)
        shown = replace(shown, legend=False)  # one legend is enough
    return _each(parts, args.output, _screen(args))


def _dry_write(args: argparse.Namespace, adapters: Iterable[str], writers: Sequence[Writer], run: RunOptions) -> Result:
    from streamer.cli.forecast import forecast_output, shared_by_merges, together
    from streamer.cli.json_report import dry_run, dry_runs
    from streamer.output.run import inspect_jobs, resident_of

    states, resident = inspect_jobs(writers, run), resident_of(writers)
    todo = [writer for writer, state in zip(writers, states, strict=True) if state != "done"]
    parts = {}
    forecasts = [
        None if state == "done" else forecast_output(writer, resident, monitor=run.monitor)
        for writer, state in zip(writers, states, strict=True)
    ]
    for name, writer, state, forecast in zip(adapters, writers, states, forecasts, strict=True):
        out, matrices = writer.spec.output, len(writer.spec.job.plan.targets)
        parts[name] = dry_run(args.command, out.path, state, matrices, len(out.files), out.total_bytes, forecast)
    return dry_runs(args.command, args.output, parts, together(forecasts, shared_by_merges(todo)), _screen(args))


def _report(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.cli.report import run_report

    return run_report(args, monitor, _screen(args))


def _diff(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.cli.report import run_diff

    return run_diff(args, monitor, _screen(args))


def _verify(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.cli.verification import verification_text
    from streamer.verification.run import verify

    found = verify(args.output, args.base, args.adapter, args.sample, args.max_memory, monitor)
    return {**found}, verification_text(found)


def _evaluate(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.cli.evaluation import given_findings_options, run_evaluation

    detection = _detection_options(args, given_findings_options(args))
    return run_evaluation(args, detection, _run_options(args, monitor), _screen(args))


def _fit(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.cli.fitting import run_fit

    return run_fit(args, _run_options(args, monitor), _screen(args))


def _demo(args: argparse.Namespace, monitor: Monitor) -> Result:
    from streamer.cli.demo import demo_table, run_demo
    from streamer.methods import Project

    mitigation = Project(args.mitigation_lambda, amplify=args.amplify)
    if args.output:
        if os.path.lexists(args.output):
            raise OutputExistsError(f"{args.output}: exists; name a directory that does not", Path(args.output))
        result = run_demo(Path(args.output), mitigation, monitor)
    else:
        with tempfile.TemporaryDirectory(prefix="streamer-demo-") as directory:
            result = run_demo(Path(directory), mitigation, monitor)
        result["directory"] = None  # is gone
    return result, demo_table(result, _screen(args))


COMMANDS = {
    "inspect": _inspect,
    "detect": _detect,
    "mitigate": _write,
    "merge": _write,
    "report": _report,
    "diff": _diff,
    "verify": _verify,
    "evaluate": _evaluate,
    "fit": _fit,
    "demo": _demo,
}


def _detection_options(args: argparse.Namespace, findings: Findings | None) -> DetectionOptions:
    """Make the options as given; what was not given is the findings', or the default."""
    from streamer.detection.options import DetectionOptions

    given = {"top_k": args.top_k, "threshold_epsilon": args.epsilon, "solver": args.solver}
    default = findings.options if findings is not None else DetectionOptions()
    # The memory is of this run: that of the findings was their own.
    return replace(default, max_memory=args.max_memory, **{k: v for k, v in given.items() if v is not None})


def _run_options(args: argparse.Namespace, monitor: Monitor) -> RunOptions:
    from streamer.detection.device import choose_device
    from streamer.detection.options import RunOptions

    device, resume = choose_device(args.device), not args.no_resume
    return RunOptions(device, args.io, _stated(args), args.architecture, resume, args.overwrite, monitor)


def _stated(args: argparse.Namespace) -> Stated:
    from streamer.adapters.stated import Stated

    return Stated(args.base_is_residual, args.lora_b_layout, args.ignore_keys or ())


def _screen(args: argparse.Namespace) -> Screen:
    """Describe what tables are shown on; beside a page, which explains its figures, they need no legend."""
    page = args.command == "report" and args.output is not None
    return screen(args.all, not args.no_legend and not page)


def _adapters(args: argparse.Namespace) -> str | list[str]:
    """Return the adapter; or a list, of several or of one directory of adapters."""
    from streamer.adapters.batch import holds_adapters

    if args.command not in ("detect", "merge", "mitigate"):
        return str(args.adapter)
    given: list[str] = args.adapter
    return given if len(given) > 1 or holds_adapters(given[0]) else given[0]


def _each(parts: Mapping[str, Result], output: str, shown: Screen) -> Result:
    """Combine the results of several adapters by their names, in full if all is asked for; that of one alone stays as it is."""
    from streamer.cli.json_report import of_several
    from streamer.cli.tables import adapters_table, stood

    if "" in parts:
        return parts[""]
    tree, full = of_several(parts)
    present = all(part["state"] == "present" for part, _ in parts.values())
    last = stood(output, "present" if present else "written")
    return tree, full if shown.every else f"{adapters_table(tree['adapters'], shown)}\n\n{last}"
