"""Detection on workers, against one process: 70B shapes by default, on processes of this machine, on Dask and on Ray.

    python tools/bench_workers.py                                            one layer of Llama 3 70B's shapes, 1 and 2 workers
    python tools/bench_workers.py --layers 7 --engines processes,dask        more of them, on some engines
    python tools/bench_workers.py BASE ADAPTER --workers 1,2,4               what is there

One thread a task everywhere. Each row: wall seconds of the detection on workers that have started; those until all of them had imported
torch and opened the inputs; whether the findings are those of one process to the last byte; and the time of a task without matrices, there
and back (median of 50). The first row is one process, without an engine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import machine

import streamer
from streamer.api.executors import RayExecutor, processes
from streamer.detection.detect import choose_device
from streamer.plan.plan import make_batch
from streamer.run import Run
from streamer.workers import Task, perform

ROUNDS = 50


@contextlib.contextmanager
def dask(count: int) -> Iterator[Executor]:
    """Start a cluster of Dask's, of processes."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=count, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client.get_executor(pure=False)


@contextlib.contextmanager
def ray(count: int) -> Iterator[Executor]:
    """Start a cluster of Ray's."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray as library

    library.init(
        num_cpus=count, include_dashboard=False, log_to_driver=False, logging_level="error"
    )
    try:
        yield RayExecutor(library, 1)
    finally:
        library.shutdown()


ENGINES = {"processes": processes, "dask": dask, "ray": ray}


def nothing(*_: object) -> None:
    """Do nothing."""


def empty_task(base: Path, adapter: Path) -> Task[None]:
    """A task without a matrix: a worker opens the inputs, once, and answers."""
    run = Run(choose_device("cpu"))
    return Task(run.task_inputs(make_batch(base, [adapter])), 1, "nothing", nothing)


def start(executor: Executor, count: int, task: Task[None]) -> float:
    """Seconds until some rounds of tasks, several for each worker, are done: all have started by then."""
    began = time.perf_counter()
    for _ in range(3):  # those of the first may all go to the worker that starts first
        for future in [
            executor.submit(perform, replace(task, name=str(i))) for i in range(4 * count)
        ]:
            if (error := future.result().error) is not None:
                raise error
    return time.perf_counter() - began


def round_trip(executor: Executor, task: Task[None]) -> float:
    """Median seconds of a task without a matrix."""
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        executor.submit(perform, task).result()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def measure(
    base: Path, adapter: Path, engines: list[str], counts: list[int]
) -> list[dict[str, Any]]:
    """One row for one process, and one for each engine and number of workers."""
    task = empty_task(base, adapter)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        alone = Path(directory) / "alone.safetensors"
        began = time.perf_counter()
        streamer.detect_intruder_dimensions(base, adapter, alone)
        rows.append({"engine": "one process", "workers": 1, "seconds": time.perf_counter() - began})
        for engine in engines:
            for count in counts:
                out = Path(directory) / f"{engine}-{count}.safetensors"
                with ENGINES[engine](count) as executor:
                    row = {
                        "engine": engine,
                        "workers": count,
                        "start_seconds": start(executor, count, task),
                    }
                    began = time.perf_counter()
                    streamer.detect_intruder_dimensions(base, adapter, out, executor=executor)
                    row |= {
                        "seconds": time.perf_counter() - began,
                        "task_seconds": round_trip(executor, task),
                    }
                rows.append(row | {"equal": out.read_bytes() == alone.read_bytes()})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", nargs="?", type=Path, help="base model (default: one is generated)")
    parser.add_argument("adapter", nargs="?", type=Path, help="adapter")
    parser.add_argument(
        "--layers", type=int, default=1, help="layers of the generated model (default: 1)"
    )
    parser.add_argument("--hidden", type=int, help="its width (default: that of Llama 3 70B)")
    parser.add_argument(
        "--engines", default=",".join(ENGINES), help="of processes, dask, ray (default: all)"
    )
    parser.add_argument("--workers", default="1,2", help="numbers of workers (default: 1,2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        base = args.base
        adapter = args.adapter
        if base is None:
            size = ["--hidden", str(args.hidden)] if args.hidden else []
            subprocess.run(
                [
                    sys.executable,
                    Path(__file__).with_name("make_checkpoint.py"),
                    directory,
                    "--like",
                    "llama-3-70b",
                    "--layers",
                    str(args.layers),
                    *size,
                    "--json",
                ],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            base = Path(directory) / "base"
            adapter = Path(directory) / "adapter"
        rows = measure(
            base, adapter, args.engines.split(","), [int(n) for n in args.workers.split(",")]
        )
    if args.json:
        print(json.dumps({"machine": machine(), "rows": rows}, indent=1))
        return
    print("engine       workers  start s  seconds  task ms  equal")
    for row in rows:
        started = row.get("start_seconds")
        trip = row.get("task_seconds")
        print(
            f"{row['engine']:<12} {row['workers']:>7}  {'' if started is None else f'{started:.1f}':>7}  {row['seconds']:>7.1f}  "
            f"{'' if trip is None else f'{trip * 1000:.1f}':>7}  {row.get('equal', '')!s:>5}"
        )


if __name__ == "__main__":
    main()
