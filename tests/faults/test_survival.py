"""A thin slice of the survival table: every kind of fault, at a few places; `survival.py` makes the whole one."""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path

import pytest
import shim
from forks import MODEL_MODULES, server
from helpers import tree_digest
from jobs import COMMANDS, MODELS, OTHERS, Bench, Case
from powerloss import WAYS, Disk
from seeds import vary
from shim import Call
from survival_calls import FAULTS, killed_at_random
from trials import Tally, Trial, recorded

pytestmark = pytest.mark.skipif(not shim.AVAILABLE, reason="needs a C compiler")

SLICE = 40
"""One call of so many is disturbed."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), shim.server(*MODEL_MODULES))


def trial(bench: Bench, command: str, home: Path, every: int) -> Trial:
    case = bench.case(command)
    return Trial(case, home, recorded(case, home), every, random.Random(vary(command)))


def check(tally: Tally) -> None:
    assert tally.problems == []
    assert (tally.lost, tally.wrong_codes) == (0, 0)
    assert tally.identical == tally.injected


EVERYWHERE = ("kill before a call", "kill inside a write", "EIO", "limit on file size")
"""Faults that are tried in every command."""

SOME = [
    (fault, command)
    for fault in FAULTS
    for command in (
        COMMANDS if fault in EVERYWHERE else ["detect" if fault == "SIGINT" else "merge"]
    )
]


@pytest.mark.long
@pytest.mark.parametrize(("fault", "command"), SOME)
def test_a_sample_of_faults_is_survived(
    bench: Bench, fault: str, command: str, tmp_path: Path
) -> None:
    check(FAULTS[fault](trial(bench, command, tmp_path, SLICE)))


@pytest.mark.long
@pytest.mark.parametrize("command", [*OTHERS, *MODELS])
def test_a_sample_of_faults_is_survived_by_other_outputs(
    bench: Bench, command: str, tmp_path: Path
) -> None:
    for fault in ("kill before a call", "power cut, kept: at random"):
        tally = FAULTS[fault](trial(bench, command, tmp_path, 2 * SLICE))
        assert tally.injected > 0
        check(tally)


@pytest.mark.long
@pytest.mark.parametrize("command", ["merge", "mitigate"])
@pytest.mark.parametrize("way", WAYS)
def test_a_power_cut_while_an_output_is_replaced(
    bench: Bench, tmp_path: Path, command: str, way: str
) -> None:
    """What can be loaded is the old output or the new one, and the same command finishes."""
    case = bench.case(command)
    rng = random.Random(vary(command))
    (commit,) = case.commits()
    recorded = tmp_path / "recorded"
    record = tmp_path / "record"
    assert case.run(recorded, "--lambda", "0.25").code == 0
    old = tree_digest(recorded)
    disk = Disk(recorded)
    read = old.keys() - {"README.md", "streamer.json"}
    assert case.run(recorded, "--overwrite", before=shim.arm(recorded, record=record)).code == 0
    calls = shim.read_record(record)
    found = set()
    for n, call in enumerate(calls):
        disk.apply(call)
        if n % 20 != 3 and n < len(calls) - 20:
            continue
        disk.leave(way, rng, out := tmp_path / str(n))
        loaded = {name: digest for name, digest in tree_digest(out).items() if name in read}
        if commit in loaded:
            states = [state for state in (old, case.whole) if loaded.items() <= state.items()]
            assert states, (n, call)
            assert loaded.keys() == read
            found.add(loaded.items() <= old.items())
        assert case.unfinished(out, "--overwrite") == [], (n, call)
        shutil.rmtree(out)
    assert found == {True, False}


@pytest.mark.long
def test_a_config_that_the_disk_refuses_to_transformers(bench: Bench, tmp_path: Path) -> None:
    """streamer has read it before, so its contents are not at fault."""
    case = bench.case("evaluate")
    out = tmp_path / "out"
    record = tmp_path / "record"
    base = case.inputs[0]
    case.run(out, before=shim.arm(base, shim.FAIL_READ, record=record))
    reads = [Path(call.path).name for call in shim.read_record(record)]
    shutil.rmtree(out)
    last = len(reads) - reads[::-1].index("config.json")
    done = case.run(out, before=shim.arm(base, shim.FAIL_READ, last, errno.EIO))
    assert (done.code, done.err.count("\n")) == (6, 1)
    assert f"config.json: cannot read: {os.strerror(errno.EIO)}" in done.err


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", [*COMMANDS, *OTHERS, *MODELS])
def test_every_fault_is_survived(bench: Bench, command: str, fault: str, tmp_path: Path) -> None:
    check(FAULTS[fault](trial(bench, command, tmp_path, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("command", [*COMMANDS, *OTHERS, *MODELS])
def test_runs_killed_at_random_moments_resume(bench: Bench, command: str, tmp_path: Path) -> None:
    check(killed_at_random(bench.case(command), tmp_path, 100, random.Random(vary(command))))


@pytest.mark.long
def test_nothing_of_a_run_is_missed(bench: Bench, tmp_path: Path) -> None:
    """Replayed with all that was written, the record is the output."""
    one = trial(bench, "merge", tmp_path, 1)
    disk = Disk(tmp_path / "recorded")
    for call in one.calls:
        disk.apply(call)
    for file in disk.names.values():
        file.synced()
    disk.safe_names = disk.names
    disk.leave("nothing", random.Random(vary(0)), tmp_path / "out")
    assert one.case.lost(tmp_path / "out") == []
    assert {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()} == {
        Path(n).name for n in one.case.whole
    }


def test_a_disk_forgets_what_is_not_synced(tmp_path: Path) -> None:
    root = tmp_path / "root"
    a = str(root / "a")
    b = str(root / "b")

    def left(way: str, *calls: Call) -> dict[str, bytes]:
        disk = Disk(root)
        for call in calls:
            disk.apply(call)
        out = tmp_path / f"{way}-{len(list(tmp_path.iterdir()))}"
        disk.leave(way, random.Random(vary(0)), out)
        return {p.name: p.read_bytes() for p in out.iterdir()}

    create = Call("c", a, "", 0, 0, b"")
    write = Call("w", a, "", 0, 3, b"abc")
    sync = Call("s", a, "", 0, 0, b"")
    names = Call("s", str(root), "", 0, 0, b"")
    rename = Call("r", a, b, 0, 0, b"")
    assert left("nothing", create, write, sync) == {}
    assert left("nothing", create, write, names) == {"a": b""}
    assert left("nothing", create, write, sync, names, rename) == {"a": b"abc"}
    assert left("names", create, write, names, rename) == {"b": b"\0\0\0"}
    assert left("names", create, write, sync, rename) == {"b": b"abc"}
    assert left("nothing", create, write, sync, names, Call("t", a, "", 0, 1, b"")) == {"a": b"abc"}
    assert left("names", create, sync, names, Call("e", a, "", 0, 4, b"")) == {"a": bytes(4)}


@pytest.mark.long
@pytest.mark.parametrize("without", ["s", "r"])
def test_the_table_can_fail(bench: Bench, without: str, tmp_path: Path) -> None:
    """A run that did not sync, or that wrote under final names, would be found out."""
    one = trial(bench, "merge", tmp_path, 12)
    calls = one.calls
    if without == "r":
        final = {c.path: c.to for c in calls if c.op == "r"}
        calls = tuple(
            Call(c.op, final.get(c.path, c.path), "", c.offset, c.length, c.data)
            for c in calls
            if c.op != "r"
        )
    else:
        calls = tuple(
            c for c in calls if c.op != "s" or c.path not in {w.path for w in calls if w.op == "w"}
        )
    tally = FAULTS["power cut, kept: names"](Trial(one.case, tmp_path, calls, 12, one.rng))
    assert tally.lost > 0


@pytest.mark.long
def test_a_wrong_code_is_counted(bench: Bench, tmp_path: Path) -> None:
    one = trial(bench, "detect", tmp_path, 1)
    tally = Tally()
    tally.begin(one.run(tmp_path / "out", shim.FAIL, 9, 5).code, {0}, "call 9")
    tally.end(
        Case(one.case.argv, server(), {"findings.safetensors": "another"}),
        tmp_path / "out",
        "call 9",
    )
    assert (tally.injected, tally.wrong_codes, tally.identical) == (1, 1, 0)
    assert len(tally.problems) == 2
