"""Faults while a base index is made: its files are whole or not there, and the same command finishes it and the findings."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from forks import KILL, TORN, partials
from helpers import tree_digest
from jobs import Bench, Case

PLACES = 8


def options(out: Path) -> list[str]:
    """The index stands beside the findings, so that the tree of the output holds both."""
    return ["--solver", "certified", "--base-index", str(out / "index")]


@pytest.fixture(scope="module")
def case(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Case:
    out = tmp_path_factory.mktemp("index") / "out"
    plain = bench.case("detect")
    done = plain.run(out, *options(out))
    assert (done.code, done.told) == (0, "")
    whole = tree_digest(out)
    assert sum(name.startswith("index/") for name in whole) == 9
    return Case(plain.argv, plain.server, whole, tuple(done.calls))


def spread(places: list[int]) -> list[int]:
    return places[:: max(1, len(places) // PLACES)]


@pytest.mark.parametrize("how", [KILL, TORN], ids=["before a call", "inside a write"])
def test_killed_at_some_calls(case: Case, how: str, tmp_path: Path) -> None:
    writes = [n for n, name in enumerate(case.calls, 1) if name in ("write", "pwrite")]
    for n in spread(writes if how == TORN else list(range(1, len(case.calls) + 1))):
        out = tmp_path / str(n)
        assert case.run(out, *options(out), at=n, code=how).code == -signal.SIGKILL, (n, case.calls[n - 1])
        case.check_whole_files(out)
        case.check_finishes(out, *options(out))


def test_the_system_refuses_a_call(case: Case, tmp_path: Path) -> None:
    for n in spread([n for n, name in enumerate(case.calls, 1) if name != "unlink"]):
        out = tmp_path / str(n)
        failed = case.run(out, *options(out), at=n, code="raise OSError(errno.EIO, 'Input/output error')")
        assert (failed.code, failed.err.count("\n")) == (6, 1), (n, case.calls[n - 1], failed.err)
        assert "Input/output error" in failed.err
        assert partials(out) == []
        case.check_whole_files(out)
        case.check_finishes(out, *options(out))
