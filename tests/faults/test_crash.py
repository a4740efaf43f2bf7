"""Kills, signals, changing inputs, full disks and two runs: what stands is whole, and the same command finishes the job."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import helpers
import pytest
import terminal
import torch
from forks import KILL, LAST, STOP, partials, server
from helpers import tree_digest
from jobs import COMMANDS, Bench
from worker_runs import wait_until, worker_bench

import streamer
from streamer.events import Event, Monitor
from streamer.linalg.torch_state import threads
from streamer.units import format_size


@pytest.mark.parametrize("command", COMMANDS)
def test_the_case_is_worth_killing(bench: Bench, command: str) -> None:
    case = bench.case(command)
    assert {"write", "pwrite", "fsync", "rename", "unlink"} <= set(case.calls)
    assert not any(Path(name).name.startswith(".") for name in case.whole)
    assert case.calls.count("rename") >= len(case.whole)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(
    bench: Bench, command: str, tmp_path: Path
) -> None:
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
def test_a_run_can_be_started_over_after_a_kill(bench: Bench, command: str, tmp_path: Path) -> None:
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


# Two runs, changing inputs, full disks --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_a_second_run_on_an_output_is_refused(bench: Bench, command: str, tmp_path: Path) -> None:
    case = bench.case(command)
    out = tmp_path / "out"
    first = case.run(out, at=len(case.calls) // 2, code=STOP)
    assert first.stopped
    before = tree_digest(out)
    second = case.run(out)  # if it waited for the first, it would never end
    assert second.code == 5
    assert second.err.count("\n") == 1
    target = out / "findings.safetensors" if case.argv[0] == "detect" else out
    assert (
        f"{target}: another run is writing here; wait for it, or choose another output"
        in second.err
    )
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


@pytest.mark.long
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("command", ["detect", "merge", "mitigate"])
def test_an_input_that_changes_in_mid_run_stops_the_run(
    command: str, change: str, tmp_path: Path
) -> None:
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
    assert (
        not {"f.safetensors", "model.safetensors.index.json", "adapter_config.json"}
        & tree_digest(out).keys()
    )


@pytest.mark.parametrize("command", ["detect", "merge", "mitigate"])
def test_an_input_that_changed_after_the_kill_is_refused(command: str, tmp_path: Path) -> None:
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
    assert (
        "an input was modified since this run was interrupted; --no-resume starts it over"
        in changed.err
    )
    assert tree_digest(out).keys() <= before.keys()
    fresh = server().run(*argv, "--no-resume")
    assert (fresh.code, fresh.told) == (0, "")


FREE = "import shutil; shutil.disk_usage = lambda p: shutil._ntuple_diskusage(9, 9, {})"


def test_no_room_is_known_before_anything_is_written(bench: Bench, tmp_path: Path) -> None:
    case = bench.case("merge --findings")
    full = case.run(tmp_path / "out", before=FREE.format(9))
    assert full.code == 6
    needed = json.loads(case.run(tmp_path / "out", "--dry-run", "--json").out)["bytes"]
    assert needed > sum(p.stat().st_size for p in bench.base.glob("*.safetensors"))
    assert (
        f"{tmp_path / 'out'}: needs {format_size(needed)}, the disk has 9 B free; free some space"
        in full.err
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["detect", "merge", "mitigate"])
def test_no_room_for_findings_is_known_before_anything_is_written(
    bench: Bench, command: str, tmp_path: Path
) -> None:
    """Their size is not known yet: room is asked for as if every direction were an intruder, for the journal beside them too."""
    case = bench.case(command)
    out = tmp_path / "out"
    full = case.run(out, before=FREE.format(9))
    assert full.code == 6
    words = re.search(
        r"needs up to ([\d.]+) kB, the disk has 9 B free; free some space, or choose another disk\n",
        full.err,
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


# Signals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_two_signals_stop_at_once(bench: Bench, signum: signal.Signals, tmp_path: Path) -> None:
    """The second one does not wait for a safe point: here none would come for a minute."""
    case = bench.case("merge")
    once = f"os.kill(os.getpid(), {int(signum)}); time.sleep(0.2)"
    stopped = case.run(tmp_path / "out", at=30, code=f"{once}; {once}; time.sleep(60)")
    assert stopped.code == 128 + signum
    assert "once more to stop at once" in stopped.err
    assert "stopped by signal" not in stopped.err  # as it would be at the safe point
    case.check_whole_files(tmp_path / "out")
    case.check_finishes(tmp_path / "out")


STOPPED = """
import os, signal, time
from streamer.cli.terminal import ProgressLines
show = ProgressLines.__call__
def stop(self, event):
    show(self, event)
    for _ in range(2 if event.items == 3 else 0):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
ProgressLines.__call__ = stop
"""


@pytest.mark.parametrize("columns", [40, 200])
def test_a_second_signal_leaves_no_bar(columns: int, tmp_path: Path) -> None:
    job = helpers.three_shards(tmp_path)
    shown = terminal.show(columns, "detect", *job, "-o", tmp_path / "f.safetensors", code=STOPPED)
    assert shown.code == 130
    assert [line for line in shown.during if line.startswith("detect 3/9 matrices")]
    said = "streamer: signal 2: stopping at the next safe point; once more to stop at once"
    assert " ".join(map(str.strip, shown.last)) == said


@pytest.fixture(scope="module")
def long_bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Jobs that take seconds, for processes that are started as a user starts them."""
    return Bench(tmp_path_factory.mktemp("long"), server(), hidden=256)


def wait_for_journal(out: Path, process: subprocess.Popen[str]) -> None:
    """Wait until the run has journalled its first result."""

    def begun() -> bool:
        with contextlib.suppress(FileNotFoundError):
            return any(
                p.stat().st_size > 10_000 for p in out.glob(".*findings.safetensors.journal")
            )
        return False

    wait_until(lambda: begun() or process.poll() is not None)
    assert process.poll() is None, f"no journal came; the run ended with {process.poll()}"


@pytest.mark.long
@pytest.mark.parametrize(
    ("verb", "signum"),
    [("detect", signal.SIGINT), ("merge", signal.SIGTERM), ("merge", signal.SIGKILL)],
    ids=["detect SIGINT", "merge SIGTERM", "merge SIGKILL"],
)
def test_a_process_is_told_to_stop(
    long_bench: Bench, verb: str, signum: signal.Signals, tmp_path: Path
) -> None:
    case = long_bench.case(verb)
    out = tmp_path / "out"
    with case.start(out) as process:
        wait_for_journal(out, process)
        process.send_signal(signum)
        stdout, stderr = process.communicate(timeout=300)
    if signum == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + signum
        assert stdout == ""
        assert "Traceback" not in stderr
        assert stderr.endswith(
            f"streamer: stopped by signal {int(signum)}; the same command resumes\n"
        )
        assert partials(out) == []
    assert list(out.glob(".*findings.safetensors.journal"))
    with case.start(out) as process:
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0
    *notes, last = stderr.splitlines(keepends=True)
    assert LAST.fullmatch(last)
    assert all(
        re.fullmatch(r"streamer: note: resuming: \d+ of \d+ (matrices|tensors) are done\n", n)
        for n in notes
    )
    assert notes
    assert tree_digest(out) == case.whole


@pytest.mark.parametrize("second", [1, 3])
def test_an_interrupted_detection_goes_on_with_its_threads(tmp_path: Path, second: int) -> None:
    """The last bits of findings depend on them, and what is resumed is to be what an uninterrupted run writes."""
    # matrices that are large enough for more than one thread
    bench = worker_bench(tmp_path, 3)
    events = list[Event]()
    whole = tmp_path / "whole.safetensors"
    path = tmp_path / "f.safetensors"

    def stop(event: Event) -> None:
        if event.stage == "detect" and event.done:
            monitor.request_stop(2)

    monitor = Monitor(stop)
    with threads(2):
        bench.here(whole)
        with pytest.raises(streamer.StreamerError, match="stopped"):
            bench.here(path, monitor=monitor)
    with threads(second):
        bench.here(path, on_event=events.append)
        assert torch.get_num_threads() == second
    assert path.read_bytes() == whole.read_bytes()
    assert [e.name for e in events if e.stage == "note"] == [
        "resuming: 2 of 3 matrices are done",
        f"goes on with 2 threads, as it began; --no-resume starts over with {second}",
    ]
