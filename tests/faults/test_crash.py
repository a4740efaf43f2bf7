"""Kills, signals, full disks and changing inputs at any moment: what stands is whole, and the same command finishes the job."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import helpers
import pytest
from forks import KILL, LAST, STOP, TORN, partials, server
from helpers import tree_digest
from jobs import COMMANDS, Bench, Case

from streamer.units import format_size

PLACES = 6
"""Kill points of each kind and command; `survival.py` tries every one."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), server())


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
    rng = random.Random(seed)
    edges = [1 + i * total // count for i in range(count + 1)]
    return sorted({1, total, *(rng.randrange(a, max(a + 1, b)) for a, b in itertools.pairwise(edges))})


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


@pytest.mark.parametrize("command", COMMANDS)
def test_a_start_over_killed_at_its_first_calls(bench: Bench, command: str, tmp_path: Path) -> None:
    case = bench.case(command)
    for n in (1, 3, 4, 6):  # about where the old journal goes and the new one begins
        out = tmp_path / str(n)
        assert case.run(out, at=len(case.calls) // 2, code=KILL).code == -signal.SIGKILL
        assert case.run(out, "--no-resume", at=n, code=KILL).code == -signal.SIGKILL
        case.check_whole_files(out)
        case.check_finishes(out, "--no-resume")


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
    hidden = [name for name in tree_digest(out) if name.startswith("..streamer.detection.findings")]
    assert hidden
    done = case.run(out, "--method", "shrink", "--overwrite")
    assert (done.code, done.told) == (0, "")
    assert tree_digest(out).keys() == case.whole.keys()


# Signals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", COMMANDS)
def test_stopped_at_a_safe_point(bench: Bench, command: str, signum: signal.Signals, tmp_path: Path) -> None:
    case = bench.case(command)
    ask = f"os.kill(os.getpid(), {int(signum)}); time.sleep(0.1)"
    last = 12 if command == "detect" else len(case.calls) // 2  # when all is detected, there is no point in stopping
    for n in (2, last // 2, last):
        out = tmp_path / str(n)
        stopped = case.run(out, at=n, code=ask)
        assert stopped.code == 128 + signum
        first, second = stopped.err.splitlines()
        assert f"signal {int(signum)}: stopping at the next safe point" in first
        assert second == f"streamer: stopped by signal {int(signum)}; the same command resumes"
        assert partials(out) == []
        assert [p for p in out.rglob(".*") if p.name.endswith("journal")]
        assert not [p for p in out.rglob(".*") if p.name.endswith("lock")]
        case.check_whole_files(out)
        case.check_finishes(out)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_two_signals_stop_at_once(bench: Bench, signum: signal.Signals, tmp_path: Path) -> None:
    """The second one does not wait for a safe point: here none would come for a minute."""
    case = bench.case("merge")
    began = time.monotonic()
    once = f"os.kill(os.getpid(), {int(signum)}); time.sleep(0.2)"
    stopped = case.run(tmp_path / "out", at=30, code=f"{once}; {once}; time.sleep(60)")
    assert time.monotonic() - began < 20
    assert stopped.code == 128 + signum
    assert "once more to stop at once" in stopped.err
    assert "stopped by signal" not in stopped.err
    case.check_whole_files(tmp_path / "out")
    case.check_finishes(tmp_path / "out")


@pytest.fixture(scope="module")
def long_bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Jobs that take seconds, for processes that are started as a user starts them."""
    return Bench(tmp_path_factory.mktemp("long"), server(), hidden=256)


def wait_for_journal(out: Path, process: subprocess.Popen[str]) -> None:
    """Wait until the run has journalled its first result."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if any(p.stat().st_size > 10_000 for p in out.glob(".*findings.safetensors.journal")):
                return
        time.sleep(0.002)
    raise AssertionError(f"no journal came; the run ended with {process.poll()}")


@pytest.mark.parametrize(
    ("verb", "signum"),
    [("detect", signal.SIGINT), ("merge", signal.SIGTERM), ("merge", signal.SIGKILL)],
    ids=["detect SIGINT", "merge SIGTERM", "merge SIGKILL"],
)
def test_a_process_is_told_to_stop(long_bench: Bench, verb: str, signum: signal.Signals, tmp_path: Path) -> None:
    case, out = long_bench.case(verb), tmp_path / "out"
    with case.start(out) as process:
        wait_for_journal(out, process)
        process.send_signal(signum)
        stdout, stderr = process.communicate(timeout=60)
    if signum == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + signum
        assert stdout == ""
        assert "Traceback" not in stderr
        assert stderr.endswith(f"streamer: stopped by signal {int(signum)}; the same command resumes\n")
        assert partials(out) == []
    assert list(out.glob(".*findings.safetensors.journal"))
    with case.start(out) as process:
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0
    assert LAST.fullmatch(stderr)
    assert tree_digest(out) == case.whole


# Two runs, changing inputs, full disks --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_two_runs_at_once(bench: Bench, command: str, tmp_path: Path) -> None:
    case = bench.case(command)
    out = tmp_path / "out"
    first = case.run(out, at=len(case.calls) // 2, code=STOP)
    assert first.stopped
    before = tree_digest(out)
    began = time.monotonic()
    second = case.run(out)
    assert time.monotonic() - began < 5
    assert second.code == 5
    assert second.err.count("\n") == 1
    target = out / "findings.safetensors" if case.argv[0] == "detect" else out
    assert f"{target}: another run is writing here; wait for it, or choose another output" in second.err
    assert tree_digest(out) == before
    assert server().resume(first.pid).code == 0
    assert tree_digest(out) == case.whole


def own_job(home: Path) -> tuple[Path, Path]:
    base, adapter = helpers.three_shards(home / "inputs")
    return base, adapter


CHANGES = {
    "shard touched": ("base/model-00003-of-00003.safetensors", "os.utime({0!r})"),
    "shard replaced": (
        "base/model-00003-of-00003.safetensors",
        "import shutil; shutil.copy({0!r}, {0!r} + '.new'); os.replace({0!r} + '.new', {0!r})",
    ),
    "shard gone": ("base/model-00003-of-00003.safetensors", "os.remove({0!r})"),
    "adapter weights touched": ("adapter/adapter_model.safetensors", "os.utime({0!r})"),
    "adapter config gone": ("adapter/adapter_config.json", "os.remove({0!r})"),
    "adapter config longer": ("adapter/adapter_config.json", "open({0!r}, 'a').write(' ')"),
    "tokenizer longer": ("base/tokenizer.json", "open({0!r}, 'a').write(' ')"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("command", ["detect", "merge", "mitigate"])
def test_an_input_changes_in_mid_run(command: str, change: str, tmp_path: Path) -> None:
    """Exit 8 names the input; no output is committed, and nothing half-written stays."""
    base, adapter = own_job(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    target = out / "f.safetensors" if command == "detect" else out
    name, code = CHANGES[change]
    path = str(tmp_path / "inputs" / name)
    changed = server().run(command, base, adapter, "-o", target, at=12, code=code.format(path))
    assert changed.code == 8
    assert changed.err.count("\n") == 1
    assert path in changed.err
    assert "start again" in changed.err
    assert partials(out) == []
    assert not {"f.safetensors", "model.safetensors.index.json", "adapter_config.json"} & tree_digest(out).keys()


@pytest.mark.parametrize("command", ["detect", "merge", "mitigate"])
def test_an_input_changes_between_kill_and_resume(command: str, tmp_path: Path) -> None:
    base, adapter = own_job(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    target = out / "f.safetensors" if command == "detect" else out
    argv = (command, base, adapter, "-o", target)
    assert server().run(*argv, at=40, code=KILL).code == -signal.SIGKILL
    before = tree_digest(out)
    os.utime(base / "model-00001-of-00003.safetensors")
    changed = server().run(*argv)
    assert changed.code == 8
    assert changed.err.count("\n") == 1
    assert "an input was modified since this run was interrupted; --no-resume starts it over" in changed.err
    assert tree_digest(out).keys() <= before.keys()
    fresh = server().run(*argv, "--no-resume")
    assert (fresh.code, fresh.told) == (0, "")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("limit", [500, 4000, 15_000])
def test_no_room_for_a_file(bench: Bench, command: str, limit: int, tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk: the system refuses in mid-run, exit 6, and more room lets it finish."""
    case = bench.case(command)
    out = tmp_path / "out"
    full = case.run(out, before=f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))")
    assert full.code == 6
    assert full.err.count("\n") == 1
    assert str(out) in full.err
    assert "free some space, then run the same command again" in full.err
    assert partials(out) == []
    case.check_whole_files(out)
    case.check_finishes(out)


def test_no_room_is_known_before_anything_is_written(bench: Bench, tmp_path: Path) -> None:
    case = bench.case("merge --findings")
    full = case.run(
        tmp_path / "out", before="import shutil; shutil.disk_usage = lambda p: shutil._ntuple_diskusage(9, 9, 9)"
    )
    assert full.code == 6
    needed = json.loads(case.run(tmp_path / "out", "--dry-run", "--json").out)["bytes"]
    assert needed > sum(p.stat().st_size for p in bench.base.glob("*.safetensors"))
    assert f"{tmp_path / 'out'}: needs {format_size(needed)}, the disk has 9 B free; free some space" in full.err
    assert not (tmp_path / "out").exists()


FREE = "import shutil; shutil.disk_usage = lambda p: shutil._ntuple_diskusage(9, 9, {})"


@pytest.mark.parametrize("command", ["detect", "merge", "mitigate"])
def test_no_room_for_findings_is_known_before_anything_is_written(bench: Bench, command: str, tmp_path: Path) -> None:
    """Their size is not known yet: room is asked for as if every direction were an intruder, for the journal beside them too."""
    case, out = bench.case(command), tmp_path / "out"
    full = case.run(out, before=FREE.format(9))
    assert full.code == 6
    words = re.search(
        r"needs up to ([\d.]+) kB, the disk has 9 B free; free some space, or choose another disk\n", full.err
    )
    assert words, full.err
    assert not out.exists() or list(out.iterdir()) == []
    # Two sizes that would look the same are given in bytes.
    close = case.run(out, before=FREE.format(int(1000 * float(words[1])) - 49))
    exact = re.search(r"needs up to (\d+) B, the disk has (\d+) B free", close.err)
    assert exact, close.err
    needed = int(exact[1])
    assert case.run(out, before=FREE.format(needed - 1)).code == 6
    killed = case.run(out, at=len(case.calls) // 3, code=KILL, before=FREE.format(needed))
    assert killed.code == -signal.SIGKILL
    there = sum(p.stat().st_blocks * 512 for p in out.rglob("*.journal") if "findings" in p.name)
    assert there > 0
    assert case.run(out, "--dry-run", before=FREE.format(needed - there)).code == 0
    case.check_finishes(out)


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
        assert (again.code, again.err, again.calls) == (0, note, [])
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
