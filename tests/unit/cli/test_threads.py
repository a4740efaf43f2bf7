"""How many threads a command takes, and how they wait."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import ENV, intruding_factors, power_law, run_cli, write_adapter, write_sharded

import streamer
from streamer.cli import calibration
from streamer.cli.cores import available_cores
from streamer.cli.threads import COUNTS, choose_threads
from streamer.events import Event, Monitor


def groups(directory: Path, membership: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A tree of control groups, and the file that says which of them hold the process."""
    for name, text in files.items():
        path = directory / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (directory / "self").write_text(membership)
    return directory / "cgroup", directory / "self"


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "10000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "100000 100000\n", "cpu.max": "max 1"}, 1),
        ("0::/of/the/host\n", {"cpu.max": "500000 100000\n"}, 5),
        ("4:cpu,cpuacct:/job\n1:memory:/x\n", {"cpu,cpuacct/job/cpu.cfs_quota_us": "200000\n",
                                              "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n"}, 2),
        ("4:cpu,cpuacct:/\n", {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 64),
        ("0::/\n", {"cpu.max": "nonsense\n"}, 64),
        ("nonsense\n", {}, 64),
    ],
)  # fmt: skip
def test_cores_are_those_of_mask_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, membership: str, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(64)))
    assert available_cores(*groups(tmp_path, membership, files)) == cores
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3})
    assert available_cores(*groups(tmp_path, membership, files)) == 1


def test_where_nothing_says_there_are_the_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert available_cores(tmp_path, tmp_path / "none") == os.cpu_count()


SAY = "import os, torch; print(os.environ.get('OMP_WAIT_POLICY'), torch.get_num_threads())"


def told(*argv: str, **env: str) -> list[str]:
    """What a command leaves in its process: the policy, and torch's threads."""
    code = f"import sys; from streamer.cli.main import run; assert run({[*argv, '--quiet']!r}) == 0; {SAY}"
    clean = {key: value for key, value in ENV.items() if key not in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **env}, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1].split()


def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(job: tuple[Path, Path], tmp_path: Path) -> None:
    argv = ["detect", *map(str, job), "-o", str(tmp_path / "f.safetensors")]
    assert told("inspect", *map(str, job)) == ["PASSIVE", str(available_cores())]
    assert told(*argv, OMP_WAIT_POLICY="ACTIVE", OMP_NUM_THREADS="1") == ["ACTIVE", "1"]
    assert told(*argv, "--threads", "3", GOMP_SPINCOUNT="1000", OMP_NUM_THREADS="1") == ["None", "3"]


def test_the_mask_counts(job: tuple[Path, Path], tmp_path: Path) -> None:
    """As under taskset, Slurm or a container's cpuset."""
    one = min(os.sched_getaffinity(0))
    done = run_cli("detect", "--help", preexec_fn=lambda: os.sched_setaffinity(0, {one}))
    assert "1 here" in " ".join(done.stdout.split())


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Event]]:
    """As on three cores, with nothing said in the environment; what a monitor is told."""
    before = torch.get_num_threads()
    for name in COUNTS:
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(3)
    yield []
    torch.set_num_threads(before)


@pytest.mark.parametrize(("pace", "threads"), [(0.6, 3), (1.4, 3), (1.7, 1)])
def test_threads_that_do_not_help_are_not_used(
    three_threads: list[Event], monkeypatch: pytest.MonkeyPatch, pace: float, threads: int
) -> None:
    monkeypatch.setattr(calibration, "threads_pace", lambda count: pace)
    choose_threads(None, Monitor(three_threads.append))
    assert torch.get_num_threads() == threads
    assert [e.name for e in three_threads] == (
        ["3 threads take 1.7 times as long as one here, beside other work: using one; --threads 3 insists"]
        if threads == 1
        else []
    )


def test_who_says_how_many_is_not_asked(three_threads: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "threads_pace", lambda count: 9.0)
    choose_threads(3, Monitor(three_threads.append))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    choose_threads(None, Monitor(three_threads.append))
    assert (torch.get_num_threads(), three_threads) == (3, [])


def test_a_probe_of_threads_is_quick_and_leaves_them_as_they_were(three_threads: list[Event]) -> None:
    assert 0.01 < calibration.threads_pace(2) < 100
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("second", [1, 3])
def test_an_interrupted_detection_goes_on_with_its_threads(
    three_threads: list[Event], tmp_path: Path, second: int
) -> None:
    """The last bits of findings depend on them, and what is resumed is to be what an uninterrupted run writes."""
    base, adapter = wide(tmp_path)
    torch.set_num_threads(2)
    whole = tmp_path / "whole.safetensors"
    streamer.detect_intruder_dimensions(base, adapter, whole, solver="certified")

    def stop(event: Event) -> None:
        if event.stage == "detect" and event.done:
            monitor.request_stop(2)

    path, monitor = tmp_path / "f.safetensors", Monitor(stop)
    with pytest.raises(streamer.StreamerError, match="stopped"):
        streamer.detect_intruder_dimensions(base, adapter, path, solver="certified", monitor=monitor)
    torch.set_num_threads(second)
    streamer.detect_intruder_dimensions(base, adapter, path, solver="certified", on_event=three_threads.append)
    assert path.read_bytes() == whole.read_bytes()
    assert torch.get_num_threads() == second
    assert [e.name for e in three_threads if e.stage == "note"] == [
        f"goes on with 2 threads, as it began; --no-resume starts over with {second}"
    ]


def wide(directory: Path) -> tuple[Path, Path]:
    """Matrices that are large enough for more than one thread."""
    shape, tensors, factors = (600, 700), {}, {}
    for i in range(3):
        tensors[f"a.{i}.weight"] = power_law(*shape, seed=i).float()
        factors[f"a.{i}"] = intruding_factors(*shape, 4, seed=i)
    return write_sharded(directory / "base", [tensors]), write_adapter(directory / "adapter", factors, 4)


@pytest.mark.parametrize("command", ["detect", "mitigate", "merge"])
def test_the_help_says_how_many_threads_there_are(command: str) -> None:
    """And that they may be fewer: the note on it, beside other work, comes as no surprise."""
    text = " ".join(run_cli(command, "--help").stdout.split())
    assert (
        f"one for each core of this process, {available_cores()} here; beside other work a detection uses fewer" in text
    )
