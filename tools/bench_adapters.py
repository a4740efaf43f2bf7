"""Detection of many adapters on one base: one alone, all one after the other, and all in one pass.

    python tools/bench_adapters.py                                10 adapters on 2 matrices of 4096x4096 in bf16, one thread
    python tools/bench_adapters.py --shape 14336x4096 --adapters 8 --threads 2
    python tools/bench_adapters.py --json --rounds 5

All run in this process, in turn, the files in the page cache: seconds are those of the processor, and the shares, of runs next to each
other, say what a way costs against the adapters one after the other. `equal` counts the matrices on which all ways
decide the same, which all should be.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from make_checkpoint import planted_factors, power_law, write_adapter
from measure import machine, spread
from safetensors.torch import save_file

import streamer
from streamer.detection.findings import Findings

RANK = 16
TOP = 64
"""Leading directions of a matrix that fall like a power; the rest is noise below them."""


def generate(
    directory: Path, shape: tuple[int, int], matrices: int, adapters: int
) -> tuple[Path, list[Path]]:
    """Write the base, and adapters with an intruder in each of its matrices."""
    g = torch.Generator().manual_seed(0)
    base, (m, n) = directory / "base", shape
    base.mkdir()
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(matrices)]
    weights = {}
    for name in names:
        top = power_law(shape, g, top=TOP).dense()
        noise = torch.randn(m, n, generator=g) * (TOP**-0.7 / (2 * (m**0.5 + n**0.5)))
        weights[f"{name}.weight"] = (top + noise).bfloat16()
    save_file(weights, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    shapes = dict.fromkeys(names, ((RANK, n), (m, RANK)))
    paths = [directory / f"adapter-{i}" for i in range(adapters)]
    for path in paths:
        write_adapter(
            path,
            {"target_modules": ["q_proj"]},
            shapes,
            RANK,
            RANK,
            lambda _: planted_factors(shape, RANK, 1.0, 1, g),
        )
    return base, paths


def timed(detect: Callable[[], Sequence[Findings]]) -> tuple[Sequence[Findings], float, float]:
    """The findings, and the seconds of the processor and of the clock."""
    wall = time.perf_counter()
    processor = time.process_time()
    found = detect()
    return found, time.process_time() - processor, time.perf_counter() - wall


def decisions(found: Sequence[Findings]) -> list[tuple[tuple[int, ...], bool]]:
    """What was decided on each matrix of each adapter."""
    return [(m.detection.intruders, m.detection.certified) for findings in found for m in findings]


WAYS = {
    "one": "one alone",
    "in_turn": "one after the other",
    "in_one_pass": "in one pass",
}
"""What is timed, in this order."""


def measure(base: Path, adapters: list[Path], rounds: int) -> dict[str, Any]:
    """Seconds of each round by the ways, and their shares of the time of all adapters one after the other."""

    def in_turn(paths: Sequence[Path]) -> Sequence[Findings]:
        return [streamer.detect_intruder_dimensions(base, path) for path in paths]

    def in_one_pass() -> Sequence[Findings]:
        return list(streamer.detect_intruder_dimensions(base, adapters).values())

    calls: dict[str, Callable[[], Sequence[Findings]]] = {
        "one": lambda: in_turn(adapters[:1]),
        "in_turn": lambda: in_turn(adapters),
        "in_one_pass": in_one_pass,
    }
    rows = []
    for _ in range(rounds):
        row: dict[str, float] = {}
        found = {}
        for way, call in calls.items():
            found[way], row[way], row[f"{way}_wall"] = timed(call)
        of_all = [decisions(found[way]) for way in ("in_turn", "in_one_pass")]
        row |= {f"{way}_share": row[way] / row["in_turn"] for way in calls}
        row |= {
            "equal": sum(len(set(each)) == 1 for each in zip(*of_all, strict=True)),
            "decided": len(of_all[0]),
        }
        rows.append(row)
    return {"rounds": rows, "spread": {key: spread([row[key] for row in rows]) for key in rows[0]}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="4096x4096", help="of the matrices (default: 4096x4096)")
    parser.add_argument("--matrices", type=int, default=2, help="how many (default: 2)")
    parser.add_argument("--adapters", type=int, default=10, help="how many (default: 10)")
    parser.add_argument("--rounds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="torch's (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    m, n = map(int, args.shape.split("x"))
    with tempfile.TemporaryDirectory() as directory:
        tree = measure(
            *generate(Path(directory), (m, n), args.matrices, args.adapters), args.rounds
        )
    if args.json:
        print(json.dumps({"machine": machine(), "load": os.getloadavg(), **tree}, indent=1))
        return
    middle = {key: values["median"] for key, values in tree["spread"].items()}
    print(
        f"{args.adapters} adapters on {args.matrices} matrices of {args.shape}, {args.threads} thread, medians of {args.rounds}; "
        f"load {statistics.fmean(os.getloadavg()):.1f}"
    )
    for key, text in WAYS.items():
        share = tree["spread"][f"{key}_share"]
        print(
            f"{text:40} {middle[key]:8.2f} s  {share['median']:5.2f} ({share['min']:.2f} to {share['max']:.2f})"
        )
    print(f"{middle['equal']:.0f} of {middle['decided']:.0f} decisions equal")


if __name__ == "__main__":
    main()
