"""Run `streamer evaluate`: its table, its suggestion as a command, and its forecast."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from streamer.cli.forecast import Forecast
from streamer.cli.json_report import dry_run, dry_runs
from streamer.cli.layout import Column, Screen, fit, table
from streamer.cli.tables import NO_LIMIT, stood
from streamer.detection.findings import load_findings
from streamer.detection.options import DetectionOptions, RunOptions
from streamer.evaluation.memory import measured_bytes
from streamer.evaluation.options import EvaluationOptions
from streamer.evaluation.run import Prepared, evaluate, inspect, prepare
from streamer.events import Event, Monitor

OVERHEAD = 1.3
"""Time of a pass over that of its products: attention, norms, the softmax, and reading the weights."""

VALUE_BYTES = 22
"""Bytes of a number in JSON, about."""


def run_evaluation(
    args: argparse.Namespace, detection: DetectionOptions, run: RunOptions, screen: Screen
) -> tuple[dict[str, Any], str]:
    """Evaluate, or forecast it, and return the object and the text that are printed."""
    options = EvaluationOptions(
        tuple(args.methods),
        tuple(args.lambdas),
        args.scale,
        args.sequences,
        args.length,
        args.keep_learned,
        args.projected,
    )
    texts = {"general": Path(args.general), "task": Path(args.task)}
    findings = Path(args.findings) if args.findings else None
    prepared = prepare(args.base, Path(args.adapter), texts, findings, options, detection, run)
    output = Path(args.output)
    if args.dry_run:
        state = inspect(prepared, output)
        forecast = None if state == "done" else forecast_evaluation(prepared, run.monitor)
        matrices = len(prepared.plan.targets)
        parts = {"": dry_run("evaluate", output, state, matrices, 1, None, forecast)}
        return dry_runs("evaluate", args.output, parts, forecast, screen)
    tree = evaluate(prepared, output).record(options.keep)
    done = run.monitor.outputs[output]
    given = [args.base, args.adapter, args.findings]
    text = f"{evaluation_table(tree, screen)}\n\n{fit(advice(tree, given), screen.width)}\n{stood(output, done)}"
    return {**tree, "output": str(output), "state": done}, text


def given_findings_options(args: argparse.Namespace) -> Any:
    """Load the findings that are given, whose options hold; None where there are none."""
    return load_findings(args.findings) if args.findings else None


def evaluation_table(tree: Mapping[str, Any], screen: Screen = NO_LIMIT) -> str:
    """Format the measures: a line a variant."""
    variants = tree["variants"]

    def column(text: str, key: str, form: str) -> list[str]:
        return [_with_error(v[text][key], v[text][f"{key}_se"], form) for v in variants]

    changes = [
        _with_error(v["against_adapter"]["task_loss"], v["against_adapter"]["task_loss_se"], "+.4f") for v in variants
    ]
    return table([
        Column("variant", [v["name"] for v in variants], left=True),
        Column("general", column("general", "loss", ".4f"), "loss on the general text in nats a token, ± its standard error", keep=6),
        Column("KL", column("general", "kl", ".4f"), "divergence from the base on the general text: what was forgotten", keep=8),
        Column("same", [f"{v['general']['agreement']:.1%}" for v in variants], "tokens whose likeliest next one is the base's", keep=3),
        Column("task", column("task", "loss", ".4f"), "loss on the task's text", keep=7),
        Column("on adapter", changes, "loss on the task's text less the adapter's, paired by sequence", keep=4),
        Column("kept", ["-" if v["kept"] is None else f"{v['kept']:.1%}" for v in variants], "of what the adapter learned", keep=9),
    ], screen.width)  # fmt: skip


def _with_error(value: float, error: float | None, form: str) -> str:
    return f"{value:{form}}" if error is None else f"{value:{form}} ±{error:.4f}"


def advice(tree: Mapping[str, Any], given: list[str | None]) -> str:
    """Write the suggestion as a sentence, and the command that makes it.

    Parameters
    ----------
    given
        Base, adapter and findings, as the user named them.
    """
    found, keep = tree["suggestion"], tree["options"]["keep"]
    if found is None:
        return "no suggestion: on the task's text the adapter is not better than the base; is it the text of what it was trained for?"
    left = "" if found["forgetting_left"] is None else f" and leaves {found['forgetting_left']:.0%} of the adapter's KL"
    head = f"of those that keep {keep:.0%} of what was learned, {found['name']} forgets least: it keeps {found['kept']:.1%}{left}"
    if found["options"] is None:
        return f"{head}; take the adapter as it is"
    base, adapter, findings = given
    from_findings = f" --findings {findings}" if findings and found["method"] != "shrink" else ""
    lines = [head]
    if (against := found["against_shrink"]) is not None:
        error = "" if against["kl_se"] is None else f" ±{against['kl_se']:.4f}"
        better = "better than" if against["kl"] < 0 else "worse than"
        verdict = better if against["beyond_error"] else "within the error of"
        lines.append(
            f"{verdict} a plain shrink: its KL is {against['kl']:+.4f}{error} from that of --method shrink --lambda "
            f"{against['lambda']:.2f}, about, which has the same loss on the task (between {' and '.join(against['between'])})"
        )
    elif found["method"] == "shrink":
        lines.append("no method that needs findings does better here than the plain shrink")
    lines.append(f"streamer merge {base} {adapter} -o DIR {found['options']}{from_findings}")
    return "\n".join(lines)


def forecast_evaluation(prepared: Prepared, monitor: Monitor) -> Forecast:
    """Forecast what an evaluation takes; time for products by a short probe, a detection that runs first not counted."""
    monitor.emit(Event("probe", "a matrix product", 0, 1))
    size, passes = prepared.model.size, prepared.passes
    tokens = sum(
        (1 + len(one.variants))
        * len(one.sequences)
        * max(len(prepared.texts[one.text].sequences[i].ids) for i in one.sequences)
        for one in passes
    )
    seconds = OVERHEAD * tokens * sum(size.products.values()) * _pace(size.hidden, min(size.widest, 4096))
    monitor.emit(Event("probe", "", 1, 1))
    values = 3 * len(prepared.options.variants) * sum(len(text.sequences) for text in prepared.texts.values())
    peak = measured_bytes(prepared.passes, prepared.texts, size, prepared.resident)
    return Forecast(
        peak, peak, size.read * len(passes), VALUE_BYTES * values + 4096, VALUE_BYTES * values + 4096, seconds
    )


def _pace(inputs: int, outputs: int) -> float:
    """Measure the seconds for a multiplication in a product of a few hundred rows."""
    x, w = torch.randn(512, max(1, inputs)), torch.randn(max(1, outputs), max(1, inputs))
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < 0.5:
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best = min(best, time.perf_counter() - start)
    return best / (len(x) * w.numel())
