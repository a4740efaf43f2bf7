"""Signals: stopped at a safe point, at once on the second, as a process of its own; what is resumed keeps its threads."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import helpers
import pytest
import terminal
import torch
from forks import LAST, partials, server
from helpers import intruding_factors, power_law, tree_digest, write_adapter, write_sharded
from jobs import COMMANDS, Bench

import streamer
from streamer.events import Event, Monitor

# Signals ------------------------------------------------------------------------------------------------------------


@pytest.mark.long
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
    once = f"os.kill(os.getpid(), {int(signum)}); time.sleep(0.2)"
    stopped = case.run(tmp_path / "out", at=30, code=f"{once}; {once}; time.sleep(60)")
    assert stopped.code == 128 + signum
    assert "once more to stop at once" in stopped.err
    assert "stopped by signal" not in stopped.err  # as it would be at the safe point
    case.check_whole_files(tmp_path / "out")
    case.check_finishes(tmp_path / "out")


STOPPED = """
import os, signal, time
from streamer.cli.progress import Progress
show = Progress.__call__
def stop(self, event):
    show(self, event)
    for _ in range(2 if event.items == 3 else 0):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
Progress.__call__ = stop
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
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if any(p.stat().st_size > 10_000 for p in out.glob(".*findings.safetensors.journal")):
                return
        time.sleep(0.002)
    raise AssertionError(f"no journal came; the run ended with {process.poll()}")


@pytest.mark.long
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
        stdout, stderr = process.communicate(timeout=300)
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
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0
    *notes, last = stderr.splitlines(keepends=True)
    assert LAST.fullmatch(last)
    assert all(re.fullmatch(r"streamer: note: resuming: \d+ of \d+ (matrices|tensors) are done\n", n) for n in notes)
    assert notes
    assert tree_digest(out) == case.whole


@pytest.fixture
def events() -> Iterator[list[Event]]:
    """What a monitor is told; torch has its threads again when the test ends."""
    before = torch.get_num_threads()
    yield []
    torch.set_num_threads(before)


@pytest.mark.parametrize("second", [1, 3])
def test_an_interrupted_detection_goes_on_with_its_threads(events: list[Event], tmp_path: Path, second: int) -> None:
    """The last bits of findings depend on them, and what is resumed is to be what an uninterrupted run writes."""
    base, adapter = wide(tmp_path)
    torch.set_num_threads(2)
    whole = tmp_path / "whole.safetensors"
    streamer.detect_intruder_dimensions(base, adapter, whole, solver="certified")

    def stop(event: Event) -> None:
        if event.stage == "detect" and event.done:
            monitor.request_stop(2)

    path, monitor = tmp_path / "f.safetensors", Monitor(stop)
    with pytest.raises(streamer.StreamerError, match="stopped"):
        streamer.detect_intruder_dimensions(base, adapter, path, solver="certified", monitor=monitor)
    torch.set_num_threads(second)
    streamer.detect_intruder_dimensions(base, adapter, path, solver="certified", on_event=events.append)
    assert path.read_bytes() == whole.read_bytes()
    assert torch.get_num_threads() == second
    assert [e.name for e in events if e.stage == "note"] == [
        "resuming: 2 of 3 matrices are done",
        f"goes on with 2 threads, as it began; --no-resume starts over with {second}",
    ]


def wide(directory: Path) -> tuple[Path, Path]:
    """Matrices that are large enough for more than one thread."""
    shape, tensors, factors = (600, 700), {}, {}
    for i in range(3):
        tensors[f"a.{i}.weight"] = power_law(*shape, seed=i).float()
        factors[f"a.{i}"] = intruding_factors(*shape, 4, seed=i)
    return write_sharded(directory / "base", [tensors]), write_adapter(directory / "adapter", factors, 4)
