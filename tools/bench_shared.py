"""`streamer detect` on a machine that has other work: alone, beside a busy process, and two at once, with threads that sleep or spin.

    python tools/bench_shared.py                              four generated matrices of 2048 x 2048
    python tools/bench_shared.py BASE ADAPTER --runs 5        what is there

Each row is `streamer detect` as a process of its own, from its start to its end: its wall seconds (median of the runs, which take turns),
the processor seconds of all its threads, and the wall seconds as a multiple of the run alone with sleeping threads. Beside means: beside
one process that multiplies matrices on all cores for as long as the run takes, its threads spinning as torch's do unless told otherwise.
Two at once means: both started together, the time of the later one.

How threads wait is set by the environment: sleeping (OMP_WAIT_POLICY=PASSIVE, which the command sets itself where nothing is set) or
spinning (GOMP_SPINCOUNT=300000, what libgomp does where nothing is set).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from measure import machine

WAITING = {"sleeping": {"OMP_WAIT_POLICY": "PASSIVE"}, "spinning": {"GOMP_SPINCOUNT": "300000"}}
BUSY = "import torch; a = torch.ones(1500, 1500)\nwhile True: a @ a"


def environment(waiting: str) -> dict[str, str]:
    """The environment in which threads wait like that."""
    own = {
        key: value
        for key, value in os.environ.items()
        if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    return own | WAITING[waiting]


@contextlib.contextmanager
def beside(busy: int) -> Iterator[None]:
    """Run as many busy processes meanwhile."""
    others = [
        subprocess.Popen([sys.executable, "-c", BUSY], env=environment("spinning"))
        for _ in range(busy)
    ]
    try:
        if others:
            time.sleep(4)  # it has imported torch by then
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def run(
    base: Path, adapter: Path, waiting: str, copies: int, threads: int | None, limit: float
) -> tuple[float, float]:
    """Wall and processor seconds of so many detections at once; infinite if they take longer than the limit."""
    with tempfile.TemporaryDirectory() as directory:
        began = time.perf_counter()
        used = _children()
        commands = [
            [
                sys.executable,
                "-m",
                "streamer",
                "detect",
                str(base),
                str(adapter),
                "--quiet",
                "-o",
                f"{directory}/{i}.safetensors",
                *(["--threads", str(threads)] if threads else []),
            ]
            for i in range(copies)
        ]
        running = [
            subprocess.Popen(c, env=environment(waiting), stdout=subprocess.DEVNULL)
            for c in commands
        ]
        try:
            for process in running:
                if process.wait(max(0.1, limit - (time.perf_counter() - began))):
                    raise SystemExit(f"streamer detect: exit code {process.returncode}")
        except subprocess.TimeoutExpired:
            for process in running:
                process.kill()
                process.wait()
            return float("inf"), float("inf")
        return time.perf_counter() - began, _children() - used


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", nargs="?", type=Path)
    parser.add_argument("adapter", nargs="?", type=Path)
    parser.add_argument("--runs", type=int, default=3, help="of each row (default: 3)")
    parser.add_argument(
        "--threads", type=int, help="of each detection (default: the command's own choice)"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=120,
        help="seconds after which a run is given up (default: 120)",
    )
    parser.add_argument(
        "--hidden",
        type=int,
        default=2048,
        help="rows and columns of the generated matrices (default: 2048)",
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        base = arguments.base
        adapter = arguments.adapter
        if base is None or adapter is None:
            base, adapter = generated(Path(directory), arguments.hidden)
        kinds = [
            (copies, busy, waiting)
            for copies, busy in ((1, 0), (1, 1), (2, 0))
            for waiting in WAITING
        ]
        taken: dict[tuple[int, int, str], list[tuple[float, float]]] = {kind: [] for kind in kinds}
        run(
            base, adapter, "sleeping", 1, arguments.threads, arguments.limit
        )  # what is read is in the cache from here on
        for _ in range(arguments.runs):
            for copies, busy, waiting in kinds:
                with beside(busy):
                    taken[copies, busy, waiting].append(
                        run(base, adapter, waiting, copies, arguments.threads, arguments.limit)
                    )
    alone = statistics.median(wall for wall, _ in taken[1, 0, "sleeping"])
    rows = []
    for (copies, busy, waiting), times in taken.items():
        wall = statistics.median(w for w, _ in times)
        rows.append(
            {
                "detections": copies,
                "busy_beside": busy,
                "threads": waiting,
                "seconds": wall,
                "cpu_seconds": statistics.median(c for _, c in times),
                "times_alone": wall / alone,
            }
        )
    if arguments.json:
        print(json.dumps({"machine": machine(), "rows": rows}, indent=1))
        return
    names = {(1, 0): "alone", (1, 1): "beside a busy process", (2, 0): "two at once"}
    for row in rows:
        name = names[row["detections"], row["busy_beside"]]
        print(
            f"{name:22} {row['threads']:9} {row['seconds']:7.1f} s  {row['cpu_seconds']:7.1f} s of processor  {row['times_alone']:6.1f}x"
        )


def generated(directory: Path, hidden: int) -> tuple[Path, Path]:
    """Four square matrices and an adapter on them."""
    import torch
    from safetensors.torch import save_file

    base = directory / "base"
    adapter = directory / "adapter"
    g = torch.Generator().manual_seed(0)
    base.mkdir()
    adapter.mkdir()
    weights = {}
    factors = {}
    decay = torch.arange(1, hidden + 1).pow(-0.7)
    for i in range(4):
        left, right = (
            torch.linalg.qr(torch.randn(hidden, hidden, generator=g)).Q for _ in range(2)
        )
        module = f"model.layers.{i}.self_attn.q_proj"
        weights[f"{module}.weight"] = ((left * decay) @ right).bfloat16()
        factors[f"base_model.model.{module}.lora_A.weight"] = (
            torch.randn(16, hidden, generator=g) / hidden**0.5
        )
        factors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(
            hidden, 16, generator=g
        ) * (0.2 / hidden**0.5)
    save_file(weights, base / "model.safetensors")
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 16,
        "lora_alpha": 16,
        "bias": "none",
        "target_modules": ["q_proj"],
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter


if __name__ == "__main__":
    main()
