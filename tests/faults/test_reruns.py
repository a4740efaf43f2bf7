"""Running again: what is finished stays, what is of another plan is refused, what was killed is finished; inputs never change."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from commands import ok
from faults import failing
from forks import KILL, server
from helpers import tree_digest
from jobs import COMMANDS, Bench
from several import WAYS, Several, run

import streamer
from streamer.errors import StorageError
from streamer.storage.files import locked

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
            ""
            if case.argv[0] == "detect"
            else f"streamer: note: {out} holds this very output already; nothing to do\n"
        )
        assert (again.code, again.told, again.calls) == (0, "", [])
        assert again.err.startswith(note)
        was = json.loads(first.out)
        is_now = json.loads(again.out)
        if case.argv[0] == "detect":  # times are of a run, not of a file
            for tree in (was, is_now):
                tree["totals"].pop("seconds")
                for matrix in tree["matrices"]:
                    matrix.pop("seconds")
        assert (was.pop("state"), is_now.pop("state")) == ("written", "present")
        assert was == is_now
    # Their times are those of the last run, as `make` wants it.
    assert {p: p.stat().st_ino for p in out.rglob("*")} == stats


def test_findings_that_a_power_cut_brought_back_go(job: tuple[Path, Path], tmp_path: Path) -> None:
    """The cut kept the record and the removal of the journal, and lost that of the findings, which came before."""
    out = tmp_path / "out"
    left = tmp_path / "out" / ".streamer.findings.safetensors"
    assert streamer.merge_with_reduced_intruder_dimensions(*job, out)["state"] == "written"
    before = tree_digest(out)
    left.write_bytes(b"findings")
    assert streamer.merge_with_reduced_intruder_dimensions(*job, out)["state"] == "present"
    assert tree_digest(out) == before
    assert sorted(p.name for p in out.glob(".*")) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_that_takes_up_another_says_so(bench: Bench, command: str, tmp_path: Path) -> None:
    """How much of it is done is where its progress begins."""
    case = bench.case(command)
    out = tmp_path / "out"
    stage = "detect" if command == "detect" else "write"
    at = len(case.calls) // 2 if command == "detect" else len(case.calls) - 12
    assert case.run(out, at=at, code=KILL).code == -signal.SIGKILL
    done = case.run(out, "--json-events", "--json")
    assert json.loads(done.out)["state"] == "resumed"
    events = [json.loads(line) for line in done.err.splitlines()]
    notes = [
        e["message"] for e in events if e["event"] == "note" and e["message"].startswith("resuming")
    ]
    first = next(e for e in events if e.get("stage") == stage)
    items = "matrices" if command == "detect" else "tensors"
    assert first["items"] > 0
    assert f"resuming: {first['items']} of {first['of']} {items} are done" in notes
    assert case.run(tmp_path / "fresh").told == ""


OTHER = {
    "detect": ("--top-k", "3"),
    "merge": ("--lambda", "0.25"),
    "mitigate": ("--method", "project"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_another_plan_is_refused_unless_told_to_overwrite(
    bench: Bench, command: str, tmp_path: Path
) -> None:
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
def test_the_interrupted_run_of_another_plan_is_refused(
    bench: Bench, command: str, tmp_path: Path
) -> None:
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
    before = {
        p: (p.stat().st_mtime_ns, p.stat().st_ino)
        for p in (*bench.base.rglob("*"), *bench.adapter.rglob("*"))
    }
    bench.case(command).run(tmp_path / "out")
    after = {
        p: (p.stat().st_mtime_ns, p.stat().st_ino)
        for p in (*bench.base.rglob("*"), *bench.adapter.rglob("*"))
    }
    assert after == before


@pytest.mark.parametrize("option", ["--overwrite", "--no-resume"])
def test_files_from_before_a_killed_overwrite_go_as_well(
    inputs: tuple[Path, Path], tmp_path: Path, option: str
) -> None:
    """A model, over it another that was killed before it had replaced all shards (and begun anew), over that an adapter."""
    out = tmp_path / "out"
    ok("merge", *inputs, "-o", out, "--method", "shrink")
    copy = shutil.copytree(out, tmp_path / "copy")
    other = ("--method", "shrink", "--lambda", "0.3", "--overwrite")
    calls = server().run("merge", *inputs, "-o", copy, *other).calls
    at = (
        next(i for i in range(len(calls)) if calls[i : i + 6] == ["write"] * 6) + 3
    )  # amid the first shard
    assert (
        server().run("merge", *inputs, "-o", out, *other, at=at, code=KILL).code == -signal.SIGKILL
    )
    if option == "--no-resume":
        assert (
            server().run("merge", *inputs, "-o", out, *other, option, at=at, code=KILL).code
            == -signal.SIGKILL
        )
    assert len(list(out.glob("model-*.safetensors"))) == 3
    ok("mitigate", *inputs, "-o", out, "--overwrite")
    ok("mitigate", *inputs, "-o", tmp_path / "fresh")
    assert tree_digest(out) == tree_digest(tmp_path / "fresh")


def test_a_full_disk_leaves_no_journal(
    job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "some" / "f.safetensors"
    monkeypatch.setattr(os, "pwrite", failing(errno.ENOSPC))
    with pytest.raises(StorageError, match="No space left on device"):
        streamer.detect_intruder_dimensions(*job, out, top_k=6)
    assert [p.name for p in out.parent.iterdir()] == []


@pytest.mark.long
def test_a_killed_save_leaves_the_old_file(job: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed at each call that changes something on disk; the next save clears up."""
    out = tmp_path / "some" / "f"
    findings = streamer.detect_intruder_dimensions(*job, tmp_path / "all.safetensors", top_k=6)
    out.parent.mkdir()
    findings[:3].save(out)
    states = old, new = out.read_bytes(), (tmp_path / "all.safetensors").read_bytes()

    def save(at: int) -> None:
        """In a process that ends at the n-th call."""
        calls = itertools.count(1)
        for name in ("write", "pwrite", "fsync", "rename", "replace", "unlink"):
            real = getattr(os, name)
            setattr(
                os,
                name,
                lambda *given, real=real, **more: (
                    os._exit(9) if next(calls) == at else real(*given, **more)
                ),
            )
        findings.save(out, overwrite=True)
        os._exit(0)

    for n in range(1, 99):
        if (pid := os.fork()) == 0:
            try:
                save(n)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert out.read_bytes() in states, n
        if code != 9:
            break
    assert (code, out.read_bytes()) == (0, new != old and new)
    assert n > 3
    assert [p.name for p in out.parent.iterdir()] == ["f"]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Several:
    return Several(tmp_path_factory.mktemp("several"))


def test_shards_that_one_output_has_already_are_kept(several: Several, tmp_path: Path) -> None:
    """A killed merge of one adapter is taken up by a merge of all, which are then at different shards."""
    way = WAYS[2]
    out = tmp_path / "out"
    alone = several.line(way, out / "lora", several.adapters / "lora")
    alone[alone.index(several.findings)] = several.findings / "lora.safetensors"
    shards = sorted(n for n in tree_digest(several.alone(way) / "lora") if n.startswith("model-"))
    for n in range(20, 500, 3):
        assert server().run(*alone, at=n, code=KILL).code == -signal.SIGKILL
        if (out / "lora" / shards[1]).exists():
            break
        shutil.rmtree(out)
    kept = (out / "lora" / shards[0]).stat().st_ino
    assert not (out / "lora" / shards[2]).exists()
    run(*several.line(way, out))
    assert tree_digest(out) == tree_digest(several.alone(way))
    assert (out / "lora" / shards[0]).stat().st_ino == kept


def test_each_output_is_locked(several: Several, tmp_path: Path) -> None:
    for way, lock in ((WAYS[1], "saved/.streamer.lock"), ("detect", ".saved.safetensors.lock")):
        out = tmp_path / way.split()[0]
        (out / lock).parent.mkdir(parents=True)
        with locked(out / lock):
            assert "another run is writing here" in run(*several.line(way, out), code=5)
        run(*several.line(way, out))
        assert tree_digest(out) == tree_digest(several.alone(way))


def test_one_that_is_locked_leaves_the_others_as_they_were(
    several: Several, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(*several.line(WAYS[1], out))
    before = tree_digest(out)
    with locked(out / "saved" / ".streamer.lock"):
        error = run(*several.line("merge --lambda 0.25 --overwrite", out), code=5)
    assert "saved: another run is writing here" in error
    assert tree_digest(out) == before
