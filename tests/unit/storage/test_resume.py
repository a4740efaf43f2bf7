"""An interrupted run is taken up where it stopped, or begun anew: which of both, and that it ends in the same bytes."""

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import tree_digest
from transactions import (
    DATA,
    INDEX,
    Case,
    Killed,
    carry_out,
    check_whole,
    copied_at,
    interrupt,
    refusal,
)

import streamer
from streamer.errors import InputChangedError, OutputExistsError
from streamer.storage.transaction import (
    JOURNAL_NAME,
    LOCK_NAME,
    RECORD_NAME,
    Journal,
    inspect_output,
)


@pytest.mark.parametrize("until", list(DATA)[1:])
def test_an_interrupted_run_is_resumed(case: Case, until: str) -> None:
    interrupt(case, until)
    assert not (case.out / INDEX).exists()
    assert not (case.out / LOCK_NAME).exists()
    assert inspect_output(case.plan) == "resume"
    done = list(DATA).index(until)
    assert carry_out(case) == list(DATA)[done:]
    check_whole(case)


@pytest.mark.parametrize("call", ["fsync", "rename", "pwrite", "unlink"])
def test_a_run_killed_at_any_call_resumes(case: Case, call: str) -> None:
    """Before each call and right after it, as from outside: the state on disk is copied, and a fresh run goes on from it."""
    with copied_at(case.out, call, after=True) as copies:
        carry_out(case)
    assert len(copies) >= 2
    whole = tree_digest(case.out)
    shutil.rmtree(case.out)
    for copy in copies:
        again = dataclasses.replace(case, plan=dataclasses.replace(case.plan, path=copy))
        present = {name for name in DATA if (copy / name).exists()}
        for name in present:  # P1: what has its name is whole
            assert (copy / name).read_bytes() == DATA[name]
        if INDEX in present:
            assert present == set(DATA)
        if inspect_output(again.plan) != "done":
            carry_out(again)
        (copy / LOCK_NAME).unlink(missing_ok=True)  # of the process that was killed last of all
        assert tree_digest(copy) == whole, copy
        shutil.rmtree(copy)


@pytest.mark.parametrize("name", ["out", "one.safetensors"])
def test_the_public_writer_killed_at_any_call_starts_over(tmp_path: Path, name: str) -> None:
    """Before each call: what has a final name is whole, an index has its shards, the same call starts over."""
    home = tmp_path / "home"
    home.mkdir()

    def write(where: Path) -> None:
        tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(2)}
        entries = [(n, t.dtype, t.shape) for n, t in tensors.items()]
        streamer.write_safetensors(where / name, entries, iter(tensors.items()), max_shard_bytes=40)

    with copied_at(home, "write", "pwrite", "fsync", "rename") as copies:
        write(home)
    whole = tree_digest(home)
    assert len(copies) >= (6 if name == "out" else 4)
    for copy in copies:
        found = {
            n: digest for n, digest in tree_digest(copy).items() if not Path(n).name.startswith(".")
        }
        assert found.items() <= whole.items(), copy
        assert "out/model.safetensors.index.json" not in found or whole.keys() - found.keys() <= {
            f"out/{RECORD_NAME}"
        }
        with contextlib.suppress(OutputExistsError):
            write(copy)
        for lock in copy.rglob(".*.lock"):
            lock.unlink()  # of the process that was killed last of all
        assert tree_digest(copy) == whole, copy


def test_a_kill_between_rename_and_anything_else(case: Case) -> None:
    """The journal knows a file before it has its name: a name without its entry is written again, an entry without name too."""
    interrupt(case)
    (case.out / "model-1").unlink()
    assert carry_out(case) == ["model-1", "model-2", INDEX]
    check_whole(case)


def test_a_finished_file_counts_by_its_digest(case: Case) -> None:
    interrupt(case)
    (case.out / "model-1").write_bytes(bytes(100))  # the size is right
    (case.out / "model-2").write_bytes(DATA["model-2"])  # right, but not in the journal
    assert carry_out(case) == ["model-1", "model-2", INDEX]
    check_whole(case)


def test_changed_stamps_stop_a_resume(case: Case) -> None:
    interrupt(case)
    changed = dataclasses.replace(case.plan, stamps={"base/x": (1, 2, 3, 5)})
    message = refusal(InputChangedError, case, changed)
    words = "an input was modified since this run was interrupted; --no-resume starts it over"
    assert message == f"{case.out}: {words}"
    assert carry_out(case, changed, resume=False) == list(DATA)
    check_whole(case)


def test_findings_with_other_last_bits_restart_only_an_interrupted_run(case: Case) -> None:
    """A finished output is the same; an interrupted run is started over, and no output mixes two."""
    plans = [dataclasses.replace(case.plan, bits=bits) for bits in ("one", "two")]
    interrupt(case, plan=plans[0])
    assert inspect_output(plans[0]) == "resume"
    assert inspect_output(plans[1]) == "new"
    assert carry_out(case, plans[1]) == list(DATA)
    assert [inspect_output(plan) for plan in plans] == ["done", "done"]


def test_starting_over_keeps_a_finished_output(case: Case) -> None:
    """A run killed at its very end has its record; with changed inputs, its files stay until the others are made."""
    carry_out(case)
    journal = Journal(case.out / JOURNAL_NAME)
    journal.append(json.dumps({"plan": "digest", "stamps": {"base/x": [0]}}).encode())
    journal.close()
    with pytest.raises(Killed):
        carry_out(case, until="model-2", resume=False)
    assert {name: (case.out / name).read_bytes() for name in DATA} == DATA
    assert (case.out / RECORD_NAME).exists()
    carry_out(case)
    check_whole(case)


def test_a_kill_while_starting_over_keeps_the_journal(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each call of the start over there is the old head or the new one; no journal would make our files foreign ones."""
    interrupt(case)
    before = case.out.parent / "before"
    shutil.copytree(case.out, before)
    for call in ("open", "write", "pwrite", "ftruncate", "fsync", "rename"):
        for nth in range(1, 4):
            shutil.rmtree(case.out)
            shutil.copytree(before, case.out)
            real = getattr(os, call)
            calls = []

            def dies(
                *args: object,
                nth: int = nth,
                real=real,
                calls: list[object] = calls,
                **kwargs: object,
            ) -> object:
                calls.append(args)
                if len(calls) == nth:
                    raise Killed
                return real(*args, **kwargs)

            with monkeypatch.context() as m, contextlib.suppress(Killed):
                m.setattr(os, call, dies)
                carry_out(case, resume=False)
            if inspect_output(case.plan, resume=False) != "done":
                assert carry_out(case, resume=False) == list(DATA)
            check_whole(case)


@pytest.mark.parametrize("torn", [b"", b"\0" * 40, b"\xff" * 60, b"\xff" * 39])
def test_a_journal_torn_before_the_run_did_anything(case: Case, torn: bytes) -> None:
    case.out.mkdir()
    (case.out / JOURNAL_NAME).write_bytes(torn)
    assert inspect_output(case.plan) == "new"
    carry_out(case)
    check_whole(case)


@pytest.mark.parametrize("head", [b"not json", b"[]", b'{"plan": NaN}', b"\xff"])
def test_a_journal_of_another_plan_is_not_resumed(case: Case, head: bytes) -> None:
    """Whole, but no head of ours: as good as torn, and what stands beside it is foreign."""
    case.out.mkdir()
    journal = Journal(case.out / JOURNAL_NAME)
    journal.append(head)
    journal.close()
    assert inspect_output(case.plan) == "new"
    (case.out / "model-1").touch()  # made beforehand: taken like none
    assert inspect_output(case.plan) == "new"
    (case.out / "model-1").write_bytes(b"mine")
    assert "model-1: exists and is not ours" in refusal(OutputExistsError, case)


def test_an_input_whose_path_is_not_utf_8(case: Case) -> None:
    """Such a path is in the journal's head with lone surrogates; the run is known again all the same."""
    case = dataclasses.replace(
        case, plan=dataclasses.replace(case.plan, stamps={os.fsdecode(b"base/\xff"): (1, 2)})
    )
    interrupt(case)
    assert inspect_output(case.plan) == "resume"
    carry_out(case)
    check_whole(case)


def test_partials_of_a_killed_run_are_removed(case: Case) -> None:
    interrupt(case)
    own = [
        case.out / f".model-2.{'0' * 16}.partial",
        case.out / "sub" / f".config.json.{'1' * 16}.partial",
    ]
    foreign = [case.out / f".other.{'0' * 16}.partial", case.out / ".model-2.partial"]
    for path in (*own, *foreign):
        path.write_bytes(b"half")
    carry_out(case)
    assert not any(p.exists() for p in own)
    assert all(p.read_bytes() == b"half" for p in foreign)
