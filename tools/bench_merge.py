"""Time and memory of `streamer merge` from findings, against `cp -r` of the base and other merges: all in one run.

    python tools/bench_merge.py --like llama-3-70b --size-gb 16 --max-memory 700M    real shapes, as many layers as come nearest
    python tools/bench_merge.py --size-gb 4 --cache warm --contenders merge,cp       one shard, from memory
    python tools/bench_merge.py --base DIR --adapter DIR --rounds 5                  takes what is there
    python tools/bench_merge.py --hidden 64 --layers 2 --json                        tiny: does it work?

Detection runs first and is not timed; what is measured is `merge --lambda 0.75 --findings F`.

Time. The contenders take turns, --rounds times, each round in another order; what the one before wrote is removed, the disk is
idle, and the base is dropped from the page cache (--cache cold) or read into it as far as it fits (warm) when a clock starts. A
round gives ratios; the median and the extremes are reported, since a machine that others use gives no stable seconds. `cp`
leaves its data to be written later, while merge ends when the data are on the disk: so the ratio to `cp` and then `sync` of the
copied files is given as well. `loop` copies with `safe_open` and `save_file`, `shards` merges as other tools do, a shard at a
time (merge_peers.py); neither syncs.

Memory. Runs of their own, which nothing compares: every 10 ms `RssAnon:` of /proc/PID/status, the memory that the system
could only swap out; the largest is reported. VmHWM counts besides it the mapped pages of files that happened to be resident,
which the system can drop. --max-memory measures one more merge under that budget; --double one of twice the layers.

Profile. Another run, in an instrumented process: see profile_merge.py.

It needs the disk for two models (four with --double), in --work, and leaves nothing behind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import make_checkpoint
from measure import cold, files_of, machine, size_of, spread, timed, warm, watched

TOOLS = Path(__file__).parent
LAMBDA = 0.75
CONTENDERS = ("merge", "cp", "loop", "shards")


class Inputs(NamedTuple):
    """What is merged."""

    base: Path
    adapter: Path
    findings: Path


def streamer(*arguments: str | Path) -> list[str]:
    """A command of the product, by this interpreter."""
    return [sys.executable, "-m", "streamer", *map(str, arguments)]


def merge_command(base: Path, adapter: Path, out: Path, findings: Path | None = None) -> list[str]:
    """`streamer merge`: at λ = 1, or from findings."""
    options = (
        ("1",) if findings is None else (str(LAMBDA), "--method", "paper", "--findings", findings)
    )
    return streamer("merge", "--quiet", base, adapter, "-o", out, "--lambda", *options)


def command(contender: str, inputs: Inputs, out: Path) -> list[str]:
    """What a contender runs."""
    peer = [sys.executable, str(TOOLS / "merge_peers.py"), contender]
    return {
        "merge": merge_command(inputs.base, inputs.adapter, out, inputs.findings),
        "cp": ["cp", "-r", str(inputs.base), str(out)],
        "loop": [*peer, str(inputs.base), str(out)],
        "shards": [*peer, str(inputs.base), str(inputs.adapter), str(out)],
    }[contender]


@contextlib.contextmanager
def fresh(out: Path) -> Iterator[Path]:
    """An output that does not exist, an idle disk, and afterwards no output."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    try:
        yield out
    finally:
        shutil.rmtree(out, ignore_errors=True)


def measure_rounds(
    inputs: Inputs, work: Path, contenders: list[str], rounds: int, cache: str
) -> dict[str, Any]:
    """Seconds of each contender, and how merge compares, round by round; the largest share of the base that stayed in the cache."""
    rows = []
    kept = 0.0
    for i in range(rounds):
        row: dict[str, float] = {}
        for contender in contenders[i % len(contenders) :] + contenders[: i % len(contenders)]:
            with fresh(work / "out") as out:
                if cache == "cold":
                    kept = max(kept, cold(inputs.base))
                else:
                    warm(inputs.base)
                row[contender] = timed(command(contender, inputs, out))
                if contender == "cp":
                    row["cp_sync"] = row["cp"] + timed(["sync", *map(str, files_of([out]))])
        ratios = {
            f"merge/{other}": row["merge"] / row[other]
            for other in (*contenders, "cp_sync")
            if other in row and other != "merge"
        }
        rows.append({**row, **ratios})
    return {
        "rounds": rows,
        "cache": cache,
        "kept": kept,
        "spread": {key: spread([r[key] for r in rows]) for key in rows[0]},
    }


def measure_memory(
    inputs: Inputs, work: Path, contender: str = "merge", *options: str
) -> dict[str, Any]:
    """Seconds and peak memory of one run."""
    with fresh(work / "out") as out:
        cold(inputs.base)
        peak = watched([*command(contender, inputs, out), *options])
    return {
        "bytes": size_of(inputs.base),
        "seconds": peak.seconds,
        "anonymous": peak.anonymous,
        "hwm": peak.hwm,
    }


def measure_profile(inputs: Inputs, work: Path) -> dict[str, Any]:
    """Where the time goes, in a process of its own."""
    with fresh(work / "out") as out:
        line = [
            sys.executable,
            str(TOOLS / "profile_merge.py"),
            *map(str, (inputs.base, inputs.adapter, out, inputs.findings, LAMBDA)),
        ]
        done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
    tree: dict[str, Any] = json.loads(done.stdout)
    return tree


def table(tree: dict[str, Any]) -> str:
    """The result for people."""
    m = tree["machine"]
    head = f"{tree['bytes'] / 1e9:.2f} GB base; {m['cores']} cores ({m['cpu']}), {m['memory'] / 2**30:.0f} GiB; {tree['cache']} cache"
    if tree["kept"] > 0.01:
        head += f", though the system kept up to {100 * tree['kept']:.0f} % of the base in it"
    lines = [head, "", "".join([f"{'round':<8}", *(f"{key:>14}" for key in tree["spread"])])]
    rows = [(str(i), row) for i, row in enumerate(tree["rounds"], 1)]
    rows += [
        (what, {key: s[what] for key, s in tree["spread"].items()})
        for what in ("median", "min", "max")
    ]
    lines += [
        "".join([f"{name:<8}", *(f"{row[key]:>14.2f}" for key in tree["spread"])])
        for name, row in rows
    ]
    lines += ["", f"{'peak memory':<28}{'anonymous MB':>14}{'VmHWM MB':>10}{'s':>8}"]
    for name, peak in tree["memory"].items():
        label = f"{name}, {peak['bytes'] / 1e9:.2f} GB"
        lines.append(
            f"{label:<28}{peak['anonymous'] / 1e6:>14.0f}{peak['hwm'] / 1e6:>10.0f}{peak['seconds']:>8.1f}"
        )
    if "difference_percent" in tree:
        lines.append(f"twice the size: {tree['difference_percent']:+.1f} % anonymous memory")
    profile = tree["profile"]
    lines += ["", f"{'where the time goes':<28}{'s':>8}{'CPU s':>8}{'%':>7}"]
    for name, t in sorted(profile["stages"].items(), key=lambda item: -item[1]["wall"]):
        lines.append(
            f"{name:<28}{t['wall']:>8.2f}{t['cpu']:>8.2f}{100 * t['wall'] / profile['seconds']:>7.1f}"
        )
    lines.append(f"{'instrumented run':<28}{profile['seconds']:>8.2f}")
    lines += [
        f"{'beside it: ' + name:<28}{t['wall']:>8.2f}{t['cpu']:>8.2f}"
        for name, t in profile["beside"].items()
    ]
    return "\n".join(lines)


def contenders_of(text: str) -> list[str]:
    """The names in a list of them."""
    names = text.split(",")
    if "merge" not in names or not set(names) <= {*CONTENDERS}:
        raise argparse.ArgumentTypeError(
            f"expected merge, and others of {', '.join(CONTENDERS)}; found {text!r}"
        )
    return names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="measure this model instead of a generated one"
    )
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="with this adapter")
    parser.add_argument(
        "--findings",
        type=Path,
        metavar="FILE",
        help="from these findings, instead of detecting first",
    )
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="where everything is written: the file system that is measured (default: beside --base, or the "
        "system's directory for temporary files)",
    )
    parser.add_argument(
        "--contenders",
        type=contenders_of,
        default=list(CONTENDERS),
        metavar="A,B",
        help=f"who takes turns (default: {','.join(CONTENDERS)})",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        metavar="N",
        help="runs of each that are timed (default: 3)",
    )
    parser.add_argument(
        "--cache",
        choices=["cold", "warm"],
        default="cold",
        help="where the base is when a clock starts (default: cold)",
    )
    parser.add_argument(
        "--max-memory", metavar="SIZE", help="measure one more merge, under this budget"
    )
    parser.add_argument(
        "--double", action="store_true", help="memory for twice the layers as well; not with --base"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object; seconds and bytes"
    )
    make_checkpoint.add_file_options(parser)
    make_checkpoint.add_model_options(parser)
    args = parser.parse_args()
    if (args.base is None) != (args.adapter is None):
        parser.error("--base and --adapter come together")
    if args.base is None and args.findings is not None:
        parser.error("--findings come with --base")
    if args.double and args.base is not None:
        parser.error("--double needs a generated model: leave --base out")
    if args.rounds < 1:
        parser.error("--rounds: at least 1")
    where = args.work or (args.base.resolve().parent if args.base else None)
    with tempfile.TemporaryDirectory(prefix="bench-merge-", dir=where) as directory:
        work = Path(directory)
        tree = measure(args, work)
    print(json.dumps(tree, indent=1) if args.json else table(tree))


def prepare(args: argparse.Namespace, work: Path, times: int = 1) -> Inputs:
    """The model as given, or generated with so many times the layers, and findings on it."""
    if args.base is None:
        made, _ = make_checkpoint.make_as_asked(work / "model", args, times)
        base = made.base
        adapter = made.adapter
    else:
        base = args.base
        adapter = args.adapter
        if base.stat().st_dev != work.stat().st_dev:
            raise SystemExit(
                f"--work {work.parent} and --base {base} are on different file systems; the copy would not compare"
            )
    findings = args.findings or work / "findings.safetensors"
    if args.findings is None:
        subprocess.run(streamer("detect", "--quiet", base, adapter, "-o", findings), check=True)
    return Inputs(base, adapter, findings)


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Every figure, from what the options say."""
    inputs = prepare(args, work)
    tree: dict[str, Any] = {
        "schema": "streamer.bench-merge/2",
        "machine": machine(),
        "bytes": size_of(inputs.base),
    }
    tree |= measure_rounds(inputs, work, args.contenders, args.rounds, args.cache)
    tree["memory"] = {
        name: measure_memory(inputs, work, name) for name in args.contenders if name != "cp"
    }
    if args.max_memory:
        tree["memory"][f"--max-memory {args.max_memory}"] = measure_memory(
            inputs, work, "merge", "--max-memory", args.max_memory
        )
    tree["profile"] = measure_profile(inputs, work)
    if args.double:
        shutil.rmtree(work / "model")
        inputs.findings.unlink()
        tree["memory"]["double"] = measure_memory(prepare(args, work, times=2), work)
        tree["difference_percent"] = 100 * (
            tree["memory"]["double"]["anonymous"] / tree["memory"]["merge"]["anonymous"] - 1
        )
    return tree


if __name__ == "__main__":
    main()
