"""Time and memory of `streamer merge --lambda 1`, against `cp -r` of the base, and where the time goes: all in one run.

    python tools/bench_merge.py --size-gb 4 --double                   makes 4 GB and 8 GB in one shard each, measures both
    python tools/bench_merge.py --base DIR --adapter DIR --pairs 5     takes what is there
    python tools/bench_merge.py --hidden 64 --layers 2 --json          tiny: does it work?

Time. Merge and copy take turns, --pairs times, each first in every other pair; what the one before wrote is removed and the
disk is idle when a clock starts; the base is in the page cache as far as it fits. A pair gives a ratio; the median and the
extremes are reported, since a machine that others use gives no stable seconds. `cp` leaves its data to be written later, while
merge ends when the data are on the disk: so the ratio to `cp` and then `sync` of the copied files is given as well.

Memory. Runs of their own, which nothing times: every 10 ms `Anonymous:` of /proc/PID/smaps_rollup, the memory that the system
could only swap out; the largest is reported. VmHWM counts besides it the mapped pages of files that happened to be resident,
which the system can drop. --double measures a checkpoint of twice the layers in the same way.

Profile. Another run, in an instrumented process: a torch dispatch mode times the four operations on blocks, wrappers time
system calls, hashing and the functions around them. Each moment of the main thread is counted for its innermost stage, as
wall and as CPU seconds; they differ where it waits, for the disk, for the thread that hashes and writes, or for a core that
another process has. That thread's seconds run beside the main one's and are shown apart.

It needs the disk for two models (four with --double), in --work, and leaves nothing behind.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import make_checkpoint

POLL_SECONDS = 0.01


class Watched(NamedTuple):
    """A process that has ended: wall seconds, peak anonymous memory and peak resident memory, bytes."""

    seconds: float
    anonymous: int
    hwm: int


def kilobytes(path: str, key: str) -> int:
    """The figure after `key` in a /proc file, in bytes; 0 if the process is gone."""
    with contextlib.suppress(OSError), open(path) as f:
        for line in f:
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return 0


def watched(command: list[str]) -> Watched:
    """Run a command and poll its memory to the end; smaps_rollup is exact at the moment of the poll."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    anonymous = hwm = 0
    while process.poll() is None:
        anonymous = max(anonymous, kilobytes(f"/proc/{process.pid}/smaps_rollup", "Anonymous:"))
        hwm = max(hwm, kilobytes(f"/proc/{process.pid}/status", "VmHWM:"))
        time.sleep(POLL_SECONDS)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return Watched(seconds, anonymous, hwm)


def timed(command: list[str]) -> float:
    """Wall seconds of a command that must succeed."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def merge_command(base: Path, adapter: Path, out: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "streamer",
        "merge",
        "--lambda",
        "1",
        "--quiet",
        str(base),
        str(adapter),
        "-o",
        str(out),
    ]


@contextlib.contextmanager
def fresh(out: Path) -> Iterator[Path]:
    """An output that does not exist, an idle disk, and afterwards no output."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    try:
        yield out
    finally:
        shutil.rmtree(out, ignore_errors=True)


def measure_pairs(base: Path, adapter: Path, work: Path, pairs: int) -> list[dict[str, float]]:
    """Merge and copy in turns: seconds and ratios of each pair."""
    for file in base.rglob("*"):
        if file.is_file():
            with file.open("rb") as f:
                hashlib.file_digest(f, "md5")  # into the page cache, for both
    rows = []
    for i in range(pairs):
        row: dict[str, float] = {}

        def merge(row: dict[str, float] = row) -> None:
            with fresh(work / "merged") as out:
                row["merge"] = timed(merge_command(base, adapter, out))

        def copy(row: dict[str, float] = row) -> None:
            with fresh(work / "copied") as out:
                row["cp"] = timed(["cp", "-r", str(base), str(out)])
                row["cp_sync"] = row["cp"] + timed(["sync", *(str(p) for p in out.rglob("*") if p.is_file())])

        for step in (copy, merge) if i % 2 == 0 else (merge, copy):
            step()
        rows.append(row | {"ratio": row["merge"] / row["cp"], "ratio_sync": row["merge"] / row["cp_sync"]})
    return rows


def measure_memory(base: Path, adapter: Path, work: Path) -> dict[str, Any]:
    """Peak memory of one merge."""
    with fresh(work / "merged") as out:
        peak = watched(merge_command(base, adapter, out))
    return {"bytes": size_of(base), "anonymous": peak.anonymous, "hwm": peak.hwm}


def measure_profile(base: Path, adapter: Path, work: Path) -> dict[str, Any]:
    """Run this file once more as the instrumented process."""
    with fresh(work / "merged") as out:
        command = [sys.executable, __file__, "--instrumented", str(base), str(adapter), str(out), repr(time.time())]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    tree: dict[str, Any] = json.loads(done.stdout)
    return tree


class Clock:
    """Wall and CPU seconds of one thread by stage: each moment belongs to the innermost stage."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.cpu: defaultdict[str, float] = defaultdict(float)
        self.stack = ["other"]
        self._since = time.perf_counter(), time.thread_time()

    def _turn(self) -> None:
        now = time.perf_counter(), time.thread_time()
        self.seconds[self.stack[-1]] += now[0] - self._since[0]
        self.cpu[self.stack[-1]] += now[1] - self._since[1]
        self._since = now

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what happens inside for `name`."""
        self._turn()
        self.stack.append(name)
        try:
            yield
        finally:
            self._turn()
            self.stack.pop()


class Clocks(threading.local):
    """A clock for each thread; every one is in `all`, by thread name."""

    all: ClassVar[dict[str, Clock]] = {}

    def __init__(self) -> None:
        self.clock = self.all.setdefault(threading.current_thread().name, Clock())

    def wrap(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, counted for `name` in whatever thread it runs."""

        def inner(*args: Any, **kwargs: Any) -> Any:
            with self.clock.stage(name):
                return function(*args, **kwargs)

        return inner


def instrumented(base: str, adapter: str, out: str, launched: str) -> None:
    """Merge in this process with clocks in place, and print the seconds as JSON."""
    clocks = Clocks()
    clock = clocks.clock
    clock.seconds["start and import"] = time.time() - float(launched)
    clock.cpu["start and import"] = time.thread_time()
    with clock.stage("start and import"):
        from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

        from streamer import apply, outputs
        from streamer.api import prepare
        from streamer.events import Monitor
        from streamer.intruders import DetectionOptions, MitigationOptions
        from streamer.storage import atomic, streams, tensorfile

    stages = {"addmm_": "addmm", "aminmax": "finite check", "isfinite": "finite check"}

    class Blocks(TorchDispatchMode):
        """Times the operations on a block: copied in, summed, copied out rounded, checked."""

        summed = False

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            op = func.overloadpacket.__name__
            name = ("round" if self.summed else "read and upcast") if op == "copy_" else stages.get(op)
            if name is None:
                return func(*args, **(kwargs or {}))
            self.summed = op == "addmm_"
            with clock.stage(name):
                return func(*args, **(kwargs or {}))

    def unwatched(function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with the mode off: under one, torch's linear algebra loads its Python implementations."""

        def inner(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return function(*args, **kwargs)

        return inner

    class Sha256:
        """SHA-256 with a clock."""

        def __init__(self, data: bytes = b"") -> None:
            self._hash = hashlib.sha256(data)
            self.digest, self.hexdigest = self._hash.digest, self._hash.hexdigest

            self.update = clocks.wrap(self._hash.update, "sha256")

    calls = {"write": "write", "fsync": "fsync", "posix_fallocate": "reserve"}
    watched = SimpleNamespace(**vars(os) | {call: clocks.wrap(getattr(os, call), name) for call, name in calls.items()})
    atomic.os = streams.os = watched
    streams.hashlib = SimpleNamespace(**vars(hashlib) | {"sha256": Sha256})
    tensorfile.os = SimpleNamespace(**vars(os) | {"preadv": clocks.wrap(os.preadv, "read")})
    atomic.AtomicFile.write = clocks.wrap(atomic.AtomicFile.write, "wait for the write")  # of the piece before
    apply.matrix_figures = clocks.wrap(unwatched(apply.matrix_figures), "factors and figures")
    apply.Job.mitigated = clocks.wrap(unwatched(apply.Job.mitigated), "factors and figures")
    # The map; its pages come with the upcast.
    tensorfile.TensorFile.view = clocks.wrap(tensorfile.TensorFile.view, "read and upcast")
    with clock.stage("plan and identity"):
        job = prepare(base, adapter, MitigationOptions(1.0), DetectionOptions(), None, "cpu")
        sink = apply.ModelSink(job, Path(out))
    with Blocks():
        outputs.run_jobs([sink], Monitor())
    with clock.stage("other"):
        total = time.time() - float(launched)
    beside: dict[str, dict[str, float]] = {}
    for other in clocks.all.values():
        for name in other.seconds if other is not clock else ():
            if name != "other":  # waiting for work
                both = beside.setdefault(name, {"wall": 0.0, "cpu": 0.0})
                both["wall"] += other.seconds[name]
                both["cpu"] += other.cpu[name]
    stages = {name: {"wall": seconds, "cpu": clock.cpu[name]} for name, seconds in clock.seconds.items()}
    print(json.dumps({"seconds": total, "stages": stages, "beside": beside}))


def size_of(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())


def machine() -> dict[str, Any]:
    import torch

    cpu = "?"
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        cpu = next((line.partition(":")[2].strip() for line in f if line.startswith("model name")), cpu)
    return {"cpu": cpu, "cores": os.cpu_count(), "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "python": platform.python_version(), "torch": torch.__version__}  # fmt: skip


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(tree: dict[str, Any]) -> str:
    """The result for people."""
    m = tree["machine"]
    lines = [
        f"{tree['bytes'] / 1e9:.2f} GB base; {m['cores']} cores ({m['cpu']}), {m['memory'] / 2**30:.0f} GiB memory",
        "",
    ]
    lines.append(f"{'pair':<8}{'merge s':>9}{'cp s':>9}{'cp+sync':>9}{'merge/cp':>10}{'merge/cp+sync':>15}")
    for i, p in enumerate(tree["pairs"], 1):
        lines.append(
            f"{i:<8}{p['merge']:>9.2f}{p['cp']:>9.2f}{p['cp_sync']:>9.2f}{p['ratio']:>10.2f}{p['ratio_sync']:>15.2f}"
        )
    for what in ("median", "min", "max"):
        cells = [tree[key][what] for key in ("merge", "cp", "cp_sync", "ratio", "ratio_sync")]
        lines.append(f"{what:<8}{cells[0]:>9.2f}{cells[1]:>9.2f}{cells[2]:>9.2f}{cells[3]:>10.2f}{cells[4]:>15.2f}")
    lines += ["", f"{'peak memory, MB':<24}{'anonymous':>10}{'VmHWM':>8}"]
    for name in ("memory", "double"):
        if name in tree:
            peak = tree[name]
            label = f"{peak['bytes'] / 1e9:.2f} GB base"
            lines.append(f"{label:<24}{peak['anonymous'] / 1e6:>10.0f}{peak['hwm'] / 1e6:>8.0f}")
    if "double" in tree:
        lines.append(f"twice the size: {tree['double']['difference_percent']:+.1f} % anonymous memory")
    profile = tree["profile"]
    lines += ["", f"{'where the time goes':<28}{'s':>8}{'CPU s':>8}{'%':>7}"]
    for name, t in sorted(profile["stages"].items(), key=lambda item: -item[1]["wall"]):
        lines.append(f"{name:<28}{t['wall']:>8.2f}{t['cpu']:>8.2f}{100 * t['wall'] / profile['seconds']:>7.1f}")
    lines.append(f"{'instrumented run':<28}{profile['seconds']:>8.2f}")
    lines += [f"{'beside it: ' + name:<28}{t['wall']:>8.2f}{t['cpu']:>8.2f}" for name, t in profile["beside"].items()]
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--instrumented"]:
        instrumented(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, metavar="DIR", help="measure this model instead of a generated one")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="with this adapter")
    parser.add_argument("--work", type=Path, metavar="DIR",
                        help="where everything is written: the file system that is measured (default: beside --base, or the "
                        "system's directory for temporary files)")  # fmt: skip
    parser.add_argument(
        "--pairs", type=int, default=3, metavar="N", help="merges and copies that are timed (default: 3)"
    )
    parser.add_argument("--double", action="store_true", help="memory for twice the layers as well; not with --base")
    parser.add_argument("--json", action="store_true", help="print one JSON object; seconds and bytes")
    make_checkpoint.add_model_options(parser)
    args = parser.parse_args()
    if (args.base is None) != (args.adapter is None):
        parser.error("--base and --adapter come together")
    if args.double and args.base is not None:
        parser.error("--double needs a generated model: leave --base out")
    if args.pairs < 1:
        parser.error("--pairs: at least 1")
    where = args.work or (args.base.resolve().parent if args.base else None)
    with tempfile.TemporaryDirectory(prefix="bench-merge-", dir=where) as directory:
        work = Path(directory)
        tree = measure(args, work)
    print(json.dumps(tree, indent=1) if args.json else table(tree))


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Every figure, from what the options say."""
    if args.base is None:
        model, dtype = make_checkpoint.model_of(args), make_checkpoint.DTYPES[args.dtype]
        made = make_checkpoint.make_checkpoint(work / "model", model, dtype, rank=args.rank, seed=args.seed)
        base, adapter = made.base, made.adapter
    else:
        base, adapter = args.base, args.adapter
        if base.stat().st_dev != work.stat().st_dev:
            raise SystemExit(
                f"--work {work.parent} and --base {base} are on different file systems; the copy would not compare"
            )
    pairs = measure_pairs(base, adapter, work, args.pairs)
    tree: dict[str, Any] = {
        "schema": "streamer.bench-merge/1",
        "machine": machine(),
        "bytes": size_of(base),
        "pairs": pairs,
    }
    tree |= {key: spread([p[key] for p in pairs]) for key in pairs[0]}
    tree["memory"] = measure_memory(base, adapter, work)
    tree["profile"] = measure_profile(base, adapter, work)
    if args.double:
        shutil.rmtree(work / "model")
        twice = replace(model, layers=2 * model.layers)
        made = make_checkpoint.make_checkpoint(work / "model", twice, dtype, rank=args.rank, seed=args.seed)
        peak = measure_memory(made.base, made.adapter, work)
        more = peak["anonymous"] / tree["memory"]["anonymous"] - 1
        tree["double"] = peak | {"difference_percent": 100 * more}
    return tree


if __name__ == "__main__":
    main()
