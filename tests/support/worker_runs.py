"""Commands of some seconds, and runs of them as processes whose workers are looked for."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import ENV, with_method
from helpers import intruding_factors, power_law, write_adapter, write_sharded

import streamer
from streamer.linalg.torch_state import threads
from streamer.storage.transaction import journal_of


@dataclass(frozen=True)
class WorkerBench:
    """Inputs of a command, and what one process with one thread makes of them.

    Attributes
    ----------
    files
        The files that it makes, by their names beside the output.
    command, options
        The command's name, and options beside the inputs and the output.
    name
        Of the file or directory that it writes.
    here
        Runs the same in this process, on the threads that torch has, with further keywords.
    """

    base: Path
    adapter: Path
    files: Mapping[str, bytes]
    command: str
    options: tuple[object, ...]
    name: str
    here: Callable[..., object]

    @classmethod
    def of(
        cls,
        directory: Path,
        base: Path,
        adapter: Path,
        options: tuple[object, ...],
        here: Callable[..., object],
        command: str = "detect",
        name: str = "f.safetensors",
    ) -> WorkerBench:
        """Run it once."""
        alone = directory / "alone"
        alone.mkdir()
        with threads(1):
            here(alone / name)
        return cls(base, adapter, contents(alone), command, options, name, here)

    @property
    def alone(self) -> bytes:
        """The bytes of the one file."""
        (found,) = self.files.values()
        return found

    def lost(self, out: Path) -> list[str]:
        """List what has a final name in a directory and is not what one process writes."""
        return [name for name, data in contents(out).items() if data != self.files.get(name)]

    @contextlib.contextmanager
    def start(self, out: Path, *options: object) -> Iterator[subprocess.Popen[str]]:
        """Start the command in a process group of its own, which is gone afterwards."""
        line = [
            self.command,
            self.base,
            self.adapter,
            "-o",
            out,
            *self.options,
            "--threads",
            1,
            *options,
        ]
        process = subprocess.Popen(
            [sys.executable, "-m", "streamer", *with_method(line)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENV,
            start_new_session=True,
        )
        with process:
            yield process
            if process.poll() is None:
                process.kill()


def contents(directory: Path) -> dict[str, bytes]:
    """Read all files that have final names."""
    paths = [path for path in sorted(directory.rglob("[!.]*")) if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def worker_bench(
    directory: Path, matrices: int = 10, shape: tuple[int, int] = (600, 700)
) -> WorkerBench:
    """Make the inputs of a detection."""
    tensors = {}
    factors = {}
    for i in range(matrices):
        tensors[f"a.{i}.weight"] = power_law(*shape, seed=i).float()
        factors[f"a.{i}"] = intruding_factors(*shape, 4, seed=i)
    base = write_sharded(directory / "base", [tensors])
    adapter = write_adapter(directory / "adapter", factors, 4)

    def here(path: Path, **more: object) -> None:
        streamer.detect_intruder_dimensions(base, adapter, path, solver="certified", **more)

    return WorkerBench.of(directory, base, adapter, ("--solver", "certified"), here)


def merge_bench(
    directory: Path, shards: int = 10, shape: tuple[int, int] = (600, 700)
) -> WorkerBench:
    """Make the inputs of a merge of many shards, that detects first."""
    factors = {f"a.{i}": intruding_factors(*shape, 4, seed=i) for i in range(shards)}
    tensors = [{f"a.{i}.weight": power_law(*shape, seed=i).float()} for i in range(shards)]
    base = write_sharded(directory / "base", tensors)
    adapter = write_adapter(directory / "adapter", factors, 4)

    def here(path: Path, **more: object) -> None:
        streamer.merge_with_reduced_intruder_dimensions(base, adapter, path, **more)

    return WorkerBench.of(directory, base, adapter, (), here, "merge", "model")


BENCHES: dict[str, Callable[[Path], WorkerBench]] = {
    "detect": worker_bench,
    "merge": merge_bench,
}
"""Commands that are divided among workers."""


@contextlib.contextmanager
def engine(module: str, *args: object) -> Iterator[subprocess.Popen[bytes]]:
    """Run a part of a cluster, as its package starts it."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *map(str, args)],
        stderr=subprocess.DEVNULL,
        env=ENV,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(300)
            except subprocess.TimeoutExpired:
                process.kill()


@contextlib.contextmanager
def dask_scheduler(file: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a scheduler of Dask's that writes its address to a file."""
    file.unlink(missing_ok=True)
    options = ["--port", 0, "--host", "127.0.0.1", "--scheduler-file", file, "--no-dashboard"]
    with engine("distributed.cli.dask_scheduler", *options) as process:
        wait_until(file.exists)
        yield process


@contextlib.contextmanager
def dask_workers(file: Path, count: int = 2) -> Iterator[subprocess.Popen[bytes]]:
    """Run workers of a scheduler of Dask's, each in a process that another watches over."""
    options = ["--scheduler-file", file, "--nthreads", 1, "--nworkers", count, "--no-dashboard"]
    with engine("distributed.cli.dask_worker", *options) as process:
        yield process


RAY = """
import sys, ray
cluster = ray.init(num_cpus=int(sys.argv[1]), include_dashboard=False, log_to_driver=False, logging_level="error")
print(cluster.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def ray_cluster(monkeypatch: pytest.MonkeyPatch, cpus: int) -> Iterator[str]:
    """Run a cluster of Ray's with one node, and give its address; runs that start meanwhile need no token for it."""
    pytest.importorskip("ray")
    monkeypatch.setitem(ENV, "RAY_AUTH_MODE", "disabled")
    with subprocess.Popen(
        [sys.executable, "-c", RAY, str(cpus)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENV,
    ) as cluster:
        assert cluster.stdout is not None
        yield cluster.stdout.readline().strip()


def wait_until(what: Callable[[], object], seconds: float = 300) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def has_begun(out: Path) -> bool:
    """Say whether a matrix or a shard is in the journal."""
    if any(out.glob("*.safetensors")):  # in the directory of a model
        return True
    with contextlib.suppress(FileNotFoundError):
        return journal_of(out).stat().st_size > 5_000
    return False


def workers_in(group: int) -> list[int]:
    """List the worker processes of a process group."""
    found = []
    for directory in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(directory.name)
            if os.getpgid(pid) == group and b"spawn_main" in (directory / "cmdline").read_bytes():
                found.append(pid)
    return sorted(found)
