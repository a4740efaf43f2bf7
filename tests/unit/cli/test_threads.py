"""How many threads a command takes, and how they wait."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from streamer.api import threads as api_threads
from streamer.api.threads import COUNTS, choose_threads
from streamer.events import Event, Monitor
from streamer.storage.files import available_cores


def groups(directory: Path, membership: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A tree of control groups, and the file that says which of them hold the process."""
    for name, text in files.items():
        path = directory / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (directory / "self").write_text(membership)
    return directory / "cgroup", directory / "self"


@pytest.mark.parametrize(("membership", "files", "cores"), [
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
])  # fmt: skip
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
    monkeypatch.setattr(api_threads, "threads_pace", lambda count: pace)
    choose_threads(None, Monitor(three_threads.append))
    assert torch.get_num_threads() == threads
    assert [e.name for e in three_threads] == (
        ["the machine is busy, and 3 threads take 1.7 times as long as one: using one (`--threads 3` overrides)"]
        if threads == 1
        else []
    )


def test_who_says_how_many_is_not_asked(three_threads: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_threads, "threads_pace", lambda count: 9.0)
    choose_threads(3, Monitor(three_threads.append))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    choose_threads(None, Monitor(three_threads.append))
    assert (torch.get_num_threads(), three_threads) == (3, [])


def test_a_probe_of_threads_is_quick_and_leaves_them_as_they_were(three_threads: list[Event]) -> None:
    assert 0.01 < api_threads.threads_pace(2) < 100
    assert torch.get_num_threads() == 3
