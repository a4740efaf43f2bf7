"""Run a command: make its request from the parsed arguments, run or forecast it, and return a result for `main` to print."""

from __future__ import annotations

import argparse
from dataclasses import fields
from importlib import import_module
from typing import Any

from streamer.cli.layout import Result, verification_text
from streamer.events import Monitor

REQUESTS = {
    "inspect": "records.InspectRequest", "detect": "intruders.DetectRequest", "mitigate": "intruders.OutputRequest",
    "merge": "intruders.OutputRequest", "report": "report.ReportRequest", "diff": "report.DiffRequest",
    "verify": "verification.VerifyRequest", "evaluate": "texts.EvaluateRequest", "fit": "texts.FitRequest",
    "map": "texts.MapRequest", "repair": "texts.RepairRequest", "demo": "demo.DemoRequest",
}  # fmt: skip
"""Classes of requests in `api`; their modules are imported when the command runs."""


def run_command(args: argparse.Namespace, monitor: Monitor) -> Result:
    """Run the command, or forecast it with `--dry-run`."""
    module, kind = REQUESTS[args.command].split(".")
    request = _requested(getattr(import_module(f"streamer.api.{module}"), kind), args)
    workers = None
    if "workers" in args:
        from streamer.api.executors import open_workers

        workers = open_workers(args.workers, args.executor, args.threads, monitor)
    if workers is None and getattr(request, "detects", False):
        from streamer.api.threads import choose_threads

        choose_threads(args.threads, monitor)
    on = () if workers is None else (workers,)
    dry = getattr(args, "dry_run", False)
    found = request.forecast(monitor, *on) if dry else request.run(monitor, *on)
    if args.command == "verify":  # needs no torch, which tables import
        return {**found}, verification_text(found)
    from streamer.cli.results import dry_run_result, result

    return dry_run_result(found, args) if dry else result(found, args, monitor)


def _requested(kind: Any, args: argparse.Namespace) -> Any:
    """Make a request from the options of the command line; a base or adapter alone in its list is given without the list."""
    given = {}
    for field in fields(kind):
        option = field.metadata.get("option")
        if field.name in args and not (option and option.where == "keyword"):
            value = getattr(args, field.name)
            alone = field.name in ("base", "adapter") and isinstance(value, list) and len(value) == 1
            given[field.name] = value[0] if alone else value
    return kind(**given)
