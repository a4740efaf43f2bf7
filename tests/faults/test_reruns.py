"""Running again: what is finished stays, what is of another plan is refused, inputs never change."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from forks import KILL
from helpers import tree_digest
from jobs import COMMANDS, Bench

# Running again --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_a_finished_output_is_left_alone(bench: Bench, command: str, tmp_path: Path) -> None:
    case = bench.case(command)
    out = tmp_path / "out"
    first = case.run(out, "--json")
    stats = {p: p.stat().st_ino for p in out.rglob("*")}
    for options in ((), ("--no-resume",)):
        again = case.run(out, "--json", *options)
        note = (
            "" if case.argv[0] == "detect" else f"streamer: note: {out} holds this very output already; nothing to do\n"
        )
        assert (again.code, again.told, again.calls) == (0, "", [])
        assert again.err.startswith(note)
        was, is_now = json.loads(first.out), json.loads(again.out)
        if case.argv[0] == "detect":  # times are of a run, not of a file
            for tree in (was, is_now):
                tree["totals"].pop("seconds")
                for matrix in tree["matrices"]:
                    matrix.pop("seconds")
        assert (was.pop("state"), is_now.pop("state")) == ("written", "present")
        assert was == is_now
    assert {
        p: p.stat().st_ino for p in out.rglob("*")
    } == stats  # their times are those of the last run, as `make` wants it


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_that_takes_up_another_says_so(bench: Bench, command: str, tmp_path: Path) -> None:
    """How much of it is done is where its progress begins."""
    case = bench.case(command)
    out, stage = tmp_path / "out", "detect" if command == "detect" else "write"
    at = len(case.calls) // 2 if command == "detect" else len(case.calls) - 12
    assert case.run(out, at=at, code=KILL).code == -signal.SIGKILL
    events = [json.loads(line) for line in case.run(out, "--json-events").err.splitlines()]
    notes = [e["message"] for e in events if e["event"] == "note" and e["message"].startswith("resuming")]
    first = next(e for e in events if e.get("stage") == stage)
    items = "matrices" if command == "detect" else "tensors"
    assert first["items"] > 0
    assert f"resuming: {first['items']} of {first['of']} {items} are done" in notes
    assert case.run(tmp_path / "fresh").told == ""


OTHER = {"detect": ("--top-k", "3"), "merge": ("--lambda", "0.25"), "mitigate": ("--method", "project")}


@pytest.mark.parametrize("command", COMMANDS)
def test_another_plan_is_refused_unless_told_to_overwrite(bench: Bench, command: str, tmp_path: Path) -> None:
    case = bench.case(command)
    out = tmp_path / "out"
    other = OTHER[case.argv[0]]
    assert case.run(out, *other).code == 0
    before = tree_digest(out)
    refused = case.run(out)
    assert refused.code == 4
    assert refused.err.count("\n") == 1
    assert str(out) in refused.err
    assert "or pass --overwrite" in refused.err
    assert refused.calls == []
    assert tree_digest(out) == before
    case.check_finishes(out, "--overwrite")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_interrupted_run_of_another_plan_is_refused(bench: Bench, command: str, tmp_path: Path) -> None:
    case = bench.case(command)
    out = tmp_path / "out"
    other = OTHER[case.argv[0]]
    assert case.run(out, *other, at=len(case.calls) // 2, code=KILL).code == -signal.SIGKILL
    before = tree_digest(out)
    refused = case.run(out)
    assert refused.code == 4
    assert "interrupted run with other inputs or options" in refused.err
    assert "; finish that one, choose another output, or pass --overwrite\n" in refused.err
    now = tree_digest(out)
    assert {k: v for k, v in before.items() if k in now} == now
    case.check_finishes(out, "--overwrite")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dry_run_writes_nothing(bench: Bench, command: str, tmp_path: Path) -> None:
    case = bench.case(command)
    out = tmp_path / "out"
    dry = case.run(out, "--dry-run", "--json")
    assert (dry.code, dry.err, dry.calls) == (0, "", [])
    assert json.loads(dry.out)["state"] == "new"
    assert not out.exists() or list(out.iterdir()) == []
    case.run(out, at=len(case.calls) // 2, code=KILL)
    before = tree_digest(out)
    dry = case.run(out, "--dry-run", "--json")
    assert (dry.code, dry.err, dry.calls) == (0, "", [])
    assert json.loads(dry.out)["state"] == "resume"
    assert tree_digest(out) == before
    case.run(out)
    dry = case.run(out, "--dry-run", "--json")
    assert (dry.code, dry.err, dry.calls) == (0, "", [])
    assert json.loads(dry.out)["state"] == "done"
    assert tree_digest(out) == case.whole
    refused = case.run(out, *OTHER[case.argv[0]], "--dry-run")
    assert (refused.code, refused.calls) == (4, [])


@pytest.mark.parametrize("command", COMMANDS)
def test_inputs_never_change(bench: Bench, command: str, tmp_path: Path) -> None:
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (*bench.base.rglob("*"), *bench.adapter.rglob("*"))}
    bench.case(command).run(tmp_path / "out")
    after = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (*bench.base.rglob("*"), *bench.adapter.rglob("*"))}
    assert after == before


@pytest.mark.parametrize("command", COMMANDS)
def test_the_umask_makes_the_modes(bench: Bench, command: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert bench.case(command).run(out, before="os.umask(0o027)").code == 0
    assert {p.stat().st_mode & 0o777 for p in out.rglob("*") if p.is_file()} == {0o640}
