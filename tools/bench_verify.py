"""Measure `streamer verify` against `sha256sum` on the files of a merged model, from a cold and from a warm page cache, by turns.

    python tools/make_checkpoint.py DIR --size-gb 4 --shard-bytes 1e9
    streamer merge DIR/base DIR/adapter -o DIR/merged --method shrink
    python tools/bench_verify.py DIR/merged [BASE ADAPTER] [--runs 5]

Prints seconds, the ratio of the medians, and the peak of anonymous memory; with BASE and ADAPTER also what a sample of three takes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import cold, files_of, machine, size_of, spread, timed, warm, watched


def rounds(output: Path, runs: int, prepare: Callable[[Path], object]) -> dict[str, Any]:
    """Seconds of both, a run of each by turns."""
    files = [str(path) for path in files_of([output])]
    mine = []
    theirs = []
    memory = 0
    for _ in range(runs):
        prepare(output)
        theirs.append(timed(["sha256sum", *files]))
        prepare(output)
        done = watched([sys.executable, "-m", "streamer", "verify", str(output), "-q"])
        mine.append(done.seconds)
        memory = max(memory, done.anonymous)
    both = {"verify": spread(mine), "sha256sum": spread(theirs)}
    return {
        **both,
        "ratio": both["verify"]["median"] / both["sha256sum"]["median"],
        "anonymous_bytes": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="a merged model's directory")
    parser.add_argument("base", type=Path, nargs="?", help="its base")
    parser.add_argument("adapter", type=Path, nargs="?", help="its adapter")
    parser.add_argument("--runs", type=int, default=5, help="runs of each (default: 5)")
    args = parser.parse_args()
    figures: dict[str, Any] = {"machine": machine(), "bytes": size_of(args.output)}
    figures |= {
        "cold": rounds(args.output, args.runs, cold),
        "warm": rounds(args.output, args.runs, warm),
    }
    if args.base is not None and args.adapter is not None:
        line = [
            sys.executable,
            "-m",
            "streamer",
            "verify",
            *map(str, (args.output, args.base, args.adapter)),
            "-q",
        ]
        figures["recomputed"] = watched(line)._asdict()
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
