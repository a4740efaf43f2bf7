"""Faults of the machine under a command: kills, signals, system calls that fail, power cuts, inputs that change, two runs at once.

The promises of the design that they try: kills before a call, inside a write and at random moments (P1-P3); a power cut, by replaying what
was synced and what was not (P1-P3, P7); SIGINT and SIGTERM (P15); EIO, ENOSPC, short reads and writes, a limit on file size, a full disk
(P6-P8); inputs that change in mid-run (P5); two runs at once (P9). Calls are disturbed in the C library (`shim.c`), in forks of a process
that has imported everything.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import shim
from forks import STOP, partials
from jobs import Case
from powerloss import WAYS, Disk
from trials import Tally, Trial


def killed(trial: Trial, mode: int, ops: str) -> Tally:
    """A kill before each call, or inside of each write."""
    tally = Tally()
    for n, op in trial.places(ops):
        out = trial.home / f"out-{n}"
        what = f"call {n} ({op})"
        tally.begin(trial.run(out, mode, n).code, {-signal.SIGKILL}, what)
        tally.end(trial.case, out, what)
    return tally


def refused(trial: Trial, number: int, ops: str) -> Tally:
    """The system refuses a call: one line, exit 6, no partial left. A file that cannot be removed may be of no consequence."""
    tally = Tally()
    for n, op in trial.places(ops):
        out = trial.home / f"out-{n}"
        what = f"call {n} ({op})"
        done = trial.run(out, shim.FAIL, n, number)
        tally.begin(done.code, {0, 6} if op == "u" else {6}, what)
        wrong = (
            done.err.count("\n") != 1
            or os.strerror(number) not in done.err
            or "the same command" not in done.err
        )
        if done.code and wrong:
            tally.problems.append(f"{what}: said {done.err!r}")
        if partials(out) and op != "u":
            tally.problems.append(f"{what}: left {partials(out)}")
        tally.end(trial.case, out, what)
    return tally


def short(trial: Trial) -> Tally:
    """Every write, then every read, brings half of what was asked for: nothing is noticed."""
    tally = Tally()
    for what, under, mode in (
        ("writes", trial.home / "out", shim.SHORT),
        *(("reads", source, shim.SHORT_READ) for source in trial.case.inputs),
        ("reads back", trial.home / "out", shim.SHORT_READ),
    ):
        for options in ((), ("--io", "pread")):
            out = trial.home / "out"
            done = trial.case.run(out, *options, before=shim.arm(under, mode))
            tally.begin(done.code, {0}, what)
            tally.end(trial.case, out, what)
    return tally


def unreadable(trial: Trial) -> Tally:
    """A read of an input fails: exit 6 in one line."""
    tally = Tally()
    for source in trial.case.inputs:
        for options in ((), ("--io", "pread")):
            record = trial.home / "reads"
            out = trial.home / "out"
            trial.case.run(out, *options, before=shim.arm(source, shim.FAIL_READ, record=record))
            shutil.rmtree(out)
            reads = len(shim.read_record(record))
            for n in range(
                1 + trial.rng.randrange(min(reads, trial.every)), reads + 1, trial.every
            ):
                what = f"read {n} of {source.name} {' '.join(options)}"
                done = trial.case.run(
                    out, *options, before=shim.arm(source, shim.FAIL_READ, n, errno.EIO)
                )
                tally.begin(done.code, {6}, what)
                if done.code == 6 and (
                    done.err.count("\n") != 1 or os.strerror(errno.EIO) not in done.err
                ):
                    tally.problems.append(f"{what}: said {done.err!r}")
                tally.end(trial.case, out, what)
    return tally


def told_to_stop(trial: Trial, signum: signal.Signals) -> Tally:
    """A signal during a call: exit 128+N and no partial, or the output, where the last safe point was behind it."""
    tally = Tally()
    for n, op in trial.places():
        out = trial.home / f"out-{n}"
        what = f"call {n} ({op})"
        done = trial.run(out, shim.SIGNAL, n, int(signum))
        tally.begin(done.code, {0, 128 + signum}, what)
        if partials(out) or (done.code == 0 and trial.case.lost(out)):
            tally.problems.append(f"{what}: left {partials(out)}")
        tally.end(trial.case, out, what)
    return tally


def limited(trial: Trial) -> Tally:
    """A limit on file size stands in for a quota."""
    tally = Tally()
    largest = max(call.offset + call.length for call in trial.calls if call.op in "ew")
    for limit in range(500, largest, max(1, largest // 12) * trial.every):
        out = trial.home / f"out-{limit}"
        what = f"limit {limit}"
        done = trial.case.run(
            out, before=f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
        )
        tally.begin(done.code, {6}, what)
        if (
            done.err.count("\n") != 1
            or "free some space, then run the same command again" not in done.err
        ):
            tally.problems.append(f"{what}: said {done.err!r}")
        if partials(out):
            tally.problems.append(f"{what}: left {partials(out)}")
        tally.end(trial.case, out, what)
    return tally


def full_disk(trial: Trial) -> Tally:
    """A disk of its own that someone else fills in mid-run, and then makes room again."""
    tally = Tally()
    disk = trial.home / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        return tally
    ballast = disk / "ballast"
    fill = f"f = open({str(ballast)!r}, 'wb', 0)\ntry:\n while f.write(bytes(4096)): pass\nexcept OSError: pass"
    try:
        for n in range(1, len(trial.case.calls), 3 * trial.every):
            out = disk / "out"
            what = f"full at call {n}"
            done = trial.case.run(out, at=n, code=fill)
            tally.begin(done.code, {0, 6}, what)
            if done.code and ("free some space" not in done.err or done.err.count("\n") != 1):
                tally.problems.append(f"{what}: said {done.err!r}")
            ballast.unlink()
            tally.end(trial.case, out, what)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return tally


CHANGES = {
    "touched": "os.utime({0!r})",
    "replaced": "import shutil; shutil.copy({0!r}, {1!r}); os.replace({1!r}, {0!r})",
    "longer": "open({0!r}, 'ab').write(b' ')",
    "gone": "os.unlink({0!r})",
}


def changed(trial: Trial) -> Tally:
    """An input changes in mid-run: exit 8 and no commit point, or the whole output, where all had been read. Put back, it goes on."""
    tally = Tally()
    case = trial.case
    found = [
        p
        for source in case.inputs
        for p in sorted([*source.iterdir(), *source.glob("*/adapter_*")])
    ]
    inputs = [p for p in found if p.suffix in (".safetensors", ".json")]
    for i, n in enumerate(range(2, len(case.calls), 2 * trial.every)):
        path, (how, code) = trial.rng.choice(inputs), list(CHANGES.items())[i % len(CHANGES)]
        if path.name == "tokenizer.json" and case.argv[0] != "merge":
            continue
        out = trial.home / f"out-{n}"
        what = f"{path.name} {how} at call {n}"
        kept = path.read_bytes()
        stamp = path.stat()
        aside = trial.home / "aside"
        os.link(path, aside)  # the very same file again afterwards
        done = case.run(out, at=n, code=code.format(str(path), str(trial.home / "new")))
        tally.begin(done.code, {0, 8}, what)
        if (done.code == 8) == case.committed(out):
            tally.problems.append(f"{what}: exit {done.code} with {sorted(os.listdir(out))}")
        os.replace(aside, path)
        aside.unlink(missing_ok=True)  # where the two are one file still, the renaming did nothing
        if path.read_bytes() != kept:
            path.write_bytes(kept)
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        tally.end(case, out, what)
    return tally


def two_at_once(trial: Trial) -> Tally:
    """A run sleeps at a call; a second one on the same output leaves at once with exit 5, and the first one finishes."""
    tally = Tally()
    server = trial.case.server
    first_locked = 3 if trial.case.several else 2  # before, directories are made
    for n in range(first_locked, len(trial.case.calls), 4 * trial.every):
        out = trial.home / f"out-{n}"
        what = f"asleep at call {n}"
        first = trial.case.run(out, at=n, code=STOP)
        began = time.monotonic()
        second = trial.case.run(out)
        finished = out.exists() and trial.case.lost(out) == [] and trial.case.committed(out)
        tally.begin(second.code, {5, 0} if finished else {5}, what)
        if time.monotonic() - began > 30:
            tally.problems.append(f"{what}: the second one waited")
        tally.runs += 1
        if server.resume(first.pid).code != 0:
            tally.problems.append(f"{what}: the first one failed")
        tally.end(trial.case, out, what)
    return tally


def power_cut(trial: Trial, way: str) -> Tally:
    """The power goes after each call: what was synced stands, the rest as `powerloss.WAYS` says."""
    tally = Tally()
    disk = Disk(trial.home / "recorded")
    first = trial.rng.randrange(min(trial.every, len(trial.calls)))
    for n, call in enumerate(trial.calls, 1):
        disk.apply(call)
        if (n - 1) % trial.every != first:
            continue
        out = trial.home / f"out-{n}"
        disk.leave(way, trial.rng, out)
        tally.injected += 1
        tally.end(trial.case, out, f"after call {n} ({call.op})")
    return tally


def killed_at_random(
    case: Case,
    home: Path,
    kills: int,
    rng: random.Random,
    end: Callable[..., None] | None = None,
    afresh: Callable[[], None] = lambda: None,
) -> Tally:
    """Kill at random moments, three times in a row before a run may finish. Runs that finish first are not counted.

    `end` looks at an output, in place of `Tally.end`; `afresh` puts what a run finds into the state of the first one.
    """
    tally = Tally()
    out = home / "out"
    since = 0
    afresh()
    began = time.monotonic()
    assert case.run(out).code == 0
    seconds = time.monotonic() - began
    shutil.rmtree(out)
    afresh()
    while tally.injected < kills:
        # The kernel's alarm, for which the command has no handler, ends a process as SIGKILL does.
        done = case.run(
            out, before=f"signal.setitimer(signal.ITIMER_REAL, {rng.uniform(0.01, 1.0) * seconds})"
        )
        what = f"kill {tally.injected + 1}"
        if done.code == 0:
            tally.runs += 1
        else:
            tally.begin(done.code, {-signal.SIGALRM}, what)
            since += 1
        if since == 3 or done.code == 0 or tally.injected == kills:
            # One resumed output answers for the kills before it.
            (end or partial(Tally.end, case=case))(tally, out=out, what=what, faults=since)
            since = 0
            afresh()
        elif lost := case.lost(out):
            tally.lost += 1
            tally.problems += [f"{what}: {p}" for p in lost]
    return tally


FAULTS: dict[str, Callable[[Trial], Tally]] = {
    "kill before a call": lambda t: killed(t, shim.KILL, shim.CHANGES),
    "kill inside a write": lambda t: killed(t, shim.TORN, shim.WRITES),
    "SIGINT": lambda t: told_to_stop(t, signal.SIGINT),
    "SIGTERM": lambda t: told_to_stop(t, signal.SIGTERM),
    "EIO": lambda t: refused(t, errno.EIO, shim.CHANGES),
    "ENOSPC": lambda t: refused(t, errno.ENOSPC, "cwes"),
    "EIO of a read": unreadable,
    "short reads and writes": short,
    "limit on file size": limited,
    "full disk": full_disk,
    "input changed": changed,
    "two runs at once": two_at_once,
    **{f"power cut, kept: {way}": lambda t, way=way: power_cut(t, way) for way in WAYS},
}
