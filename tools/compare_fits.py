"""Compare repairs of adapters, this program's and others', on models that it trains and on text that nothing was fitted on.

    python tools/compare_fits.py DIR                        trains 4 bases and 30 adapters, or takes those in DIR; some hours on a core
    python tools/compare_fits.py DIR --kinds llama --adapters high --seeds 1 --figure tokens.svg
    python tools/compare_fits.py DIR --tiny                 minutes, for a test: what it prints tells little

DIR/KIND has a base of each kind, DIR/KIND/ADAPTER-SEED an adapter for each seed (see train_small.py), which begins elsewhere and sees
the sequences in another order; of the largest kind, neox, there is one of each. Repairs are fitted on DIR/KIND/general.txt and task.txt,
the seed deciding what is held apart; everything is measured on general-test.txt and task-test.txt, of documents that were neither
trained nor fitted on, and on other.txt, which nothing was fitted on: sources of numpy, by other authors than Python's. Repairs of others
are those of peer_repairs.py.

The tables have the forgetting left, in percent, where a method keeps a share of the learning on the test text. That is interpolated, by
a monotone cubic, between the points that were measured of the method; the fitted ones have a point for each share asked for, and one
where nothing is kept or forgotten. An error is the standard error over seeds. "–": the method keeps more at its strongest, or `repair`
refused the adapter, of which there is a line on stderr. A mean is over the (n) adapters that have a
figure, if not all do. The last line has the CPU seconds of fits and maps, on the machine that made them.

The figure shows what text is worth: for one share, fits to more and more tokens, and what they leave as a part of what the
shrink leaves where it keeps as much.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import peer_repairs
import train_small
from line_figure import line_figure
from scipy.interpolate import PchipInterpolator

import streamer
from streamer.errors import MismatchError
from streamer.evaluation.evaluation import Evaluation
from streamer.measuring.statistics import MEASURES as SUMS
from streamer.measuring.statistics import SequenceSums
from streamer.methods.files import Coefficients

Point = dict[str, float]
"""What was measured of a variant: see `MEASURES`."""

MEASURES = {
    "kept": "of the learning",
    "left": "forgetting left",
    "other": "left on a third text",
    "kl": "KL left",
    "same": "same top token",
}
"""Shares: of the learning that is kept; of the forgetting that is left on text of the base's kind and on a third text; of the divergence
from the base; and of the tokens after which the base expects the same."""

BASE_POINT = {"kept": 0.0, "left": 0.0, "other": 0.0, "kl": 0.0, "same": 1.0}

SHAPE = {
    "hidden": 128,
    "layers": 4,
    "heads": 4,
    "vocab": 1024,
    "steps": 400,
    "rate": 4e-3,
    "dtype": "fp32",
    "seed": 0,
}
LARGE = {
    **SHAPE,
    "hidden": 448,
    "layers": 8,
    "heads": 7,
    "vocab": 4096,
    "steps": 360,
    "rate": 1.5e-3,
}
TINY = {**SHAPE, "hidden": 64, "layers": 2, "vocab": 512, "steps": 160}
ADAPTER_STEPS = 100
LAMBDAS = {
    "shrink": (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5),
    "project": (0.8, 0.6, 0.4, 0.2, 0.0),
    "paper": (0.8, 0.6, 0.4, 0.2, 0.0),
    "nullspace": (0.8, 0.6, 0.4, 0.3, 0.2, 0.1),
}
COLUMNS = {
    "inputs": "repair",
    "nullspace": "map",
    "shrink": "shrink",
    "lines": "LiNeS",
    "surgery": "Spectral Surgery",
    "random": "random",
    "ties": "TIES",
    "dare": "DARE",
    "project": "project",
    "paper": "paper",
}
KEEP = (0.95, 0.9, 0.8)
SEQUENCES = (4, 8, 16, 32, 64)
OTHER_CHARACTERS = 70_000


def trained(home: Path, args: argparse.Namespace) -> None:
    """Train what is not there yet, and write the third text."""
    from transformers import AutoTokenizer

    for kind in args.kinds:
        out = home / kind
        if not (out / "base" / "config.json").exists():
            shape = TINY if args.tiny else LARGE if kind == "neox" else SHAPE
            train_small.make_base(out, argparse.Namespace(**shape, kind=kind))
        if not (out / "other.txt").exists():
            root = Path(numpy.__file__).parent
            files = sorted(
                p
                for p in root.rglob("*.py")
                if "tests" not in p.parts and 4000 < p.stat().st_size < 60_000
            )
            text = "\n\n".join(p.read_text(encoding="utf-8", errors="replace") for p in files[::7])
            (out / "other.txt").write_text(text[:OTHER_CHARACTERS], encoding="utf-8")
        missing = [
            one
            for own, *one in jobs(args)
            if own == kind and not (out / named(*one) / "adapter_config.json").exists()
        ]
        if missing:
            ids = train_small.streams(AutoTokenizer.from_pretrained(out / "base"))["task"][0]
        for name, seed in missing:
            steps = 40 if args.tiny else ADAPTER_STEPS
            train_small.make_adapter(out / "base", out / named(name, seed), name, ids, steps, seed)


def jobs(args: argparse.Namespace) -> list[tuple[str, str, int]]:
    """List the adapters by kind of base, name and seed."""
    return [
        (kind, name, seed)
        for kind in args.kinds
        for name in args.adapters
        for seed in range(1 if kind == "neox" else args.seeds)
    ]


def named(name: str, seed: int) -> str:
    """Name the directory of an adapter."""
    return f"{name}-{seed}"


def beside(adapter: Path, name: str) -> Path:
    """Say where a result on an adapter stands: not in the adapter, whose files are inputs."""
    return adapter.parent / "measured" / f"{adapter.name}-{name}"


def fitted(
    adapter: Path,
    seed: int,
    keep: Sequence[float],
    name: str,
    args: argparse.Namespace,
    **options: Any,
) -> list[Coefficients] | None:
    """Fit to an adapter for each share, or read what was fitted before; None if the adapter has learned too little to show on the text."""
    home = adapter.parent
    texts = {text: home / f"{text}.txt" for text in ("general", "task")}
    options = {"sequences": args.sequences, "length": args.length, "seed": seed} | options
    made = []
    for share in keep:
        out = beside(adapter, f"{name}-{share}")
        repair = partial(
            streamer.repair_adapter, home / "base", adapter, out, **texts, **options, keep=share
        )
        try:
            clocked(factors_of(out), repair)
        except MismatchError as e:
            print(e, file=sys.stderr)
            return None
        made.append(streamer.load_coefficients(factors_of(out)))
    return made


def factors_of(out: Path) -> Path:
    """Return the path of the factors beside a repair."""
    return out.with_name(f"{out.name}.fit.safetensors")


def clocked(path: Path, make: Callable[[], Any]) -> Any:
    """Make a file, or read what was made before; the CPU seconds of making it are noted beside it."""
    new = not path.exists()
    began = time.process_time()
    made = make()
    if new:
        path.with_suffix(".seconds").write_text(repr(time.process_time() - began))
    return made


def noted(path: Path) -> float | None:
    """Return the CPU seconds of making a file; None if it was not made."""
    note = path.with_suffix(".seconds")
    return float(note.read_text()) if note.exists() else None


def evaluated(
    adapter: Path, name: str, args: argparse.Namespace, of: Path | None = None, **variants: Any
) -> Evaluation:
    """Measure variants on the test texts, or read what was measured before; of an adapter that was made of this one, if `of` is given."""
    home = adapter.parent
    texts = {text: home / f"{text}-test.txt" for text in ("general", "task")}
    options = {"sequences": args.sequences, "length": args.length, "other": [home / "other.txt"]}
    options["keep"] = (
        1.0  # no shrink is placed, and hardly an evaluation stops early because its suggestion is clear
    )
    path = beside(adapter, f"{name}.evaluation.json")
    return streamer.evaluate_variants(
        home / "base", of or adapter, path, **texts, **options, **variants
    )


def measured(
    adapter: Path, name: str, args: argparse.Namespace, fits: Sequence[Coefficients]
) -> Evaluation:
    """Measure fits, adding each to the evaluation of those before it."""
    return [evaluated(adapter, name, args, methods=("regmean",), coefficients=fit) for fit in fits][
        -1
    ]


def points(made: Evaluation) -> list[Point]:
    """Read the points of all variants but base and adapter, in their order."""
    (other,) = made.others.values()
    return [
        {
            "kept": made.task.share("loss", v).value,
            "left": made.general.share("loss", v).value,
            "other": other.share("loss", v).value,
            "kl": made.general.share("kl", v).value,
            "same": made.general.mean("agree", v).value,
        }
        for v in range(2, len(made.variants))
    ]


def curve(adapter: Path, method: str, findings: Any, args: argparse.Namespace) -> list[Point]:
    """Measure a method at its λ, from the mildest on."""
    given = {"map": mapped(adapter.parent, args)} if method == "nullspace" else {}
    return points(
        evaluated(
            adapter,
            method,
            args,
            methods=(method,),
            lambdas=LAMBDAS[method],
            findings=findings,
            **given,
        )
    )


def mapped(home: Path, args: argparse.Namespace) -> Any:
    """Map the inputs of a base, or read the map that was made before."""
    options = {"sequences": args.sequences, "length": args.length}
    path = home / "base.map.safetensors"
    return clocked(
        path,
        lambda: streamer.map_inputs(home / "base", path, general=home / "general.txt", **options),
    )


def interpolated(
    measured: Sequence[Point], keep: float, what: str = "left", adapter: Point | None = None
) -> float | None:
    """Interpolate a measure where a share is kept, from the adapter as it is through ever stronger points, while they keep less."""
    kept = [1.0]
    values = [1.0 if adapter is None else adapter[what]]
    for point in measured:
        if point["kept"] >= kept[-1]:
            break
        kept.append(point["kept"])
        values.append(point[what])
    if not kept[-1] <= keep <= 1 or len(kept) < 2:
        return None
    return float(PchipInterpolator(kept[::-1], values[::-1])(keep))


def compared(adapter: Path, name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Fit and measure everything for one adapter."""
    home = adapter.parent
    findings = streamer.detect_intruder_dimensions(home / "base", adapter)
    found: dict[str, list[Point]] = {method: [] for method in COLUMNS}
    for method in LAMBDAS:
        found[method] = curve(adapter, method, findings, args)
    if (fit := fitted(adapter, seed, args.keep, "inputs", args)) is not None:
        found["inputs"] = points(measured(adapter, "inputs", args, fit))
        if not args.no_peers:
            found |= peers(adapter, seed, fit[0].facts, args)
    whole = evaluated(
        adapter, "shrink", args, methods=("shrink",), lambdas=LAMBDAS["shrink"], findings=findings
    )
    as_is = {**dict.fromkeys(MEASURES, 1.0), "same": whole.general.mean("agree", 1).value}
    forgotten = {
        text: sums.mean("loss", 1, 0).value
        for text, sums in (("general", whole.general), *whole.others.items())
    }
    seconds = {
        "inputs": noted(factors_of(beside(adapter, f"inputs-{args.keep[0]}"))),
        "nullspace": noted(home / "base.map.safetensors"),
    }
    return {
        "kind": home.name,
        "adapter": name,
        "seed": seed,
        "points": found,
        "as_is": as_is,
        "forgotten": forgotten,
        "seconds": seconds,
    }


def peers(adapter: Path, seed: int, facts: Any, args: argparse.Namespace) -> dict[str, list[Point]]:
    """Measure the repairs of others."""
    from transformers import AutoTokenizer

    home = adapter.parent
    out = {}
    ids = train_small.stream(
        AutoTokenizer.from_pretrained(home / "base"), [(home / "task.txt").read_text()]
    )
    rows = ids[: len(ids) // args.length * args.length].view(-1, args.length)[
        : peer_repairs.CALIBRATION
    ]
    for name, fits in peer_repairs.by_factors(home / "base", adapter, facts, rows, seed).items():
        out[name] = points(measured(adapter, name, args, fits))
    if home.name == "mixture":  # a LoRA of experts' stacks has no rank that would hold these
        return out
    whole = evaluated(adapter, "shrink", args, methods=("shrink",), lambdas=LAMBDAS["shrink"])
    for name in peer_repairs.BY_ENTRIES:
        out[name] = []
        for share in peer_repairs.SHARES[name]:
            one = beside(adapter, f"{name}-{share}")
            peer_repairs.by_entries(adapter, name, share, one, seed)
            # What is wanted is the adapter as it is; of a method that needs a map no more is measured than what is asked for.
            made = evaluated(
                adapter,
                f"{name}-{share}",
                args,
                one,
                methods=("nullspace",),
                lambdas=(0.5,),
                map=mapped(home, args),
            )
            out[name] += points(joined(whole, made))
    return out


def joined(whole: Evaluation, made: Evaluation) -> Evaluation:
    """Put the adapter of another evaluation on the same texts after the base and the adapter of one."""

    def on(text: str) -> SequenceSums:
        one = whole.sums[text].take([0, 1])
        two = made.sums[text].take([1])
        count = min(
            len(one.tokens), len(two.tokens)
        )  # an evaluation that stopped early has the first sequences
        return first(one, count).joined(first(two, count))

    sums = {text: on(text) for text in whole.sums}
    return Evaluation.of((*whole.variants[:2], made.variants[1]), sums, whole.facts, whole.keep)


def first(sums: SequenceSums, count: int) -> SequenceSums:
    """Take so many sequences; the distribution over tokens stays that of all."""
    return SequenceSums(sums.tokens[:count], *(getattr(sums, name)[:, :count] for name in SUMS))


def cells(
    found: Sequence[dict[str, Any]], keep: float, what: str = "left"
) -> dict[str, list[float]]:
    """Collect a measure of each method at a share, over seeds, in percent; none if a seed lacks it."""
    out = {}
    for method in COLUMNS:
        values = []
        for one in found:
            measured = one["points"][method]
            if method == "inputs" and measured:
                measured = [*sorted(measured, key=lambda point: -point["kept"]), BASE_POINT]
            values.append(interpolated(measured, keep, what, one["as_is"]))
        out[method] = [] if None in values else [100 * x for x in values if x is not None]
    return out


def cell(values: Sequence[float]) -> str:
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.0f}"
    return f"{statistics.mean(values):.0f} ± {statistics.stdev(values) / len(values) ** 0.5:.0f}"


def by_adapter(results: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Collect the seeds of each base and adapter."""
    names = dict.fromkeys((one["kind"], one["adapter"]) for one in results)
    return [[one for one in results if (one["kind"], one["adapter"]) == name] for name in names]


def table(results: Sequence[dict[str, Any]], keep: Sequence[float]) -> str:
    """Format the forgetting left as Markdown: a row for each base, adapter and share."""
    lines = [
        "| base | adapter | kept | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (3 + len(COLUMNS)) + "|",
    ]
    for found in by_adapter(results):
        for share in keep:
            row = cells(found, share)
            words = [
                found[0]["kind"],
                found[0]["adapter"],
                f"{share:.0%}",
                *(cell(row[m]) for m in COLUMNS),
            ]
            lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


def means(results: Sequence[dict[str, Any]], keep: Sequence[float]) -> str:
    """Format means over the adapters as Markdown: a row for each method; the last column is what is left as a part of the shrink's."""
    middle = keep[len(keep) // 2]
    wanted: list[tuple[str, float, str]] = [
        ("left", share, f"left at {share:.0%}") for share in keep
    ]
    wanted += [
        (what, middle, f"{words}, at {middle:.0%}")
        for what, words in MEASURES.items()
        if what not in ("kept", "left")
    ]
    columns = [
        [cells(found, share, what) for found in by_adapter(results)] for what, share, _ in wanted
    ]
    lines = [
        "| | " + " | ".join(head for *_, head in wanted) + f" | ratio to shrink, {middle:.0%} |"
    ]
    lines.append("|---" * (len(wanted) + 2) + "|")

    def mean(
        rows: Sequence[dict[str, list[float]]],
        method: str,
        of: Callable[[dict[str, list[float]]], float],
        digits: int = 0,
    ) -> str:
        values = [of(row) for row in rows if row[method] and row["shrink"]]
        if not values:
            return "–"
        words = f"{statistics.mean(values):.{digits}f}"
        return words if len(values) == len(rows) else f"{words} ({len(values)})"

    for method, words in COLUMNS.items():
        row = [
            mean(rows, method, lambda row, m=method: statistics.mean(row[m])) for rows in columns
        ]
        at = columns[keep.index(middle)]
        row.append(
            mean(
                at,
                method,
                lambda row, m=method: statistics.mean(row[m]) / statistics.mean(row["shrink"]),
                2,
            )
        )
        lines.append(f"| {words} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def kept_on_test(results: Sequence[dict[str, Any]], keep: Sequence[float]) -> str:
    """Say what the fitted sets kept on the test texts, where a share was asked for."""
    lines = []
    for i, share in enumerate(keep):
        kept = [
            100 * one["points"]["inputs"][i]["kept"] for one in results if one["points"]["inputs"]
        ]
        if kept:
            lines.append(
                f"asked to keep {share:.0%}, on the test text {COLUMNS['inputs']} keeps, in percent: {statistics.mean(kept):.1f} "
                f"({min(kept):.0f} to {max(kept):.0f}; {sum(abs(x - 100 * share) <= 2 for x in kept)} of {len(kept)} within 2 points)"
            )
    return "\n".join(lines)


def costs(results: Sequence[dict[str, Any]]) -> str:
    """Say what fits and maps cost."""
    words = []
    for method in ("inputs", "nullspace"):
        seconds = [
            own for one in results if (own := one.get("seconds", {}).get(method)) is not None
        ]
        if seconds:
            words.append(
                f"{COLUMNS[method]} {statistics.mean(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
            )
    return f"CPU seconds: {', '.join(words) or 'not noted'}"


def worth_of_text(adapter: Path, args: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Measure what fits to more and more text leave at one share, as a part of the shrink's where it keeps as much."""
    findings = streamer.detect_intruder_dimensions(adapter.parent / "base", adapter)
    shrink = curve(adapter, "shrink", findings, args)
    line = []
    for sequences in SEQUENCES:
        name = f"sequences-{sequences}"
        if (found := fitted(adapter, 0, (0.9,), name, args, sequences=sequences)) is None:
            continue
        (point,) = points(measured(adapter, name, args, found))
        if other := interpolated(shrink, point["kept"]):
            line.append((float(sequences * args.length), point["left"] / other))
    return {f"{adapter.parent.name}, {adapter.name.rpartition('-')[0]}": line} if line else {}


def main() -> int:
    """Train, fit, measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="of the models, new or from an earlier run")
    parser.add_argument(
        "--kinds",
        type=train_small.chosen(train_small.KINDS),
        default=list(train_small.KINDS),
        help="(default: all)",
    )
    parser.add_argument(
        "--adapters",
        type=train_small.chosen(train_small.ADAPTERS),
        default=["high", "usual", "wide"],
        help="(default: high,usual,wide)",
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="adapters of each kind (default: %(default)s)"
    )
    parser.add_argument(
        "--sequences", type=int, default=32, help="of each text (default: %(default)s)"
    )
    parser.add_argument(
        "--length", type=int, default=256, help="tokens of a sequence (default: %(default)s)"
    )
    parser.add_argument(
        "--figure", type=Path, help="draw the worth of text, with seed 0 of each adapter, as an SVG"
    )
    parser.add_argument("--no-peers", action="store_true", help="leave out the repairs of others")
    parser.add_argument(
        "--add",
        type=Path,
        nargs="*",
        default=[],
        help="put what earlier runs wrote by --json into the tables",
    )
    parser.add_argument("--tiny", action="store_true", help="models of a hundred thousand weights")
    parser.add_argument("--json", type=Path, help="write all points as JSON")
    args = parser.parse_args()
    args.keep = KEEP
    trained(args.directory, args)
    results = []
    for kind, name, seed in jobs(args):
        print(f"{kind}, {name}, seed {seed}", file=sys.stderr)
        results.append(compared(args.directory / kind / named(name, seed), name, seed, args))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    results += [one for path in args.add for one in json.loads(path.read_text())]
    print(table(results, args.keep))
    print()
    print(means(results, args.keep))
    print()
    print(kept_on_test(results, args.keep))
    print(costs(results))
    if args.figure:
        lines: dict[str, list[tuple[float, float]]] = {}
        for kind in args.kinds:
            for name in args.adapters:
                lines |= worth_of_text(args.directory / kind / named(name, 0), args)
        if not lines:
            print("no fit keeps what a measured shrink keeps: there is no figure", file=sys.stderr)
            return 1
        args.figure.write_text(
            line_figure(
                lines,
                "tokens of either text",
                "forgetting left, the shrink's at equal learning kept = 1",
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
