"""Run `streamer fit`, and forecast it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from streamer.cli.evaluation import pass_seconds, products_pace
from streamer.cli.fitting_table import fitting_table
from streamer.cli.forecast import Forecast, network_bytes
from streamer.cli.json_report import dry_run, dry_runs
from streamer.cli.layout import Screen
from streamer.cli.tables import stood
from streamer.detection.options import RunOptions
from streamer.evaluation.passes import checked_tokens
from streamer.events import Event
from streamer.fitting.costs import GRADIENT, expected_costs
from streamer.fitting.options import FitOptions
from streamer.fitting.prepare import PreparedFit, prepare_fit
from streamer.fitting.records import inspect
from streamer.fitting.result import FitRecord
from streamer.fitting.run import fit

SET_BYTES, TENSOR_BYTES = 2500, 120
"""Bytes of the figures of a set of coefficients in the file, at most, and of an array's entry in its header beside the matrix' name."""

RECORD_BYTES, PASS_BYTES = 300, 4000
"""Bytes of a record of the journal beside its gradient, and of the sums of a pass, about."""


def run_fit(args: argparse.Namespace, run: RunOptions, screen: Screen) -> tuple[Mapping[str, Any], str]:
    """Fit, or forecast it, and return the object and the text that are printed."""
    options = FitOptions(args.keeps, args.objective, args.grain, args.holdout, args.sequences, args.length, args.seed,
                         args.steps, args.dtype)  # fmt: skip
    texts = {"general": Path(args.general), "task": Path(args.task)}
    prepared = prepare_fit(args.base, Path(args.adapter), texts, options, args.max_memory, run)
    output = Path(args.output)
    if args.dry_run:
        state = inspect(prepared, output)
        forecast = None
        if state != "done":
            prepared.warn()
            forecast = forecast_fit(prepared)
        parts = {"": dry_run("fit", output, state, len(prepared.plan.targets), 1, None, forecast)}
        return dry_runs("fit", args.output, parts, forecast, screen)
    found = fit(prepared, output)
    done = run.monitor.outputs[output]
    text = fitting_table(found.facts, args.given, args.output, screen)
    tree = {"schema": "streamer.fit/1", **found.facts, "output": str(output), "state": done}
    return cast(FitRecord, tree), f"{text}\n{stood(output, done)}"


def forecast_fit(prepared: PreparedFit) -> Forecast:
    """Forecast what a fit takes that does all that is expected of it; time for products by a short probe."""
    monitor, size, costs = prepared.run.monitor, prepared.model.size, expected_costs(prepared)
    monitor.emit(Event("probe", "a matrix product", 0, 1))
    pace = products_pace(size.hidden, min(size.widest, 4096), prepared.options.dtype)
    monitor.emit(Event("probe", "", 1, 1))
    peak = prepared.peak_bytes(costs.variants)
    checked = checked_tokens(prepared.groups)
    runs = GRADIENT * len(costs.gradients) + len(costs.passes) + 2 * (checked > 0)
    read, products = size.read * runs, sum([*costs.gradients, *costs.passes, checked * sum(size.products.values())])
    seconds = pass_seconds(products, pace, len(prepared.model.modules) * runs)
    count = sum(map(len, prepared.parameters.singular_values.values()))
    facts = len(json.dumps(prepared.facts)) + SET_BYTES * len(prepared.options.keep)
    names = sum(2 * (len(target.tensor) + TENSOR_BYTES) for target in prepared.plan.targets)
    writes = 8 * count * (1 + len(prepared.options.keep)) + names + facts
    journal = len(costs.gradients) * (RECORD_BYTES + 8 * prepared.parameters.count) + len(costs.passes) * (
        RECORD_BYTES + PASS_BYTES
    )
    return Forecast(
        peak, peak, read, network_bytes(prepared.plan, read), writes, journal + prepared.spool_bytes, seconds
    )
