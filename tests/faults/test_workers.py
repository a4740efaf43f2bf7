"""Workers that die or see other inputs, signals, and two runs at once: the same command finishes, byte for byte, or a line says why."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event as Gate

import pytest
import torch
from seeds import vary
from survival_workers import KINDS, Crew
from worker_runs import (
    BENCHES,
    WorkerBench,
    contents,
    dask_scheduler,
    dask_workers,
    has_begun,
    ray_cluster,
    wait_until,
    worker_bench,
    workers_in,
)

import streamer
from streamer.errors import LockedError, MismatchError, WorkerError
from streamer.events import Event
from streamer.linalg.torch_state import threads
from streamer.plan.plan import make_batch
from streamer.run import Run
from streamer.storage.files import locked
from streamer.storage.transaction import journal_of, lock_of
from streamer.workers import Task, perform


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> WorkerBench:
    return worker_bench(tmp_path_factory.mktemp("workers"))


@pytest.fixture(scope="module", params=BENCHES)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> WorkerBench:
    return BENCHES[request.param](tmp_path_factory.mktemp(request.param))


def finish(bench: WorkerBench, out: Path) -> None:
    """Take up what is there, in this process, and compare."""
    with threads(1):
        bench.here(out)
    assert contents(out.parent) == bench.files
    assert not list(out.parent.rglob(".*"))


@contextlib.contextmanager
def begun(bench: WorkerBench, out: Path, *options: object) -> Iterator[subprocess.Popen[str]]:
    """Start a command on two workers, and go on when something is in its journal; if a test fails, nothing of the command lives on."""
    with bench.start(out, "--workers", 2, *options) as process:
        try:
            wait_until(lambda: has_begun(out) or process.poll() is not None, 120)
            assert process.poll() is None, (
                f"ended with {process.returncode} before it was seen at work"
            )
            yield process
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise


def kill_a_worker(process: subprocess.Popen[str]) -> None:
    wait_until(lambda: workers_in(process.pid) or process.poll() is not None)
    for worker in workers_in(process.pid)[:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


@pytest.mark.long
def test_the_tasks_of_a_killed_worker_are_done_again(each: WorkerBench, tmp_path: Path) -> None:
    out = tmp_path / each.name
    with begun(each, out, "-q") as process:
        kill_a_worker(process)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "its worker was lost (BrokenProcessPool" in stderr
    assert contents(tmp_path) == each.files


@pytest.mark.long
def test_workers_that_die_time_and_again_end_the_run(bench: WorkerBench, tmp_path: Path) -> None:
    out = tmp_path / "f.safetensors"
    with bench.start(out, "--workers", 1, "-qq") as process:
        while process.poll() is None:
            kill_a_worker(process)
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 6
    assert ".weight: its worker was lost (BrokenProcessPool" in stderr
    assert stderr.endswith("for the second time; the same command resumes here\n")
    assert journal_of(out).exists()
    finish(bench, out)


@pytest.mark.long
def test_no_worker_outlives_its_run(each: WorkerBench, tmp_path: Path) -> None:
    """Ctrl-C goes to all processes of a terminal; SIGKILL to one alone. A command gets one of them here, and both in the table."""
    out = tmp_path / each.name
    signum = (signal.SIGINT, signal.SIGKILL)[[*BENCHES].index(each.command) % 2]
    with begun(each, out) as process:
        if signum == signal.SIGINT:
            os.killpg(process.pid, signum)
        else:
            process.kill()
        _, stderr = process.communicate(timeout=120)
    wait_until(lambda: not workers_in(process.pid), 20)
    if signum == signal.SIGINT:
        assert process.returncode == 130
        assert stderr.endswith("streamer: stopped by signal 2; the same command resumes\n")
        assert "Traceback" not in stderr
        assert not lock_of(out).exists()
    assert has_begun(out)
    finish(each, out)


@contextlib.contextmanager
def held_back() -> Iterator[tuple[Executor, Gate]]:
    """A worker that begins when it is let."""
    gate = Gate()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(gate.wait)
        try:
            yield pool, gate
        finally:
            gate.set()


@pytest.mark.parametrize("what", ["another", "another config", "missing"])
def test_a_worker_with_other_inputs_is_refused(
    bench: WorkerBench, what: str, tmp_path: Path
) -> None:
    """The same path leads elsewhere by the time that the worker opens it."""
    link = tmp_path / "base"
    out = tmp_path / "f.safetensors"
    other = tmp_path / "other"
    link.symlink_to(bench.base)
    if what == "another config":
        shutil.copytree(bench.base, other)
        (other / "config.json").write_text('{"model_type": "other"}')
    if what == "another":
        other.mkdir()
        for path in bench.base.iterdir():
            data = path.read_bytes()
            if path.suffix == ".safetensors":
                n = 8 + int.from_bytes(data[:8], "little")
                data = data[:n] + data[n:][::-1]
            (other / path.name).write_bytes(data)

    def lead_elsewhere(event: Event) -> None:
        if event.stage == "detect" and not gate.is_set():
            link.unlink()
            if what != "missing":
                link.symlink_to(other)
            gate.set()

    with held_back() as (pool, gate), pytest.raises(MismatchError) as refused:
        streamer.detect_intruder_dimensions(
            link, bench.adapter, out, executor=pool, on_event=lead_elsewhere
        )
    message = str(refused.value)
    assert f"process {os.getpid()}" in message
    assert str(link) in message
    if what != "missing":
        differs = "the content of" if what == "another" else "config differ)"
        assert f"differs from the caller's input ({differs}" in message
        assert message.endswith("give all workers the same files")
    else:
        assert message.endswith("(the caller can open it)")


def test_a_worker_of_another_version_is_refused(bench: WorkerBench) -> None:
    inputs = Run(torch.device("cpu")).task_inputs(make_batch(bench.base, [bench.adapter]))
    task = Task(replace(inputs, version="0.0"), 1, "nothing", print)
    assert re.fullmatch(
        r"worker .*: has version \S+, expected 0\.0, the caller.s version; .*",
        str(perform(task).error),
    )


class Failing(Executor):
    """An engine whose workers cannot be reached."""

    def submit(self, fn: object, /, *args: object, **kwargs: object) -> Future[object]:
        raise ConnectionError("no route to host")


def test_an_engine_that_takes_nothing_is_named(bench: WorkerBench, tmp_path: Path) -> None:
    """A run that found nothing leaves the number of threads to the next one."""
    events: list[Event] = []
    out = tmp_path / "f.safetensors"
    with (
        threads(2),
        pytest.raises(
            WorkerError, match=r"was lost \(ConnectionError: no route to host\) for the second time"
        ),
    ):
        streamer.detect_intruder_dimensions(
            bench.base,
            bench.adapter,
            out,
            solver="certified",
            executor=Failing(),
            on_event=events.append,
        )
    warnings = [e.name for e in events if e.stage == "warning"]
    assert len(warnings) == 10
    assert all(text.endswith("no route to host); it is run again") for text in warnings)
    finish(bench, out)


@pytest.mark.slow
def test_a_scheduler_without_workers_is_waited_for_and_said(
    bench: WorkerBench, tmp_path: Path
) -> None:
    pytest.importorskip("distributed")
    out = tmp_path / "f.safetensors"
    file = tmp_path / "scheduler.json"
    said = f"streamer: warning: dask:{file}: has no workers; the run waits for them\n"
    with dask_scheduler(file), bench.start(out, "--executor", f"dask:{file}", "-q") as process:
        assert process.stderr is not None
        assert process.stderr.readline() == said
        with dask_workers(file):
            _, stderr = process.communicate(timeout=300)
    assert (process.returncode, stderr) == (0, "")
    assert out.read_bytes() == bench.alone


@pytest.mark.slow
def test_a_ray_task_that_fits_on_no_node_is_refused(
    bench: WorkerBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "f.safetensors"
    with (
        ray_cluster(monkeypatch, 2) as address,
        bench.start(out, "--executor", f"ray:{address}", "--threads", 3) as run,
    ):
        _, stderr = run.communicate(timeout=300)
    assert run.returncode == 2
    assert stderr.splitlines()[-1] == (
        f"streamer: ray:{address}: a task takes 3 CPUs, one for each thread, and no node has so many: they have 2; "
        "give --threads 2, or add such a node"
    )
    finish(bench, out)


def test_two_runs_on_one_output(bench: WorkerBench, tmp_path: Path) -> None:
    out = tmp_path / "f.safetensors"
    with (
        ThreadPoolExecutor(2) as pool,
        locked(lock_of(out), out),
        pytest.raises(LockedError, match="another run"),
    ):
        streamer.detect_intruder_dimensions(bench.base, bench.adapter, out, executor=pool)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_workers_are_survived(kind: str, each: WorkerBench, tmp_path: Path) -> None:
    """The table's kinds of fault; `survival.py` tries them more often."""
    tally = KINDS[kind](Crew(each, tmp_path, 2, random.Random(vary(kind))))
    assert tally.problems == []
    assert tally.passed
