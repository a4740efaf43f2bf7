"""A command to be disturbed, and the tally of what became of it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import shim
from forks import Outcome
from jobs import Case


@dataclass
class Tally:
    """What became of the faults of one kind in one command."""

    injected: int = 0
    runs: int = 0
    identical: int = 0
    lost: int = 0
    wrong_codes: int = 0
    problems: list[str] = field(default_factory=list)

    def begin(self, code: int, allowed: set[int], what: str) -> None:
        """A run with a fault in it has ended."""
        self.injected += 1
        self.runs += 1
        if code not in allowed:
            self.wrong_codes += 1
            self.problems.append(f"{what}: exit {code}, expected one of {sorted(allowed)}")

    def refused(self, code: int, err: str, what: str) -> None:
        """A run that failed says so in one line."""
        if code > 0 and (err.count("\n") != 1 or not err.startswith("streamer: ")):
            self.problems.append(f"{what}: said {err!r}")

    def end(self, case: Case, out: Path, what: str, faults: int = 1) -> None:
        """Look at what so many faults left, run the command again, compare, and remove all."""
        lost = case.lost(out)
        self.lost += bool(lost)
        unfinished = case.unfinished(out)
        self.runs += 1
        self.identical += 0 if unfinished else faults
        self.problems += [f"{what}: {p}" for p in (*lost, *unfinished)]
        shutil.rmtree(out, ignore_errors=True)

    def add(self, other: Tally) -> None:
        """Add what became of other faults."""
        self.injected += other.injected
        self.runs += other.runs
        self.identical += other.identical
        self.lost += other.lost
        self.wrong_codes += other.wrong_codes
        self.problems += other.problems

    @property
    def passed(self) -> bool:
        """Whether nothing was lost, nothing differs, and every exit code was one that is documented."""
        return (
            not (self.problems or self.lost or self.wrong_codes) and self.identical == self.injected
        )


@dataclass(frozen=True)
class Trial:
    """A command to be disturbed: its calls as the shim counts them, and where outputs go."""

    case: Case
    home: Path
    calls: tuple[shim.Call, ...]
    every: int
    rng: random.Random

    def places(self, ops: str = shim.CHANGES) -> Iterator[tuple[int, str]]:
        """(n, op) of every `every`-th call of these kinds, n from 1."""
        found = [(n, call.op) for n, call in enumerate(self.calls, 1) if call.op in ops]
        return iter(found[self.rng.randrange(min(self.every, len(found) or 1)) :: self.every])

    def run(self, out: Path, mode: int, at: int = 0, number: int = 0, **disturbance) -> Outcome:
        """Run it with a fault of the shim's."""
        return self.case.run(out, before=shim.arm(out, mode, at, number), **disturbance)


def recorded(case: Case, home: Path) -> tuple[shim.Call, ...]:
    """The calls of an uninterrupted run."""
    out = home / "recorded"
    record = home / "record"
    done = case.run(out, before=shim.arm(out, record=record))
    assert done.code == 0, done.err
    shutil.rmtree(out)
    return tuple(shim.read_record(record))
