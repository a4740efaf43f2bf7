"""What the benchmarks share: a process watched from outside, the state of the page cache, and the machine."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

from streamer.storage.files import drop_cached

POLL_SECONDS = 0.01


class Watched(NamedTuple):
    """A process that has ended.

    Attributes
    ----------
    seconds, cpu
        Wall seconds, and processor seconds of all threads.
    anonymous, hwm
        Peak anonymous memory and peak resident memory, bytes.
    read, rchar
        Bytes that the disk delivered, and that calls of `read` returned; see proc_pid_io(5).
    """

    seconds: float
    cpu: float
    anonymous: int
    hwm: int
    read: int
    rchar: int


def figure(path: str, key: str) -> int:
    """The figure after `key` in a /proc file; 0 if the process is gone."""
    with contextlib.suppress(OSError), open(path) as f:
        for line in f:
            if line.startswith(key):
                return int(line.split()[1])
    return 0


def kilobytes(path: str, key: str) -> int:
    """The figure after `key` in a /proc file that gives kilobytes, in bytes; 0 if the process is gone."""
    return 1024 * figure(path, key)


def children_cpu() -> float:
    """Processor seconds of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def watched(command: list[str], stderr: IO[str] | None = None) -> Watched:
    """Run a command and poll its memory to the end.

    The system's own counters cost nothing to read; smaps_rollup, which is exact to the page, walks all of them, and a run of 1 GB took
    half as long again beside it.
    """
    began = time.perf_counter()
    before = children_cpu()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
    status = f"/proc/{process.pid}/status"
    io = f"/proc/{process.pid}/io"
    anonymous = hwm = read = rchar = 0
    while process.poll() is None:
        anonymous = max(anonymous, kilobytes(status, "RssAnon:"))
        hwm = max(hwm, kilobytes(status, "VmHWM:"))
        read = max(read, figure(io, "read_bytes:"))
        rchar = max(rchar, figure(io, "rchar:"))
        time.sleep(POLL_SECONDS)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return Watched(seconds, children_cpu() - before, anonymous, hwm, read, rchar)


def timed(command: list[str]) -> float:
    """Wall seconds of a command that must succeed."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def files_of(paths: Iterable[Path]) -> list[Path]:
    """The files, and every file below the directories."""
    return [p for path in paths for p in (path, *sorted(path.rglob("*"))) if p.is_file()]


def size_of(path: Path) -> int:
    """Bytes of a file, or of every file below a directory."""
    return sum(p.stat().st_size for p in files_of([path]))


def warm(*paths: Path) -> None:
    """Read the files, and all below the directories, into the page cache, as far as it fits."""
    for path in files_of(paths):
        with path.open("rb") as f:
            hashlib.file_digest(f, "md5")


def cold(*paths: Path) -> float:
    """Drop the files, and all below the directories, from the page cache; returns the share that the system kept all the same."""
    os.sync()
    for path in files_of(paths):
        with path.open("rb") as f:
            drop_cached(f.fileno(), 0, 0)
    return resident(files_of(paths))


def resident(paths: Iterable[Path]) -> float:
    """The share of the files' pages that are in the page cache, by mincore(2)."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    there = pages = 0
    for path in (p for p in paths if p.stat().st_size):
        with (
            path.open("rb") as f,
            mmap.mmap(
                f.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            ) as window,
        ):
            count = -(-len(window) // mmap.PAGESIZE)
            flags = (ctypes.c_ubyte * count)()
            start = ctypes.addressof(ctypes.c_ubyte.from_buffer(window))
            if libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(window)), flags):
                raise OSError(ctypes.get_errno(), "mincore")
            there += sum(b & 1 for b in bytes(flags))
            pages += count
    return there / pages if pages else 0.0


def machine() -> dict[str, Any]:
    """What the figures were measured on; memory in bytes."""
    import torch

    cpu = "?"
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        cpu = next(
            (line.partition(":")[2].strip() for line in f if line.startswith("model name")), cpu
        )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def spread(values: list[float]) -> dict[str, float]:
    """The median and the extremes."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
