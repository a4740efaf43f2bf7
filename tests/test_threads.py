"""How many threads a command takes, and how they wait."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ENV, run_cli

from streamer.cli.threads import available_cores


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
    assert told(*argv) == ["PASSIVE", str(available_cores())]
    assert told(*argv, OMP_WAIT_POLICY="ACTIVE", OMP_NUM_THREADS="1") == ["ACTIVE", "1"]
    assert told(*argv, "--threads", "3", GOMP_SPINCOUNT="1000", OMP_NUM_THREADS="1") == ["None", "3"]


def test_the_mask_counts(job: tuple[Path, Path], tmp_path: Path) -> None:
    """As under taskset, Slurm or a container's cpuset."""
    one = min(os.sched_getaffinity(0))
    done = run_cli("detect", "--help", preexec_fn=lambda: os.sched_setaffinity(0, {one}))
    assert "1 here" in " ".join(done.stdout.split())
