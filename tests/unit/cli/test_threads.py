"""How many threads a command takes, and how they wait."""

import os
from pathlib import Path

import pytest

from streamer.storage.files import available_cores


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
        (
            "0::/a/b\n",
            {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "100000 100000\n", "cpu.max": "max 1"},
            1,
        ),
        ("0::/of/the/host\n", {"cpu.max": "500000 100000\n"}, 5),
        ("4:cpu,cpuacct:/job\n0::/a\n", {"a/cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "nonsense\n"}, 64),
        ("nonsense\n", {}, 64),
    ],
)
def test_cores_are_those_of_mask_and_quota(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    membership: str,
    files: dict[str, str],
    cores: int,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(64)))
    assert available_cores(*groups(tmp_path, membership, files)) == cores
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3})
    assert available_cores(*groups(tmp_path, membership, files)) == 1


def test_where_nothing_says_there_are_the_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert available_cores(tmp_path, tmp_path / "none") == os.cpu_count()
