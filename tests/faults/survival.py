"""The survival table: ``python tests/faults/survival.py`` injects faults into runs of the command line, and says what became of them.

Every fault is followed by the same three questions. Was a file lost: does anything stand under its final name that is not whole (P1)?
Does the same command finish, with every byte of an uninterrupted run (P2, P3)? Was the exit code the documented one, and what was said one
line (P6, P15)?

Faults are those of the machine under a command (`survival_calls`), of the server that gives its inputs (`survival_servers`), and of the
workers that it is divided among (`survival_workers`).
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import shim
import survival_calls
import survival_servers
import survival_workers
from forks import MODEL_MODULES
from jobs import COMMANDS, MODELS, OTHERS, Bench
from trials import Tally, Trial, recorded
from worker_runs import BENCHES

RANDOM = "kill at random"
LOCAL = [*COMMANDS, *OTHERS, *MODELS]


def row(fault: str, command: str, tally: Tally, seconds: float) -> str:
    """A line of the table."""
    return (
        f"{fault:28} {command:20} {tally.injected:8} {tally.runs:6} {tally.identical:10} {tally.lost:5} {tally.wrong_codes:6} "
        f"{len(tally.problems):9} {seconds:7.0f} s"
    )


class Table:
    """Runs faults, prints a line for each with a command, and adds them up."""

    def __init__(self, faults: list[str], commands: list[str]) -> None:
        self.total = Tally()
        self.passed = True
        self._faults = faults
        self._commands = commands
        print(
            f"{'fault':28} {'command':20} {'injected':>8} {'runs':>6} {'identical':>10} {'lost':>5} {'codes':>6} {'problems':>9}",
            flush=True,
        )

    def wants(self, fault: str) -> bool:
        """Whether a fault is among those that were asked for."""
        return fault.replace(",", "") in self._faults

    def asked(self, commands: list[str]) -> list[str]:
        """Those of the commands that were asked for."""
        return [command for command in commands if command.replace(",", "") in self._commands]

    def run(self, fault: str, command: str, inject: Callable[[], Tally]) -> None:
        """Run the faults of a kind in a command, if they were asked for."""
        if not self.wants(fault):
            return
        began = time.monotonic()
        tally = inject()
        print(
            row(fault, command, tally, time.monotonic() - began),
            *tally.problems[:5],
            sep="\n    ",
            flush=True,
        )
        self.passed = self.passed and tally.passed
        self.total.add(tally)


def disturb_calls(table: Table, home: Path, every: int, kills: int, seed: str) -> None:
    """Faults of the machine, and kills at random."""
    bench = Bench(home / "bench", shim.server(*MODEL_MODULES))
    for command in table.asked(LOCAL):
        case = bench.case(command)
        directory = home / command.replace(" ", "-")
        directory.mkdir()
        trial = Trial(case, directory, recorded(case, directory), every, random.Random(seed))
        for fault, inject in survival_calls.FAULTS.items():
            table.run(fault, command, lambda inject=inject, trial=trial: inject(trial))
        table.run(
            RANDOM,
            command,
            lambda trial=trial: survival_calls.killed_at_random(
                trial.case, trial.home, kills, trial.rng
            ),
        )


def disturb_servers(table: Table, home: Path, every: int, kills: int, seed: str) -> None:
    """Faults of servers, and kills at random."""
    commands = table.asked([*survival_servers.COMMANDS])
    with survival_servers.services(home / "servers", every, seed, commands) as services:
        for command, service in services:
            for fault, inject in survival_servers.KINDS.items():
                if fault not in survival_servers.NOT_THERE.get(command, ()):
                    table.run(
                        fault, command, lambda inject=inject, service=service: inject(service)
                    )
            table.run(
                RANDOM,
                command,
                lambda service=service: survival_servers.killed_at_random(service, kills),
            )


def disturb_workers(table: Table, home: Path, kills: int, seed: str) -> None:
    """Faults of workers."""
    for verb, make in BENCHES.items():
        if not table.asked([command := f"{verb} on workers"]):
            continue
        directory = home / command.replace(" ", "-")
        directory.mkdir()
        crew = survival_workers.Crew(make(directory), directory, kills, random.Random(seed))
        for fault, inject in survival_workers.KINDS.items():
            table.run(fault, command, lambda inject=inject, crew=crew: inject(crew))


def main() -> int:
    """Run all, print the table, and fail if anything was lost, differs, or ended with a wrong code."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    machine, servers, workers = (
        [f.replace(",", "") for f in faults]
        for faults in (
            [*survival_calls.FAULTS, RANDOM],
            survival_servers.KINDS,
            survival_workers.KINDS,
        )
    )
    commands = [
        *LOCAL,
        *(c.replace(",", "") for c in survival_servers.COMMANDS),
        *(f"{command} on workers" for command in BENCHES),
    ]
    parser.add_argument("--runs", type=int, default=20, help="random kills of each command")
    parser.add_argument(
        "--worker-runs", type=int, default=20, help="random kills of each kind among workers"
    )
    parser.add_argument(
        "--every",
        type=int,
        default=1,
        help="of the calls and requests, only each n-th is disturbed",
    )
    parser.add_argument("--commands", default=",".join(commands))
    parser.add_argument("--faults", default=",".join((*machine, *servers, *workers)))
    parser.add_argument("--seed", default="0")
    args = parser.parse_args()
    faults = set(args.faults.split(","))
    if faults & {*machine} and not shim.AVAILABLE:
        raise SystemExit(
            "survival.py needs a C compiler: install one, or set PATH so that cc is found"
        )
    with tempfile.TemporaryDirectory(prefix="survival-") as place:
        table = Table(args.faults.split(","), args.commands.split(","))
        home = Path(place)
        if faults & {*machine}:
            disturb_calls(table, home, args.every, args.runs, args.seed)
        if faults & {RANDOM, *servers}:
            disturb_servers(table, home, args.every, args.runs, args.seed)
        if faults & {*workers}:
            disturb_workers(table, home, args.worker_runs, args.seed)
    print(row("all", "", table.total, 0).removesuffix("0 s"))
    return not table.passed


if __name__ == "__main__":
    sys.exit(main())
