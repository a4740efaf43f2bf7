"""Servers that fail: the same command finishes with the same bytes, or one line says why."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest
import remote_jobs
from command_line import ENV
from forks import KILL, partials
from range_server import FAULTS, serving
from remote_jobs import argv, contents, run, run_all

PASSES = ("stall", "reset", "429", "500", "short", "whole")


def now_and_then(kind: str) -> Callable[[str, int], str | None]:
    """A fault of the fourth answer of each shard, and of each eleventh after it."""
    return lambda path, n: kind if path.startswith("base/model-") and n % 11 == 3 else None


@pytest.mark.long
@pytest.mark.parametrize("kind", PASSES)
def test_faults_that_pass(served: Path, local: dict[str, str], tmp_path: Path, kind: str) -> None:
    with serving(served, fault=now_and_then(kind), stall=1.5) as site:
        home = run_all(f"{site.address}/base", f"{site.address}/adapter", tmp_path / "out", "--remote", "stream")
    assert contents(home) == local


@pytest.mark.long
@pytest.mark.parametrize(("kind", "code"), [("401", 6), ("403", 6), ("changed", 8)])
def test_faults_that_do_not_pass(served: Path, local: dict[str, str], tmp_path: Path, kind: str, code: int) -> None:
    """One line, and the same command goes on once they are mended."""
    with serving(served) as site:
        base, adapter = f"{site.address}/base", f"{site.address}/adapter"
        assert run("detect", base, adapter, tmp_path / "out").code == 0
        site.reset()
        site.fault = lambda path, n: kind if path == "base/model-00002-of-00003.safetensors" and n == 7 else None
        done = run("merge", base, adapter, tmp_path / "out")
        assert (done.code, done.told.count("\n")) == (code, 1), done
        assert "model-00002-of-00003.safetensors: " in done.err
        site.tags.clear()
        site.fault = lambda path, n: None
        for command in ("mitigate", "merge"):
            assert run(command, base, adapter, tmp_path / "out").code == 0
    assert contents(tmp_path / "out") == local
    assert {*PASSES, "401", "403", "changed"} == {*FAULTS}


@pytest.mark.long
@pytest.mark.parametrize(("command", "mode"), [("detect", "stream"), ("merge", "stream"), ("merge", "cache")])
def test_killed_runs_go_on(served: Path, local: dict[str, str], tmp_path: Path, command: str, mode: str) -> None:
    with serving(served) as site:
        base, adapter = f"{site.address}/base", f"{site.address}/adapter"
        home = tmp_path / "out"
        if command == "merge":
            assert run("detect", base, adapter, home, "--remote", mode).code == 0
        for at in (3, 12, 25, 40):
            run(command, base, adapter, home, "--remote", mode, at=at, code=KILL)
        run_all(base, adapter, home, "--remote", mode)
    assert contents(home) == local
    assert partials(home) == []


@pytest.mark.long
def test_ctrl_c_ends_the_wait_that_a_server_asks_for(served: Path, tmp_path: Path) -> None:
    asked = Event()

    def busy(path: str, before: int) -> str | None:
        if path.startswith("base/model-") and before > 5:
            asked.set()
            return "429"
        return None

    with serving(served, fault=busy, retry_after=100) as site:
        line = argv("detect", f"{site.address}/base", f"{site.address}/adapter", tmp_path)
        with subprocess.Popen(
            [sys.executable, "-m", "streamer", *map(str, line)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENV | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        ) as process:
            assert asked.wait(60)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.endswith("streamer: stopped by signal 2; the same command resumes\n")


def test_another_version_of_the_base_is_another_input(served: Path, tmp_path: Path) -> None:
    """An interrupted run does not go on with it."""
    root = remote_jobs.world(tmp_path / "w")
    with serving(root) as site:
        base, adapter = f"{site.address}/base", f"{site.address}/adapter"
        home = tmp_path / "out"
        assert run("detect", base, adapter, home).code == 0
        shard = root / "base" / "model-00001-of-00003.safetensors"
        data = bytearray(shard.read_bytes())
        data[-4000:-2000] = bytes(2000)
        shard.write_bytes(data)
        done = run("detect", base, adapter, home)
    assert (done.code, done.err.count("\n")) == (4, 1), done
