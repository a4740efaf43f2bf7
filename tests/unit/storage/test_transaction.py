"""An output directory as one transaction: what may be begun, what is taken up, what is refused and left as it is."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import tree_digest

from streamer.errors import InputChangedError, LockedError, OutputError, OutputExistsError, StorageError, StreamerError
from streamer.storage.atomic_file import AtomicFile
from streamer.storage.journal import Journal
from streamer.storage.lock import locked
from streamer.storage.output_checks import check_place, check_space
from streamer.storage.output_plan import (
    JOURNAL_NAME,
    LOCK_NAME,
    RECORD_NAME,
    OutputPlan,
    finished_record,
    inspect_output,
)
from streamer.storage.transaction import OutputDirectory, open_outputs

DATA = {
    "sub/config.json": b"{}",
    "model-1": bytes(range(100)),
    "model-2": b"\x01" * 50,
    "index.json": b'{"weight_map": {}}',
}
INDEX = "index.json"


@dataclasses.dataclass
class Case:
    """A plan and its input directory."""

    base: Path
    plan: OutputPlan

    @property
    def out(self) -> Path:
        return self.plan.path

    def other(self, digest: str = "another") -> OutputPlan:
        """Another plan for the same place."""
        return dataclasses.replace(self.plan, digest=digest)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    base = tmp_path / "base"
    (base / "sub").mkdir(parents=True)
    (base / "sub" / "config.json").write_bytes(DATA["sub/config.json"])
    files = tuple((name, len(data)) for name, data in DATA.items())
    plan = OutputPlan(tmp_path / "out", files, "digest", {"base/x": (1, 2, 3, 4)}, (base,), ("model.safetensors",))
    return Case(base, plan)


class Killed(BaseException):
    """The process ends here: nothing that runs afterwards may be counted on."""


def nothing() -> None:
    """Before a rename."""


def carry_out(case: Case, plan: OutputPlan | None = None, until: str = "", **options: bool) -> list[str]:
    """Carry a plan out, up to the file `until`; the names that were written."""
    written = []
    with open_outputs([plan or case.plan], **options) as (out,):
        for name, data in DATA.items():
            if name == until:
                raise Killed
            if out.finished(name) is None:
                put(out, case, name, data)
                written.append(name)
            assert out.entry(name)["bytes"] == len(data)
        out.commit({"schema": "streamer.output/2", "made": "here"})
    return written


def put(out: OutputDirectory, case: Case, name: str, data: bytes, check: Callable[[], None] = nothing) -> None:
    if (case.base / name).exists():
        out.copy(name, case.base / name, check)
    else:
        out.write(name, data, check)


def interrupt(case: Case, until: str = "model-2", plan: OutputPlan | None = None) -> None:
    with pytest.raises(Killed):
        carry_out(case, plan, until)
    assert (case.out / JOURNAL_NAME).exists()


def run(begin: Callable[..., object], plan: OutputPlan, overwrite: bool = False, resume: bool = True) -> None:
    if begin is open_outputs:
        with open_outputs([plan], overwrite, resume):
            raise AssertionError("begun")
    begin(plan, overwrite, resume)


def refusal(kind: type[StreamerError], case: Case, plan: OutputPlan | None = None, **options: bool) -> str:
    """The one line of a refusal, by the preflight and under the lock alike; neither touches what is there."""
    before = tree_digest(case.out.parent)
    messages = set()
    for begin in (inspect_output, open_outputs):
        with pytest.raises(kind) as caught:
            run(begin, plan or case.plan, **options)
        assert type(caught.value) is kind
        messages.add(str(caught.value))
    assert tree_digest(case.out.parent) == before
    (message,) = messages
    assert "\n" not in message
    return message


def check_whole(case: Case, digest: str = "digest") -> None:
    assert {n: (case.out / n).read_bytes() for n in DATA} == DATA
    assert tree_digest(case.out).keys() == {*DATA, RECORD_NAME}
    assert json.loads((case.out / RECORD_NAME).read_text())["plan"] == digest


# From nothing to done -----------------------------------------------------------------------------------------------


def test_new_then_done(case: Case) -> None:
    assert inspect_output(case.plan) == "new"
    assert not case.out.exists()
    assert carry_out(case) == list(DATA)
    check_whole(case)
    assert inspect_output(case.plan) == "done"
    record = finished_record(case.plan)
    assert record["made"] == "here"
    assert [(f["file"], f["bytes"]) for f in record["files"]] == list(case.plan.files)
    before = tree_digest(case.out)
    with pytest.raises(OutputError, match="another run has just finished this output; run the command again to see it"):
        carry_out(case)
    assert tree_digest(case.out) == before


def test_a_finished_output_is_known_by_its_plan_alone(case: Case) -> None:
    """Not by stamps: the inputs may have been copied since; their bytes decide."""
    carry_out(case)
    assert inspect_output(dataclasses.replace(case.plan, stamps={})) == "done"
    assert inspect_output(case.plan, resume=False) == "done"
    assert inspect_output(case.plan, overwrite=True) == "new"


@pytest.mark.parametrize("name", DATA)
def test_a_finished_output_that_lost_a_file(case: Case, name: str) -> None:
    carry_out(case)
    (case.out / name).write_bytes(b"short")
    words = "; remove it to have the output made again, choose another output, or pass --overwrite"
    message = refusal(OutputExistsError, case)
    assert message.startswith(
        f"{case.out / name}: was changed since it was written, expected {len(DATA[name])} B, found "
    )
    assert message.endswith(words)
    (case.out / name).unlink()
    assert inspect_output(case.plan) == "new"
    assert carry_out(case) == list(DATA)
    check_whole(case)


def test_the_commit_point_comes_last(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real = os.rename

    def rename(source: object, target: os.PathLike[str]) -> None:
        order.append(Path(target).name)
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    carry_out(case)
    assert order == ["config.json", "model-1", "model-2", INDEX, RECORD_NAME]


def test_the_record_is_the_same_whatever_the_way(case: Case) -> None:
    """P3, P14: no times, no host, no trace of an interruption."""
    carry_out(case)
    whole = tree_digest(case.out)
    shutil.rmtree(case.out)
    interrupt(case)
    carry_out(case)
    assert tree_digest(case.out) == whole


def test_an_existing_empty_directory_is_taken(case: Case) -> None:
    case.out.mkdir()
    (case.out / "notes.txt").write_text("mine")
    assert inspect_output(case.plan) == "new"
    carry_out(case)
    assert (case.out / "notes.txt").read_text() == "mine"


# Taking up ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("until", list(DATA)[1:])
def test_an_interrupted_run_is_taken_up(case: Case, until: str) -> None:
    interrupt(case, until)
    assert not (case.out / INDEX).exists()
    assert not (case.out / LOCK_NAME).exists()
    assert inspect_output(case.plan) == "resume"
    done = list(DATA).index(until)
    assert carry_out(case) == list(DATA)[done:]
    check_whole(case)


@pytest.mark.parametrize("call", ["fsync", "rename", "pwrite", "unlink"])
def test_killed_at_any_call(case: Case, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Before each call and right after it, as from outside: the state on disk is copied, and a fresh run goes on from it."""
    real = getattr(os, call)
    copies: list[Path] = []

    def keep() -> None:
        copies.append(shutil.copytree(case.out, case.out.parent / f"copy{len(copies)}", symlinks=True))

    def watched(*args: object, **kwargs: object) -> object:
        if case.out.exists():
            keep()
        result = real(*args, **kwargs)
        if case.out.exists():
            keep()
        return result

    with monkeypatch.context() as m:
        m.setattr(os, call, watched)
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


def test_starting_over(case: Case) -> None:
    interrupt(case)
    assert inspect_output(case.plan, resume=False) == "new"
    assert carry_out(case, resume=False) == list(DATA)
    check_whole(case)


def test_other_last_bits(case: Case) -> None:
    """A finished output is the same; an interrupted run is started over, and no output mixes two."""
    plans = [dataclasses.replace(case.plan, bits=bits) for bits in ("one", "two")]
    interrupt(case, plan=plans[0])
    assert inspect_output(plans[0]) == "resume"
    assert inspect_output(plans[1]) == "new"
    assert carry_out(case, plans[1]) == list(DATA)
    assert [inspect_output(plan) for plan in plans] == ["done", "done"]


def test_starting_over_removes_the_commit_point_first(case: Case) -> None:
    """A run killed at its very end has its commit point; with changed inputs its shards are about to be others."""
    carry_out(case)
    journal = Journal(case.out / JOURNAL_NAME)
    journal.append(json.dumps({"plan": "digest", "stamps": {"base/x": [0]}}).encode())
    journal.close()
    with pytest.raises(Killed):
        carry_out(case, until="model-2", resume=False)
    assert not (case.out / INDEX).exists()
    assert not (case.out / RECORD_NAME).exists()
    carry_out(case)
    check_whole(case)


def test_a_kill_while_starting_over_keeps_the_journal(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each call of the start over there is the old head or the new one; no journal would make our files foreign ones."""
    interrupt(case)
    before = case.out.parent / "before"
    shutil.copytree(case.out, before)
    for call in ("open", "write", "pwrite", "ftruncate", "fsync", "rename"):
        for nth in range(1, 4):
            shutil.rmtree(case.out)
            shutil.copytree(before, case.out)
            real, calls = getattr(os, call), []

            def dies(*args: object, nth: int = nth, real=real, calls: list[object] = calls, **kwargs: object) -> object:
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
def test_a_journal_of_something_else(case: Case, head: bytes) -> None:
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
    case = dataclasses.replace(case, plan=dataclasses.replace(case.plan, stamps={os.fsdecode(b"base/\xff"): (1, 2)}))
    interrupt(case)
    assert inspect_output(case.plan) == "resume"
    carry_out(case)
    check_whole(case)


def test_partials_of_a_killed_run_are_removed(case: Case) -> None:
    interrupt(case)
    own = [case.out / f".model-2.{'0' * 16}.partial", case.out / "sub" / f".config.json.{'1' * 16}.partial"]
    foreign = [case.out / f".other.{'0' * 16}.partial", case.out / ".model-2.partial"]
    for path in (*own, *foreign):
        path.write_bytes(b"half")
    carry_out(case)
    assert not any(p.exists() for p in own)
    assert all(p.read_bytes() == b"half" for p in foreign)


# Refused ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*DATA, "model.safetensors"])
def test_a_foreign_file_is_kept(case: Case, name: str) -> None:
    """A final name, or one that a loader would prefer to ours."""
    path = case.out / name
    path.parent.mkdir(parents=True)
    path.write_bytes(DATA.get(name, b"foreign"))
    expected = f"{path}: exists and is not ours; choose another output, or move it away"
    assert refusal(OutputExistsError, case) == expected
    assert refusal(OutputExistsError, case, overwrite=True) == expected
    assert OutputError.exit_code == 4
    path.unlink()
    assert carry_out(case, overwrite=True) == list(DATA)
    check_whole(case)


def test_a_file_for_users_to_edit(case: Case) -> None:
    """Edited, the output is whole as it stands; and no run replaces it, be it anew or taken up."""
    case.plan = dataclasses.replace(case.plan, editable=frozenset({"model-1"}), instead={"model-1": "pass --none"})
    path = case.out / "model-1"
    ways = "choose another output, move it away, or pass --none"
    carry_out(case)
    path.write_bytes(b"edited")
    assert inspect_output(case.plan) == "done"
    expected = f"{path}: was edited since it was written; {ways}"
    assert refusal(OutputExistsError, case, overwrite=True) == expected
    (case.out / "model-2").unlink()
    assert refusal(OutputExistsError, case) == expected
    path.unlink()
    interrupt(case)
    path.write_bytes(b"edited")
    for options in ({}, {"resume": False}):
        assert refusal(OutputExistsError, case, **options) == expected
    shutil.rmtree(case.out)
    case.out.mkdir()
    path.write_bytes(b"foreign")
    assert refusal(OutputExistsError, case) == f"{path}: exists and is not ours; {ways}"


@pytest.mark.parametrize("name", [*DATA, "model.safetensors"])
def test_a_foreign_file_beside_another_output_is_kept(case: Case, name: str) -> None:
    """Neither the old record nor an interrupted run's journal names it."""
    old = dataclasses.replace(case.plan, files=(("old", 3),), digest="old", conflicting_names=())
    with open_outputs([old]) as (out,):
        out.write("old", b"old", nothing)
        out.commit({"schema": "streamer.output/2"})
    with pytest.raises(Killed):
        carry_out(case, until="sub/config.json", overwrite=True)
    (case.out / name).parent.mkdir(exist_ok=True)
    (case.out / name).write_bytes(b"foreign")
    words = "exists and is not ours; choose another output, or move it away"
    assert refusal(OutputExistsError, case, case.other(), overwrite=True) == f"{case.out / name}: {words}"


def test_a_rival_of_the_old_output_goes_unless_it_was_changed(case: Case) -> None:
    rival = case.out / "model.safetensors"
    old = dataclasses.replace(case.plan, files=((rival.name, 3),), digest="old", conflicting_names=())
    for changed in (False, True):
        with open_outputs([old]) as (out,):
            out.write(rival.name, b"old", nothing)
            out.commit({"schema": "streamer.output/2"})
        if changed:
            rival.write_bytes(b"new")
            message = refusal(OutputExistsError, case, overwrite=True)
            assert message.startswith(
                f"{rival}: was changed since it was written, and a loader would take it for a part"
            )
        else:
            carry_out(case, overwrite=True)
            check_whole(case)
            shutil.rmtree(case.out)


@pytest.mark.parametrize("record", [b"not json", b"{}", b"[]", b'{"plan": "other"}'])
def test_a_foreign_record_is_kept(case: Case, record: bytes) -> None:
    case.out.mkdir()
    (case.out / RECORD_NAME).write_bytes(record)
    words = "exists and is not ours; choose another output, or move it away"
    for overwrite in (False, True):
        assert refusal(OutputExistsError, case, overwrite=overwrite) == f"{case.out / RECORD_NAME}: {words}"


def test_another_output_is_kept(case: Case) -> None:
    carry_out(case)
    words = "holds another output; choose another directory, or pass --overwrite"
    assert refusal(OutputExistsError, case, case.other()) == f"{case.out}: {words}"
    carry_out(case, case.other(), overwrite=True)
    check_whole(case, "another")


def test_the_interrupted_run_of_another_plan_is_kept(case: Case) -> None:
    interrupt(case)
    for options in ({}, {"resume": False}):
        message = refusal(OutputExistsError, case, case.other(), **options)
        assert message == (
            f"{case.out}: holds an interrupted run with other inputs or options; finish that one, "
            "choose another output, or pass --overwrite"
        )
    assert carry_out(case, case.other(), overwrite=True) == list(DATA)
    check_whole(case, "another")


def test_overwriting_removes_the_old_commit_point_first(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    carry_out(case)
    (case.out / "model.safetensors").touch()
    removed: list[str] = []
    real = Path.unlink

    def unlink(self: Path, missing_ok: bool = False) -> None:
        removed.append(self.name)
        assert (case.out / JOURNAL_NAME).exists() == (self.name != INDEX)  # a kill from here on leaves a run to take up
        real(self, missing_ok)

    with monkeypatch.context() as m:
        m.setattr(Path, "unlink", unlink)
        with pytest.raises(Killed):
            carry_out(case, case.other(), until="sub/config.json", overwrite=True)
    assert removed == [INDEX, "model.safetensors", RECORD_NAME]
    assert (case.out / "model-1").read_bytes() == DATA["model-1"]
    assert carry_out(case, case.other(), overwrite=True) == list(DATA)
    check_whole(case, "another")


def test_an_interrupted_overwrite_is_taken_up_with_or_without_the_option(case: Case) -> None:
    for options in ({}, {"overwrite": True}):
        carry_out(case, overwrite=True)
        with pytest.raises(Killed):
            carry_out(case, case.other(), until="model-2", overwrite=True)
        assert inspect_output(case.other(), **options) == "resume"
        assert carry_out(case, case.other(), **options) == ["model-2", INDEX]
        check_whole(case, "another")


@pytest.mark.parametrize("name", [*DATA, "sub", RECORD_NAME, JOURNAL_NAME, LOCK_NAME])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_symlink_at_a_final_name(case: Case, name: str, overwrite: bool) -> None:
    """Dangling or not: never followed, never replaced without a word."""
    path = case.out / name
    path.parent.mkdir(parents=True)
    path.symlink_to(case.base / "precious", target_is_directory=name == "sub")
    at = case.out / "sub/config.json" if name == "sub" else path
    for begin in (inspect_output, open_outputs):
        with pytest.raises(OutputError, match="symlink") as caught:
            run(begin, case.plan, overwrite)
        words = "is a symlink, and writing never follows one; remove it"
        if not (begin is open_outputs and name == LOCK_NAME):
            assert str(caught.value) == f"{at}: {words}"
    assert path.is_symlink()
    assert not (case.base / "precious").exists()


def test_an_output_that_is_a_symlink(case: Case, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    case.out.symlink_to("real")
    message = refusal(OutputError, case)
    assert message == f"{case.out}: is a symlink, and writing never follows one; name its target {tmp_path}/real"
    (tmp_path / "real").rmdir()
    assert "is a symlink" in refusal(OutputError, case)
    assert not (tmp_path / "real").exists()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("base", "is the input {base}; choose another output"),
        ("base/../base", "is the input {base}; choose another output"),
        ("link", "is a symlink, and writing never follows one; name its target {base}"),
        ("base/out", "lies inside the input {base}; choose an output outside it"),
        ("base/sub/new/out", "lies inside the input {base}; choose an output outside it"),
        ("link/out", "lies inside the input {base}; choose an output outside it"),
        (".", "contains the input {base}; choose an output beside it"),
        ("base/sub/../../out/..", "contains the input {base}; choose an output beside it"),
        ("hub/models--x--y/snapshots/0f", "lies inside a hub cache, where nothing is written; choose another output"),
        ("hub/models--x--y", "lies inside a hub cache, where nothing is written; choose another output"),
        ("hub/datasets--x/new", "lies inside a hub cache, where nothing is written; choose another output"),
        ("cache/0f/out", "lies inside a hub cache, where nothing is written; choose another output"),
        ("file", "is not a directory; choose another output"),
        ("file/out", "{out.parent} is not a directory; choose another output"),
    ],
)
def test_places_where_nothing_is_written(case: Case, tmp_path: Path, place: str, words: str) -> None:
    (tmp_path / "link").symlink_to("base")
    (tmp_path / "hub" / "models--x--y" / "snapshots").mkdir(parents=True)
    (tmp_path / "hub" / "datasets--x" / "blobs").mkdir(parents=True)
    (tmp_path / "cache").symlink_to("hub/models--x--y/snapshots")
    (tmp_path / "file").write_bytes(b"mine")
    out = tmp_path / place
    plan = dataclasses.replace(case.plan, path=out)
    before = sorted(tmp_path.rglob("*"))
    for overwrite in (False, True):
        for begin in (inspect_output, open_outputs):
            with pytest.raises(OutputError) as caught:
                run(begin, plan, overwrite)
            assert str(caught.value) == f"{out}: {words.format(base=case.base, out=out)}"
    assert sorted(tmp_path.rglob("*")) == before


def test_an_input_that_is_one_file(case: Case, tmp_path: Path) -> None:
    (tmp_path / "one" / "two").mkdir(parents=True)
    (tmp_path / "one" / "model.safetensors").touch()
    inputs = (tmp_path / "one" / "model.safetensors",)
    with pytest.raises(OutputError, match="contains the input"):
        check_place(tmp_path / "one", inputs)
    check_place(tmp_path / "one" / "two", inputs)
    check_place(tmp_path / "three", inputs)


def test_one_directory_under_two_names(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As under a second mount: known by device and inode, in both directions."""
    (tmp_path / "mount" / "base").mkdir(parents=True)
    real = Path.samefile
    pairs = {(tmp_path / "mount" / "base", case.base), (case.base, tmp_path / "mount" / "base")}
    monkeypatch.setattr(Path, "samefile", lambda a, b: (a, Path(b)) in pairs or real(a, b))
    with pytest.raises(OutputError, match="is the input"):
        check_place(tmp_path / "mount" / "base", case.plan.inputs)
    with pytest.raises(OutputError, match="lies inside the input"):
        check_place(tmp_path / "mount" / "base" / "out", case.plan.inputs)
    with pytest.raises(OutputError, match="contains the input"):
        check_place(case.base, (tmp_path / "mount" / "base" / "model.safetensors",))


def test_a_place_that_is_not_writable(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    words = f"{case.out}: {case.out.parent} is not writable; choose another output"
    assert refusal(OutputError, case) == words


def test_another_run_at_work(case: Case) -> None:
    case.out.mkdir()
    with locked(case.out / LOCK_NAME):
        assert inspect_output(case.plan) == "new"
        with pytest.raises(LockedError, match="another run is writing here"):
            carry_out(case)
    assert carry_out(case) == list(DATA)


# Space --------------------------------------------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


def test_a_plan_that_does_not_fit(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    need = case.plan.total_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(need, 1, need - 1))
    words = f"needs {need} B, the disk has {need - 1} B free; free some space, or choose another disk"
    with pytest.raises(StorageError) as caught:
        inspect_output(case.plan)
    assert str(caught.value) == f"{case.out}: {words}"
    assert caught.value.exit_code == 6
    assert not case.out.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(need, 0, need))
    assert inspect_output(case.plan) == "new"


def test_a_real_disk(case: Case) -> None:
    check_space(case.out, 1)
    with pytest.raises(StorageError, match="free some space"):
        check_space(case.out / "not" / "there", 1 << 62)


def test_a_resume_needs_room_for_the_rest_only(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(case)
    rest = len(DATA["model-2"]) + len(DATA[INDEX])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, rest))
    assert inspect_output(case.plan) == "resume"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, rest - 1))
    with pytest.raises(StorageError, match=f"needs {rest} B, the disk has {rest - 1} B free"):
        inspect_output(case.plan)


def test_what_a_killed_run_holds_in_partials_is_free(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are removed first: without counting them a run on a nearly full disk could not be taken up."""
    interrupt(case)
    (case.out / f".model-2.{'0' * 16}.partial").write_bytes(bytes(8192))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 0))
    assert inspect_output(case.plan) == "resume"
    assert inspect_output(case.plan, resume=False) == "new"


# Failures while writing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync", "rename", "posix_fallocate"])
def test_a_system_that_refuses(case: Case, monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    """Stops cleanly, keeps what is finished, and the same run finishes later."""
    interrupt(case)

    def refuse(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as m:
        m.setattr(os, call, refuse)
        with pytest.raises(StorageError, match=os.strerror(number)):
            carry_out(case)
    assert sorted(p.name for p in case.out.iterdir()) == [JOURNAL_NAME, "model-1", "sub"]
    assert carry_out(case) == ["model-2", INDEX]
    check_whole(case)


def test_a_check_before_the_rename_stops_it(case: Case) -> None:
    def changed() -> None:
        raise InputChangedError("changed")

    def write() -> None:
        with open_outputs([case.plan]) as (out,):
            put(out, case, "sub/config.json", b"", changed)

    with pytest.raises(InputChangedError, match="changed"):
        write()
    assert list((case.out / "sub").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b"{}\n"])
def test_a_copied_file_that_changed_its_size(case: Case, content: bytes) -> None:
    source = case.base / "sub" / "config.json"
    source.write_bytes(content)
    with pytest.raises(InputChangedError) as caught:
        carry_out(case)
    words = f"expected 2 B, found {len(content)} B: it changed during the run; start again"
    assert str(caught.value) == f"{source}: {words}"
    assert list((case.out / "sub").iterdir()) == []


def test_a_copied_file_that_vanished(case: Case) -> None:
    def copy() -> None:
        with open_outputs([case.plan]) as (out,):
            out.copy("sub/config.json", case.base / "gone", nothing)

    with pytest.raises(StorageError, match="gone: cannot copy: No such file or directory"):
        copy()


def test_copies_take_the_umasks_mode(case: Case) -> None:
    (case.base / "sub" / "config.json").chmod(0o400)
    old = os.umask(0o027)
    try:
        carry_out(case)
    finally:
        os.umask(old)
    assert {(case.out / n).stat().st_mode & 0o777 for n in (*DATA, RECORD_NAME)} == {0o640}


def test_a_commit_point_that_cannot_be_removed(case: Case) -> None:
    carry_out(case)
    (case.out / INDEX).unlink()
    (case.out / INDEX).mkdir()
    with pytest.raises(StorageError, match=r"index\.json: cannot remove: Is a directory"):
        carry_out(case, overwrite=True)


def test_entries_keep_their_details(case: Case) -> None:
    """What was announced with a file comes back when the run is taken up."""

    def announce() -> None:
        with open_outputs([case.plan]) as (out,):
            with AtomicFile(case.out / "model-1", 100) as f:
                f.write(DATA["model-1"])
            out.announce("model-1", 100, f.sha256, matrices=[{"tensor": "é", "norm": 1.5}])
            raise Killed

    with pytest.raises(Killed):
        announce()
    with open_outputs([case.plan]) as (out,):
        assert out.resumed
        entry = out.finished("model-1")
        assert entry is not None
        assert entry["matrices"] == [{"tensor": "é", "norm": 1.5}]
        assert out.finished("model-2") is None


def test_a_killed_process_is_taken_up(case: Case) -> None:
    """A SIGKILL in a process of its own, between a rename and whatever comes next."""
    program = f"""
import os, signal
from pathlib import Path
from streamer.storage.output_plan import OutputPlan
from streamer.storage.transaction import open_outputs
plan = OutputPlan(Path({str(case.out)!r}), {case.plan.files!r}, "digest", {case.plan.stamps!r}, ())
real = os.rename
def rename(*args):
    real(*args)
    os.kill(os.getpid(), signal.SIGKILL)
with open_outputs([plan]) as (out,):
    out.write("sub/config.json", b"{{}}", lambda: None)
    os.rename = rename
    out.write("model-1", bytes(range(100)), lambda: None)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    assert done.returncode == -9
    assert {p.name for p in case.out.iterdir()} == {"sub", "model-1", JOURNAL_NAME, LOCK_NAME}
    assert carry_out(case) == ["model-2", INDEX]
    check_whole(case)
