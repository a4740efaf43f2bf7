"""A whole model through `streamer detect`: seconds of each layer, what the full model would take, and how good the forecast is.

    python tools/bench_model.py --like llama-3-70b --layers 2                 generates it, and removes it afterwards
    python tools/bench_model.py BASE ADAPTER --project 80                     measures what is there
    python tools/bench_model.py BASE ADAPTER --like llama-3-70b               the same, for one that make_checkpoint.py made
    python tools/bench_model.py --hidden 192 --layers 2 --json                tiny: does it work?

Time. One run in a process of its own, from its start to the end of the findings file. A layer's seconds are those between the
events of progress that belong to it; the projection to the full model is their mean times its layers, and what a run takes
besides once. The run is linear in layers if the second half of them takes as long as the first.

Forecast. The command line draws what is left from the events of progress: at each tenth of the work, in units of
`streamer.detection.solvers.cost`, the total that the pace so far promises is compared with what it came to. Each shape's seconds by unit
say where the units are off: by the same number for all shapes they would be exact.

Reading. A thread reads the next weight while the current one is computed: reported is how long it read, and how much of that
the run had to wait for. The base is dropped from the page cache first (--warm: it is read into it), and what the system kept is
said. The first weight has nothing to hide behind.

Memory. Every 10 ms `RssAnon:` of /proc/PID/status, beside the run.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import make_checkpoint
from measure import cold, files_of, machine, resident, size_of, warm, watched
from shapes import KNOWN

Row = dict[str, Any]


def instrumented(
    base: str, adapter: str, work: str, device: str, threads: str, launched: str
) -> None:
    """Detect in this process, as the command does, and leave the times of its events and of its reading in `work`."""
    import torch

    import streamer
    from streamer.detection import detect as pipeline
    from streamer.detection.solvers import cost

    torch.set_num_threads(int(threads))
    events: list[tuple[float, str, int, int]] = []
    reading: list[tuple[float, float]] = []
    waited: list[float] = []
    ahead = pipeline.read_ahead

    def since() -> float:
        return time.time() - float(launched)

    def clocked(items: Sequence[Any], load: Callable[[Any], Any], depth: int) -> Iterator[Any]:
        def timed(item: Any) -> Any:
            began = since()
            value = load(item)
            reading.append((began, since()))
            return value

        with contextlib.closing(ahead(items, timed, depth)) as stream:
            while True:
                began = since()
                following = next(stream, None)
                if following is None:
                    return
                waited.append(since() - began)
                yield following
                del following  # as `read_ahead` does

    pipeline.read_ahead = clocked  # type: ignore[assignment]  # what it hands out is the same
    found = streamer.detect_intruder_dimensions(
        base,
        adapter,
        Path(work) / "findings.safetensors",
        device=device,
        on_event=lambda e: (
            events.append((since(), e.name, e.done, e.total)) if e.stage == "detect" else None
        ),
    )
    rows = [
        {
            "tensor": m.tensor,
            "shape": list(m.shape),
            "compute": m.seconds,
            "intruders": len(m.detection.intruders),
            "certified": m.detection.certified,
            "escalated": m.detection.escalated,
            "steps": m.detection.steps,
            "units": cost(m.shape, found.options.directions(m.shape), found.options.solver),
        }
        for m in found
    ]
    tree = {
        "events": events,
        "reading": reading,
        "waited": waited,
        "matrices": rows,
        "seconds": since(),
    }
    (Path(work) / "run.json").write_text(json.dumps(tree))


def layer_of(tensor: str) -> int | None:
    """The number of the layer that a tensor belongs to."""
    found = re.search(r"\.(?:layers|h|blocks?)\.(\d+)\.", f".{tensor}")
    return int(found[1]) if found else None


def by_layer(events: list[list[Any]]) -> list[float]:
    """Seconds of each layer, in the order in which they came."""
    seconds: defaultdict[int, float] = defaultdict(float)
    for (began, name, *_), (ended, *_) in itertools.pairwise(events):
        layer = layer_of(name)
        if layer is not None:
            seconds[layer] += ended - began
    return list(seconds.values())


def halves(seconds: list[float]) -> float | None:
    """How much longer a layer of the second half takes than one of the first, as a share; the middle one of an odd number is left out."""
    half = len(seconds) // 2
    return statistics.mean(seconds[-half:]) / statistics.mean(seconds[:half]) - 1 if half else None


def forecasts(events: list[list[Any]]) -> list[Row]:
    """At each tenth of the work: when it was done, the total promised then, and its error as a share of what it came to."""
    (began, *_), (ended, *_) = events[0], events[-1]
    rows = []
    for tenth in range(1, 10):
        at, _, done, total = next(event for event in events if event[2] >= tenth * event[3] / 10)
        promised = (at - began) * total / done
        rows.append(
            {
                "done": done / total,
                "seconds": at - began,
                "promised": promised,
                "error": promised / (ended - began) - 1,
            }
        )
    return rows


def by_shape(matrices: list[Row]) -> list[Row]:
    """One row for each shape: medians of the seconds of computing, and of these by unit of cost."""
    groups: defaultdict[tuple[int, int], list[Row]] = defaultdict(list)
    for row in matrices:
        groups[tuple(row["shape"])].append(row)
    return [
        {
            "shape": list(shape),
            "matrices": len(rows),
            "seconds": statistics.median(r["compute"] for r in rows),
            "fastest": min(r["compute"] for r in rows),
            "slowest": max(r["compute"] for r in rows),
            "steps": statistics.median(r["steps"] for r in rows),
            "escalated": sum(r["escalated"] for r in rows),
            "per_unit": statistics.median(1e9 * r["compute"] / r["units"] for r in rows),
        }
        for shape, rows in groups.items()
    ]


def measure(
    base: Path, adapter: Path, work: Path, args: argparse.Namespace, planted: dict[str, int] | None
) -> Row:
    """One run and all its figures."""
    (warm if args.warm else cold)(base)
    nbytes = size_of(base)
    held = resident(files_of([base])) * nbytes
    began = time.time()
    peak = watched(
        [
            sys.executable,
            __file__,
            "--instrumented",
            str(base),
            str(adapter),
            str(work),
            args.device,
            str(args.threads),
            repr(began),
        ]
    )
    run = json.loads((work / "run.json").read_text())
    matrices = run["matrices"]
    events = run["events"]
    layers = by_layer(events)
    each = statistics.mean(layers) if layers else None
    reading = sum(ended - start for start, ended in run["reading"])
    waited = sum(run["waited"])
    first = run["waited"][0]
    hidden = max(0.0, 1 - (waited - first) / max(reading - first, 1e-9))
    found = {row["tensor"]: row["intruders"] for row in matrices if row["intruders"]}
    tree: Row = {
        "schema": "streamer.bench-model/1",
        "machine": machine(),
        "threads": args.threads,
        "device": args.device,
        "bytes": nbytes,
        "cached_bytes": held,
        "warm": args.warm,
        "matrices": len(matrices),
        "certified": sum(row["certified"] for row in matrices),
        "escalated": sum(row["escalated"] for row in matrices),
        "seconds": run["seconds"],
        "before": events[0][0],
        "layers": layers,
        "seconds_per_layer": each,
        "second_half": halves(layers),
        "reading": {"seconds": reading, "waited": waited, "first": first, "hidden": hidden},
        "anonymous": peak.anonymous,
        "forecasts": forecasts(events),
        "shapes": by_shape(matrices),
        "planted": None
        if planted is None
        else {
            "matrices": len(planted),
            "intruders": sum(planted.values()),
            "missed": sorted(n for n, k in planted.items() if found.get(n, 0) != k),
            "others": sorted(found.keys() - planted.keys()),
        },
        "projected": None,
    }
    if each is not None and args.project:
        rest = run["seconds"] - sum(layers)
        tree["projected"] = {"layers": args.project, "seconds": rest + args.project * each}
    return tree


def table(tree: Row) -> str:
    """The result for people."""
    m = tree["machine"]
    reading = tree["reading"]
    lines = [
        f"{m['cores']} cores ({m['cpu']}), {m['memory'] / 2**30:.0f} GiB memory, torch {m['torch']}, "
        f"{tree['threads']} threads, {tree['device']}",
        f"{tree['bytes'] / 1e9:.2f} GB base, {tree['cached_bytes'] / 1e9:.2f} GB of it in the page cache at the start"
        + ("" if tree["warm"] or not tree["cached_bytes"] else ", which the system kept"),
        "",
        f"{tree['matrices']} matrices ({tree['certified']} certified, {tree['escalated']} escalated) in {tree['seconds']:.1f} s, "
        f"{tree['before']:.1f} s before the first; peak anonymous memory {tree['anonymous'] / 1e6:.0f} MB",
    ]
    if tree["layers"]:
        lines.append(
            f"{len(tree['layers'])} layers: {tree['seconds_per_layer']:.2f} s each "
            f"({min(tree['layers']):.2f} to {max(tree['layers']):.2f})"
            + (
                f"; the second half {tree['second_half']:+.1%}"
                if tree["second_half"] is not None
                else ""
            )
        )
    if tree["projected"]:
        seconds = tree["projected"]["seconds"]
        lines.append(
            f"projected to {tree['projected']['layers']} layers: {seconds:.0f} s, {seconds / 60:.1f} minutes"
        )
    lines.append(
        f"reading: {reading['seconds']:.2f} s, of which the run waited {reading['waited']:.2f} s, "
        f"{reading['first']:.2f} s for the first weight; of the others {reading['hidden']:.1%} was hidden"
    )
    if tree["planted"]:
        p = tree["planted"]
        lines.append(
            f"planted: {p['intruders']} intruders in {p['matrices']} matrices; missed or more in {len(p['missed'])}, "
            f"others in {len(p['others'])}"
        )
    lines += [
        "",
        f"{'shape':<14}{'matrices':>9}{'s':>8}{'fastest':>9}{'slowest':>9}{'steps':>7}{'escalated':>11}{'s/10⁹ units':>13}",
    ]
    lines += [
        f"{'x'.join(map(str, r['shape'])):<14}{r['matrices']:>9}{r['seconds']:>8.3f}{r['fastest']:>9.3f}{r['slowest']:>9.3f}"
        f"{r['steps']:>7.0f}{r['escalated']:>11}{r['per_unit']:>13.2f}"
        for r in tree["shapes"]
    ]
    lines += ["", f"{'work done':<14}{'s':>9}{'promised':>11}{'error':>9}"]
    lines += [
        f"{r['done']:<14.1%}{r['seconds']:>9.1f}{r['promised']:>11.1f}{r['error']:>9.1%}"
        for r in tree["forecasts"]
    ]
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--instrumented"]:
        instrumented(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "base",
        metavar="BASE",
        nargs="?",
        type=Path,
        help="measure this model instead of a generated one",
    )
    parser.add_argument(
        "adapter", metavar="ADAPTER", nargs="?", type=Path, help="with this adapter"
    )
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="where all is written that is removed afterwards (default: the "
        "system's directory for temporary files)",
    )
    parser.add_argument(
        "--project",
        type=int,
        metavar="N",
        help="layers of the full model (default: those of --like)",
    )
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of torch (default: 2)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, … (default: cpu)")
    parser.add_argument(
        "--warm", action="store_true", help="with the base in the page cache, as far as it fits"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object; seconds and bytes"
    )
    make_checkpoint.add_model_options(parser)
    args = parser.parse_args()
    if (args.base is None) != (args.adapter is None):
        parser.error("BASE and ADAPTER come together")
    if args.threads < 1 or (args.project is not None and args.project < 1):
        parser.error("--threads and --project: at least 1")
    args.project = args.project or (KNOWN[args.like].layers if args.like else None)
    with tempfile.TemporaryDirectory(prefix="bench-model-", dir=args.work) as directory:
        work = Path(directory)
        base = args.base
        adapter = args.adapter
        planted = None
        if base is None:
            made = make_checkpoint.make_checkpoint(
                work,
                make_checkpoint.model_of(args),
                make_checkpoint.DTYPES[args.dtype],
                rank=args.rank,
                seed=args.seed,
                shards=None,
                shard_bytes=make_checkpoint.HUB_SHARD_BYTES,
            )
            base = made.base
            adapter = made.adapter
            planted = made.planted
        elif args.like:
            config = json.loads((base / "config.json").read_text())
            model = replace(make_checkpoint.model_of(args), layers=config["num_hidden_layers"])
            planted = make_checkpoint.all_planted(model)
        tree = measure(base, adapter, work, args, planted)
    print(json.dumps(tree, indent=1) if args.json else table(tree))


if __name__ == "__main__":
    sys.exit(main())
