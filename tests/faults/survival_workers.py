"""Faults of the workers that a command is divided among: they are killed at random moments, or the command is, or what gives them tasks.

Each run is a process of its own, whose workers are real ones: of this machine, and of a Dask cluster where that is installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from trials import Tally
from worker_runs import WorkerBench, dask_scheduler, dask_workers, has_begun, wait_until, workers_in


class Crew:
    """A command of some seconds on workers, which is killed here and there.

    Attributes
    ----------
    kills
        Runs of each kind.
    seconds
        What an uninterrupted run takes.
    """

    def __init__(self, bench: WorkerBench, home: Path, kills: int, rng: random.Random) -> None:
        self.bench = bench
        self.home = home
        self.kills = kills
        self.rng = rng
        self.options: tuple[object, ...] = ("--workers", 2)
        began = time.monotonic()
        assert self.run(home / "first").returncode == 0
        self.seconds = time.monotonic() - began

    def outputs(self, tally: Tally) -> Iterator[tuple[str, Path]]:
        """Give a directory for the output of each run, and what to call it, until the tally has enough faults."""
        for i in range(10 * self.kills):
            if tally.injected == self.kills:
                return
            out = self.home / f"out-{i}"
            out.mkdir()
            yield f"run {i + 1}", out
        if tally.injected < self.kills:
            tally.problems.append(
                f"{tally.injected} of {self.kills} faults came before the end of their run"
            )

    def start(
        self, out: Path, *options: object
    ) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
        """Start the command, which writes one file into a directory."""
        return self.bench.start(out / self.bench.name, *(options or self.options), "-qq")

    def run(self, out: Path, *options: object) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        out.mkdir(exist_ok=True)
        with self.start(out, *options) as process:
            stdout, stderr = process.communicate(timeout=300)
        return subprocess.CompletedProcess([], process.returncode, stdout, stderr)

    def sleep(self) -> None:
        """Wait for a random part of a run."""
        time.sleep(self.rng.uniform(0.2, 1.0) * self.seconds)

    def lost(self, out: Path) -> list[str]:
        """What has a final name and is not what one process writes (P1)."""
        return self.bench.lost(out)

    def unfinished(self, out: Path) -> list[str]:
        """What goes wrong when the same command runs again (P2, P3)."""
        again = self.run(out)
        wrong = (
            [f"exit {again.returncode}: {again.stderr}"]
            if (again.returncode, again.stderr) != (0, "")
            else []
        )
        left = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
        return [
            *wrong,
            *self.lost(out),
            *([f"left {left}"] if left != sorted(self.bench.files) else []),
        ]


def kill(pids: list[int]) -> None:
    """Kill processes that may have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_until_begun(crew: Crew, out: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a run has written something, or has ended."""
    wait_until(lambda: has_begun(out / crew.bench.name) or process.poll() is not None)


def ended_well(
    tally: Tally, crew: Crew, code: int, said: str, out: Path, what: str, hit: bool
) -> None:
    """Look at a run that is to end as if nothing had been, with code 0 and no word; it counts if the fault came before its end."""
    if hit:
        tally.begin(code, {0}, what)
    else:
        tally.runs += 1
    if said:
        tally.problems.append(f"{what}: said {said!r}")
    tally.end(crew, out, what, int(hit))


def workers_killed(crew: Crew, count: int | None) -> Tally:
    """So many workers are killed at a random moment, or all: their tasks are done again, and the run ends well."""
    tally = Tally()
    for what, out in crew.outputs(tally):
        with crew.start(out) as process:
            crew.sleep()
            there = workers_in(process.pid)
            hit = bool(there) and process.poll() is None
            kill(crew.rng.sample(there, min(len(there), count or len(there))))
            _, err = process.communicate(timeout=300)
        ended_well(tally, crew, process.returncode, err, out, what, hit)
    return tally


def killed_time_and_again(crew: Crew) -> Tally:
    """Workers are killed as they come: exit 6 in one line."""
    tally = Tally()
    for what, out in crew.outputs(tally):
        with crew.start(out) as process:
            crew.sleep()
            while process.poll() is None:
                kill(workers_in(process.pid))
                time.sleep(0.05)
            _, err = process.communicate(timeout=300)
        done = process.returncode == 0  # before a worker was missed
        if done:
            tally.runs += 1
        else:
            tally.begin(process.returncode, {6}, what)
        tally.refused(process.returncode, err, what)
        tally.end(crew, out, what, int(not done))
    return tally


def told_to_end(crew: Crew, signum: signal.Signals) -> Tally:
    """The command is killed, or stopped with all that runs in its terminal: no worker outlives it."""
    tally = Tally()
    for what, out in crew.outputs(tally):
        with crew.start(out) as process:
            crew.sleep()
            if signum == signal.SIGKILL:
                process.kill()
            else:
                wait_until_begun(crew, out, process)  # before, signals are not taken yet
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signum)
            process.communicate(timeout=300)
        ended = process.returncode == 0  # before the signal, or before it would have been taken
        if ended:
            tally.runs += 1
        else:
            tally.begin(
                process.returncode, {-signum if signum == signal.SIGKILL else 128 + signum}, what
            )
        with contextlib.suppress(AssertionError):
            wait_until(lambda pid=process.pid: not workers_in(pid), 20)
        if left := workers_in(process.pid):
            tally.problems.append(f"{what}: workers {left} live on")
            kill(left)
        tally.end(crew, out, what, int(not ended))
    return tally


def two_at_once(crew: Crew) -> Tally:
    """A second command on the same output leaves with exit 5, and the first one finishes; or the second one does, which came first."""
    tally = Tally()
    for what, out in crew.outputs(tally):
        with crew.start(out) as first:
            crew.sleep()
            second = crew.run(out)
            _, err = first.communicate(timeout=300)
        codes = sorted((first.returncode, second.returncode))
        tally.begin(codes[1], {0, 5}, what)
        tally.runs += 1
        if codes[0] != 0:
            tally.problems.append(f"{what}: exit {codes}")
        tally.refused(second.returncode, second.stderr, what)
        tally.refused(first.returncode, err, what)
        tally.end(crew, out, what)
    return tally


@contextlib.contextmanager
def on_dask(crew: Crew) -> Iterator[Path]:
    """Let the command run on a cluster, whose scheduler may be another one in each run; give the file that names it."""
    before = crew.options
    file = crew.home / "scheduler.json"
    crew.options = ("--executor", f"dask:{file}")
    try:
        yield file
    finally:
        crew.options = before


def dask_worker_killed(crew: Crew) -> Tally:
    """A worker of a Dask cluster is killed at a random moment, whose nanny starts another: the run ends well."""
    tally = Tally()
    with on_dask(crew) as file, dask_scheduler(file), dask_workers(file) as watchers:
        crew.run(crew.home / "first")
        for what, out in crew.outputs(tally):
            with crew.start(out) as process:
                crew.sleep()
                hit = process.poll() is None
                kill(crew.rng.sample(workers_in(watchers.pid), 1))
                _, err = process.communicate(timeout=300)
            ended_well(tally, crew, process.returncode, err, out, what, hit)
    return tally


def dask_scheduler_killed(crew: Crew) -> Tally:
    """The scheduler is killed at a random moment: exit 6 in one line, and with another one the command finishes."""
    tally = Tally()
    with on_dask(crew) as file:
        for what, out in crew.outputs(tally):
            with dask_scheduler(file) as scheduler, dask_workers(file), crew.start(out) as process:
                wait_until_begun(crew, out, process)
                time.sleep(crew.rng.uniform(0, 0.5))
                hit = process.poll() is None
                scheduler.kill()
                _, err = process.communicate(timeout=300)
            if hit:
                tally.begin(process.returncode, {0, 6}, what)
            else:
                tally.runs += 1
            tally.refused(process.returncode, err, what)
            with dask_scheduler(file), dask_workers(file):
                tally.end(crew, out, what, int(hit))
    return tally


KINDS: dict[str, Callable[[Crew], Tally]] = {
    "worker killed": lambda crew: workers_killed(crew, 1),
    "all workers killed": lambda crew: workers_killed(crew, None),
    "killed time and again": killed_time_and_again,
    "command killed": lambda crew: told_to_end(crew, signal.SIGKILL),
    "command and workers: SIGINT": lambda crew: told_to_end(crew, signal.SIGINT),
    "two commands on workers": two_at_once,
    **(
        {"Dask: worker killed": dask_worker_killed, "Dask: scheduler killed": dask_scheduler_killed}
        if importlib.util.find_spec("distributed")
        else {}
    ),
}
