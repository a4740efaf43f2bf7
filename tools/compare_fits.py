"""Compare what the fits forget with the shrink and the paper's scaling, on models that it trains and text not fitted on.

    python tools/compare_fits.py DIR                        trains 3 bases and 18 adapters, or takes those in DIR; within an hour on a core
    python tools/compare_fits.py DIR --kinds llama --adapters high --seeds 1 --figure passes.svg
    python tools/compare_fits.py DIR --tiny                 a minute, for a test: what it prints tells little

DIR/KIND has a base of each kind, DIR/KIND/ADAPTER-SEED an adapter for each seed (see train_small.py), which begins elsewhere and sees
the sequences in another order. Coefficients are fitted on DIR/KIND/general.txt and task.txt, the seed deciding what is held apart;
everything is measured on general-test.txt and task-test.txt, of documents that were neither trained nor fitted on.

The table has the forgetting left, in percent, where a method keeps a share of the learning on the test text. That is interpolated, by
a monotone cubic, between the points that were measured of the method; the fitted ones have a point for each share asked for, and one
where nothing is kept or forgotten. An error is the standard error over seeds. "–": the method keeps more at its strongest, or `fit` refused
the adapter, of which there is a line on stderr.

The figure shows the worth of passes: for one share, fits of more and more steps, what they leave as a part of what the shrink leaves
where it keeps as much.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import train_small
from line_figure import line_figure
from scipy.interpolate import PchipInterpolator

import streamer
from streamer.errors import MismatchError

Points = list[tuple[float, float]]
"""What is kept of the learning, and what is left of the forgetting."""

SHAPE = {"hidden": 128, "layers": 4, "heads": 4, "vocab": 1024, "steps": 400, "rate": 4e-3, "dtype": "fp32", "seed": 0}
TINY = {**SHAPE, "hidden": 64, "layers": 2, "vocab": 512, "steps": 160}
LAMBDAS = {
    "shrink": (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5),
    "project": (0.8, 0.6, 0.4, 0.2, 0.0),
    "paper": (0.8, 0.6, 0.4, 0.2, 0.0),
}
GRAINS = ("inputs", "direction", "matrix", "all")
COLUMNS = {"inputs": "by inputs", "direction": "by direction", "matrix": "by matrix", "all": "one for all", "shrink": "shrink",
           "project": "project", "paper": "paper"}  # fmt: skip
KEEP = (0.95, 0.9, 0.8)
PASSES = (2, 3, 4, 5, 7, 9)


def trained(home: Path, args: argparse.Namespace) -> None:
    """Train what is not there yet."""
    from transformers import AutoTokenizer

    shape = TINY if args.tiny else SHAPE
    for kind in args.kinds:
        out = home / kind
        if not (out / "base" / "config.json").exists():
            train_small.make_base(out, argparse.Namespace(**shape, kind=kind))
        wanted = [(name, seed) for name in args.adapters for seed in range(args.seeds)]
        missing = [one for one in wanted if not (out / "{}-{}".format(*one) / "adapter_config.json").exists()]
        if missing:
            ids = train_small.streams(AutoTokenizer.from_pretrained(out / "base"))["task"][0]
        for name, seed in missing:
            steps = max(20, int(shape["steps"]) // 4)
            train_small.make_adapter(out / "base", out / f"{name}-{seed}", name, ids, steps, seed)


def beside(adapter: Path, name: str) -> Path:
    """Say where a result on an adapter stands: not in the adapter, whose files are inputs."""
    return adapter.parent / "measured" / f"{adapter.name}-{name}"


def fitted(
    home: Path, adapter: Path, seed: int, keep: Sequence[float], name: str, args: argparse.Namespace, **options: Any
) -> Any:
    """Fit coefficients, or read those that were fitted before."""
    texts = {text: home / f"{text}.txt" for text in ("general", "task")}
    options |= {"keep": keep, "sequences": args.sequences, "length": args.length, "seed": seed}
    return streamer.fit_coefficients(
        home / "base", adapter, beside(adapter, f"{name}.coefficients.safetensors"), **texts, **options
    )


def evaluated(home: Path, adapter: Path, name: str, args: argparse.Namespace, **variants: Any) -> Points:
    """Measure variants on the test texts, in their order, or read what was measured before."""
    texts = {text: home / f"{text}-test.txt" for text in ("general", "task")}
    options = {"sequences": args.sequences, "length": args.length}
    made = streamer.evaluate_variants(
        home / "base", adapter, beside(adapter, f"{name}.evaluation.json"), **texts, **options, **variants
    )
    return [(made.task.share(v).value, made.general.share(v).value) for v in range(2, len(made.variants))]


def curve(home: Path, adapter: Path, method: str, findings: Any, args: argparse.Namespace) -> Points:
    """Measure a method at its λ, from the mildest on."""
    return evaluated(home, adapter, method, args, methods=(method,), lambdas=LAMBDAS[method], findings=findings)


def left_at(points: Points, keep: float) -> float | None:
    """Interpolate what is left where a share is kept, from the adapter as it is through ever stronger points, while they keep less."""
    kept, left = [1.0], [1.0]
    for k, f in points:
        if k >= kept[-1]:
            break
        kept.append(k)
        left.append(f)
    if not kept[-1] <= keep <= 1 or len(kept) < 2:
        return None
    return float(PchipInterpolator(kept[::-1], left[::-1])(keep))


def compared(home: Path, name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Fit and measure everything for one adapter."""
    adapter = home / f"{name}-{seed}"
    findings = streamer.detect_intruder_dimensions(home / "base", adapter)
    points = {method: curve(home, adapter, method, findings, args) for method in LAMBDAS}
    held = {}
    for grain in GRAINS:
        try:
            found = fitted(home, adapter, seed, args.keep, grain, args, grain=grain)
        except MismatchError as e:  # it learned too little
            print(e, file=sys.stderr)
            points[grain] = []
            continue
        held[grain] = found.facts["sets"]
        methods = ("regmean",) if grain == "inputs" else ("fitted",)
        points[grain] = evaluated(home, adapter, grain, args, methods=methods, coefficients=found, findings=findings)
    return {"kind": home.name, "adapter": name, "seed": seed, "points": points, "held": held}


def cells(found: Sequence[dict[str, Any]], keep: float) -> dict[str, list[float]]:
    """Collect what each method leaves at a share, over seeds, in percent."""
    out = {}
    for method in COLUMNS:
        left = []
        for one in found:
            points = one["points"][method]
            if method in GRAINS and points:
                points = [*sorted(points, reverse=True), (0.0, 0.0)]
            left.append(left_at(points, keep))
        out[method] = [] if None in left else [100 * x for x in left if x is not None]
    return out


def cell(values: Sequence[float]) -> str:
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.0f}"
    return f"{statistics.mean(values):.0f} ± {statistics.stdev(values) / len(values) ** 0.5:.0f}"


def table(results: Sequence[dict[str, Any]], keep: Sequence[float]) -> str:
    """Format the forgetting left as Markdown: a row for each base, adapter and share, then each share's mean over adapters."""
    lines = ["| base | adapter | kept | " + " | ".join(COLUMNS.values()) + " |", "|---" * (3 + len(COLUMNS)) + "|"]
    means: dict[float, list[dict[str, list[float]]]] = {share: [] for share in keep}
    for kind, name in dict.fromkeys((one["kind"], one["adapter"]) for one in results):
        found = [one for one in results if (one["kind"], one["adapter"]) == (kind, name)]
        for share in keep:
            row = cells(found, share)
            means[share].append(row)
            lines.append(f"| {kind} | {name} | {share:.0%} | " + " | ".join(cell(row[m]) for m in COLUMNS) + " |")
    for share, rows in means.items():
        mean = {
            m: statistics.mean(statistics.mean(row[m]) for row in rows) if all(row[m] for row in rows) else None
            for m in COLUMNS
        }
        lines.append(
            f"| mean | | {share:.0%} | " + " | ".join("–" if x is None else f"{x:.0f}" for x in mean.values()) + " |"
        )
        for grain in ("inputs", "direction"):
            if mean[grain] is not None and mean["shrink"]:
                ratio = mean[grain] / mean["shrink"]
                lines.append(f"| {COLUMNS[grain]} / shrink | | {share:.0%} | {ratio:.2f} |" + " |" * (len(COLUMNS) - 1))
    return "\n".join(lines)


def kept_on_test(results: Sequence[dict[str, Any]], keep: Sequence[float]) -> str:
    """Say what the fitted sets kept on the test texts, where a share was asked for."""
    lines = []
    for i, share in enumerate(keep):
        points = {grain: [one["points"][grain] for one in results if one["points"][grain]] for grain in GRAINS}
        kept = {grain: [100 * one[i][0] for one in measured] for grain, measured in points.items() if measured}
        words = [f"{COLUMNS[g]} {statistics.mean(k):.1f} ({min(k):.0f} to {max(k):.0f})" for g, k in kept.items()]
        lines.append(f"asked to keep {share:.0%}, on the test text they keep, in percent: {', '.join(words)}")
    return "\n".join(lines)


def worth_of_passes(home: Path, name: str, args: argparse.Namespace) -> dict[str, Points]:
    """Measure what fits of more and more gradient passes leave at one share, as a part of the shrink's where it keeps as much."""
    adapter = home / f"{name}-0"
    findings = streamer.detect_intruder_dimensions(home / "base", adapter)
    shrink = curve(home, adapter, "shrink", findings, args)
    line = []
    for passes in PASSES:
        found = fitted(home, adapter, 0, 0.9, f"passes-{passes}", args, grain="direction", steps=passes - 1)
        ((kept, left),) = evaluated(
            home, adapter, f"passes-{passes}", args, methods=("fitted",), coefficients=found, findings=findings
        )
        if other := left_at(shrink, kept):
            line.append((float(passes), left / other))
    return {f"{home.name}, {name}": line} if line else {}


def main() -> int:
    """Train, fit, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="of the models, new or from an earlier run")
    parser.add_argument(
        "--kinds", type=train_small.chosen(train_small.KINDS), default=list(train_small.KINDS), help="(default: all)"
    )
    parser.add_argument("--adapters", type=train_small.chosen(train_small.ADAPTERS), default=["high", "attention"],
                        help="(default: high,attention)")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="adapters of each kind (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=64, help="of each text (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument(
        "--figure", type=Path, help="draw the worth of passes, with seed 0 of the first adapter, as an SVG"
    )
    parser.add_argument("--tiny", action="store_true", help="models of a hundred thousand weights")
    parser.add_argument("--json", type=Path, help="write all points as JSON")
    args = parser.parse_args()
    args.keep = KEEP
    trained(args.directory, args)
    results = []
    jobs = [(kind, name, seed) for kind in args.kinds for name in args.adapters for seed in range(args.seeds)]
    for kind, name, seed in jobs:
        print(f"{kind}, {name}, seed {seed}", file=sys.stderr)
        results.append(compared(args.directory / kind, name, seed, args))
    print(table(results, args.keep))
    print()
    print(kept_on_test(results, args.keep))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    if args.figure:
        lines: dict[str, Points] = {}
        for kind in args.kinds:
            lines |= worth_of_passes(args.directory / kind, args.adapters[0], args)
        if not lines:
            print("no fit keeps what a measured shrink keeps: there is no figure", file=sys.stderr)
            return 1
        args.figure.write_text(
            line_figure(
                lines, "gradient passes over the base", "forgetting left, the shrink's at equal learning kept = 1"
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
