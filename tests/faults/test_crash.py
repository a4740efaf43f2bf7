"""Kills, signals, full disks and changing inputs at any moment: what stands is whole, and the same command finishes the job."""

from __future__ import annotations

import itertools
import random
import shutil
import signal
from pathlib import Path

import pytest
from forks import KILL, TORN, partials
from helpers import tree_digest
from jobs import COMMANDS, Bench, Case
from seeds import vary

PLACES = 6
"""Kill points of each kind and command; `survival.py` tries every one."""


@pytest.mark.parametrize("command", COMMANDS)
def test_the_case_is_worth_killing(bench: Bench, command: str) -> None:
    case = bench.case(command)
    assert {"write", "pwrite", "fsync", "rename", "unlink"} <= set(case.calls)
    assert not any(Path(name).name.startswith(".") for name in case.whole)
    assert case.calls.count("rename") >= len(case.whole)


def kill_everywhere(case: Case, places: range | list[int], home: Path, how: str, *options: str) -> None:
    for n in places:
        out = home / f"{how == TORN}-{n}"
        killed = case.run(out, *options, at=n, code=how)
        assert killed.code == -signal.SIGKILL, (n, case.calls[n - 1])
        case.check_whole_files(out)
        case.check_finishes(out, *options)
        shutil.rmtree(out)


def spread(case: Case, count: int, seed: int) -> list[int]:
    """`count` places over the whole run: one at random in each stretch, always the first and the last."""
    total = len(case.calls)
    rng = random.Random(vary(seed))
    edges = [1 + i * total // count for i in range(count + 1)]
    return sorted({1, total, *(rng.randrange(a, max(a + 1, b)) for a, b in itertools.pairwise(edges))})


@pytest.mark.long
@pytest.mark.parametrize("how", [KILL, TORN], ids=["before a call", "inside a write"])
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_some_calls(bench: Bench, command: str, how: str, tmp_path: Path) -> None:
    case = bench.case(command)
    places = spread(case, PLACES, seed=len(command))
    if how == TORN:
        writes = [n for n, name in enumerate(case.calls, 1) if name in ("write", "pwrite")]
        places = writes[:: max(1, len(writes) // PLACES)]
    kill_everywhere(case, places, tmp_path, how)


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_again_and_again(bench: Bench, command: str, tmp_path: Path) -> None:
    """Each run lives a little longer than the one before, and takes up what that one left."""
    case = bench.case(command)
    out = tmp_path / "out"
    for n in range(5, len(case.calls), 8):
        killed = case.run(out, at=n, code=KILL)
        case.check_whole_files(out)
        if killed.code == 0:
            break
        assert killed.code == -signal.SIGKILL
    assert killed.code == 0
    assert tree_digest(out) == case.whole


@pytest.mark.long
@pytest.mark.parametrize("command", COMMANDS)
def test_the_system_refuses_a_call(bench: Bench, command: str, tmp_path: Path) -> None:
    """An I/O error at any call: one line, exit 6, no partial left, and the same command finishes."""
    case = bench.case(command)
    places = [n for n in spread(case, PLACES, seed=1) if case.calls[n - 1] != "unlink"]
    for n in places:
        out = tmp_path / str(n)
        failed = case.run(out, at=n, code="raise OSError(errno.EIO, 'Input/output error')")
        assert failed.code == 6, (n, case.calls[n - 1], failed.err)
        assert failed.err.count("\n") == 1
        assert "Input/output error" in failed.err
        assert "the same command" in failed.err
        assert partials(out) == []
        case.check_whole_files(out)
        case.check_finishes(out)


@pytest.mark.parametrize("command", COMMANDS)
def test_started_over_after_a_kill(bench: Bench, command: str, tmp_path: Path) -> None:
    """--no-resume takes nothing up, and an interrupted start over finishes with the same command as well."""
    case = bench.case(command)
    out = tmp_path / "out"
    before = len(case.calls) // 2
    assert case.run(out, at=before, code=KILL).code == -signal.SIGKILL
    shutil.copytree(out, tmp_path / "again")
    full = case.run(out, "--no-resume")
    assert (full.code, full.told) == (0, "")
    assert len(full.calls) >= len(case.calls)
    assert tree_digest(out) == case.whole
    assert case.run(tmp_path / "again", "--no-resume", at=before, code=KILL).code == -signal.SIGKILL
    case.check_whole_files(tmp_path / "again")
    case.check_finishes(tmp_path / "again", "--no-resume")


@pytest.mark.long
@pytest.mark.parametrize("command", COMMANDS)
def test_a_start_over_killed_at_its_first_calls(bench: Bench, command: str, tmp_path: Path) -> None:
    case = bench.case(command)
    for n in (1, 3, 4, 6):  # about where the old journal goes and the new one begins
        out = tmp_path / str(n)
        assert case.run(out, at=len(case.calls) // 2, code=KILL).code == -signal.SIGKILL
        assert case.run(out, "--no-resume", at=n, code=KILL).code == -signal.SIGKILL
        case.check_whole_files(out)
        case.check_finishes(out, "--no-resume")


@pytest.mark.long
@pytest.mark.parametrize("command", COMMANDS)
def test_overwriting_killed_at_its_first_calls(bench: Bench, command: str, tmp_path: Path) -> None:
    """The old output is no longer taken for a finished one, or it is still whole; the same command makes the new one."""
    case = bench.case(command)
    old = {"detect": ("--epsilon", "0.4"), "merge": ("--lambda", "0.25"), "mitigate": ("--lambda", "0.25")}[
        case.argv[0]
    ]
    assert case.run(tmp_path / "old", *old).code == 0
    before = tree_digest(tmp_path / "old")
    assert before != case.whole
    shutil.copytree(tmp_path / "old", tmp_path / "whole")
    calls = case.run(tmp_path / "whole", "--overwrite").calls
    for n in (*range(1, 9), len(calls) - 2, len(calls) - 1, len(calls)):
        out = tmp_path / str(n)
        shutil.copytree(tmp_path / "old", out)
        assert case.run(out, "--overwrite", at=n, code=KILL).code == -signal.SIGKILL
        now = tree_digest(out)
        if case.committed(out) and "streamer.json" in now and case.argv[0] != "detect":
            assert now.items() >= before.items() or now["streamer.json"] == case.whole["streamer.json"]
        case.check_finishes(out, "--overwrite")


def test_unneeded_findings_of_a_killed_run_go(bench: Bench, tmp_path: Path) -> None:
    """A merge killed while it detects, then replaced by one that needs no detection: nothing of the first is left."""
    case = bench.case("merge")
    out = tmp_path / "out"
    assert case.run(out, at=60, code=KILL).code == -signal.SIGKILL
    hidden = [name for name in tree_digest(out) if name.startswith("..streamer.findings")]
    assert hidden
    done = case.run(out, "--method", "shrink", "--overwrite")
    assert (done.code, done.told) == (0, "")
    assert tree_digest(out).keys() == case.whole.keys()
