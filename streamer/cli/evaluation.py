"""Run `streamer evaluate`, and forecast it."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from streamer.cli.evaluation_table import evaluation_table
from streamer.cli.forecast import Forecast, network_bytes
from streamer.cli.json_report import dry_run, dry_runs
from streamer.cli.layout import Screen
from streamer.cli.tables import stood
from streamer.detection.findings import load_findings
from streamer.detection.options import DetectionOptions, RunOptions
from streamer.evaluation.evaluation import Evaluation
from streamer.evaluation.memory import measured_bytes
from streamer.evaluation.options import EvaluationOptions, ProductDtype
from streamer.evaluation.passes import checked_tokens
from streamer.evaluation.prepare import Prepared, prepare
from streamer.evaluation.records import inspect, measured_before
from streamer.evaluation.run import evaluate
from streamer.evaluation.steps import MOST_PLACED
from streamer.evaluation.view import Names
from streamer.events import Event
from streamer.linalg.torch_state import bfloat16_products, full_float32
from streamer.methods.coefficients_file import load_coefficients

OVERHEAD = 1.3
"""Time of a pass over that of its products: attention, norms, the softmax, and reading the weights."""

START_SECONDS = 0.5
"""Time that a run takes before its first pass and after its last, beside what a dry run takes: the check of the logits, files."""

READ_SECONDS = 4e-4
"""Time that each module's run takes beside its products, in each pass: where a model is small, it is most of it."""

VALUE_BYTES, VARIANT_BYTES = 26, 1600
"""Bytes in JSON of a sequence's sum, at most, and of a variant's other figures."""


def run_evaluation(
    args: argparse.Namespace, detection: DetectionOptions, run: RunOptions, screen: Screen
) -> tuple[Mapping[str, Any], str]:
    """Evaluate, or forecast it, and return the object and the text that are printed."""
    options = EvaluationOptions(
        tuple(args.methods),
        tuple(args.lambdas),
        args.scale,
        args.sequences,
        args.length,
        args.keep_learned,
        args.projected,
        args.dtype,
        load_coefficients(args.coefficients) if args.coefficients else None,
        args.amplify,
    )
    texts = {"general": Path(args.general), "task": Path(args.task)}
    findings = Path(args.findings) if args.findings else None
    prepared = prepare(args.base, Path(args.adapter), texts, findings, options, detection, run)
    output = Path(args.output)
    if args.dry_run:
        state = inspect(prepared, output)
        forecast = None if state == "done" else forecast_evaluation(prepared, measured_before(prepared, output))
        matrices = len(prepared.plan.targets)
        parts = {"": dry_run("evaluate", output, state, matrices, 1, None, forecast)}
        return dry_runs("evaluate", args.output, parts, forecast, screen)
    found = evaluate(prepared, output)
    done = run.monitor.outputs[output]
    files = (
        shlex.quote(file or "") for file in (args.general, args.task, args.output, args.findings, args.coefficients)
    )
    read = {name: getattr(options, name) for name in ("sequences", "length")}
    reading = (f" --{name} {most}" for name, most in read.items() if most != getattr(EvaluationOptions, name))
    names = replace(Names(shlex.join(args.given), *files), reading="".join(reading))
    return {**found.to_dict(), "output": str(output), "state": done}, evaluation_table(
        found, names, screen, stood(output, done)
    )


def given_findings_options(args: argparse.Namespace) -> Any:
    """Load the findings that are given, whose options hold; None where there are none."""
    return load_findings(args.findings) if args.findings else None


def forecast_evaluation(prepared: Prepared, known: Evaluation | None) -> Forecast:
    """Forecast what an evaluation takes; time for products by a short probe, a detection that runs first not counted.

    Parameters
    ----------
    known
        What was measured before, which is not measured again.
    """
    monitor, size, passes = prepared.run.monitor, prepared.model.size, prepared.expected(known)
    monitor.emit(Event("probe", "a matrix product", 0, 1))
    pace = products_pace(size.hidden, min(size.widest, 4096), prepared.options.dtype)
    checked = checked_tokens(map(prepared.group, passes))
    runs = len(passes) + 2 * (checked > 0)
    products = sum(map(prepared.cost, passes)) + checked * sum(size.products.values())
    seconds = pass_seconds(products, pace, len(prepared.model.modules) * runs)
    monitor.emit(Event("probe", "", 1, 1))
    variants = len(prepared.options.variants) + MOST_PLACED + (0 if known is None else len(known.variants))
    sequences = sum(len(text.ids) for text in prepared.texts.values())
    writes = VARIANT_BYTES * (variants + 2) + VALUE_BYTES * (3 * variants + 1) * sequences
    writes += len(json.dumps(prepared.facts, indent=1))
    read = size.read * runs
    peak = measured_bytes(passes, prepared.texts, size, prepared.resident)
    return Forecast(peak, peak, read, network_bytes(prepared.plan, read), writes, writes, seconds)


def pass_seconds(products: int, pace: float, runs: int) -> float:
    """Forecast the time of passes.

    Parameters
    ----------
    products
        Multiplications in all of them.
    pace
        Seconds for one.
    runs
        How often a module runs in all of them.
    """
    # What this process has taken so far, the imports above all, the run takes as well.
    return time.process_time() + START_SECONDS + OVERHEAD * pace * products + READ_SECONDS * runs


def products_pace(inputs: int, outputs: int, dtype: ProductDtype) -> float:
    """Measure the seconds for a multiplication in a product of a few hundred rows."""
    x, w = torch.randn(512, max(1, inputs)), torch.randn(max(1, outputs), max(1, inputs))
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < 0.5:
        start = time.perf_counter()
        with bfloat16_products() if dtype == "bf16" else full_float32():
            torch.nn.functional.linear(x, w)
        best = min(best, time.perf_counter() - start)
    return best / (len(x) * w.numel())
