"""What may be replaced: an output's own files, and nothing that the user put there."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

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
    run,
)

import streamer
from streamer.errors import FormatError, LockedError, OutputError, OutputExistsError, StreamerError
from streamer.storage.files import locked
from streamer.storage.transaction import (
    JOURNAL_NAME,
    LOCK_NAME,
    RECORD_NAME,
    STAGE_NAME,
    inspect_output,
    lock_of,
    missing_bytes,
    open_outputs,
)


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
    case.plan = dataclasses.replace(case.plan, editable=frozenset({"model-1"}))
    path = case.out / "model-1"
    ways = "choose another output, or move it away"
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
        with out.file("old", 3) as f:
            f.write(b"old")
        out.commit({"schema": "streamer.output/2"})
    with pytest.raises(Killed):
        carry_out(case, until="sub/config.json", overwrite=True)
    (case.out / name).parent.mkdir(exist_ok=True)
    (case.out / name).write_bytes(b"foreign")
    words = "exists and is not ours; choose another output, or move it away"
    assert (
        refusal(OutputExistsError, case, case.other(), overwrite=True)
        == f"{case.out / name}: {words}"
    )


def test_a_rival_of_the_old_output_goes_unless_it_was_changed(case: Case) -> None:
    rival = case.out / "model.safetensors"
    old = dataclasses.replace(
        case.plan, files=((rival.name, 3),), digest="old", conflicting_names=()
    )
    for changed in (False, True):
        with open_outputs([old]) as (out,):
            with out.file(rival.name, 3) as f:
                f.write(b"old")
            out.commit({"schema": "streamer.output/2"})
        if changed:
            rival.write_bytes(b"new")
            message = refusal(OutputExistsError, case, overwrite=True)
            assert message.startswith(
                f"{rival}: was changed since it was written, and a loader would read it as a part"
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
        assert (
            refusal(OutputExistsError, case, overwrite=overwrite)
            == f"{case.out / RECORD_NAME}: {words}"
        )


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


NEWER = {
    "every file": {
        "sub/config.json": b"{}",
        "model-1": bytes(101),
        "model-2": b"\x02" * 50,
        INDEX: b"{}",
    },
    "one shard": {**DATA, "model-2": b"\x02" * 50},
    "other files": {"sub/config.json": b"{}", "other/model": b"12", "model.safetensors": b"123"},
    "no file": DATA,
}


@pytest.mark.parametrize("what", NEWER)
def test_an_output_stays_until_the_new_one_is_complete(case: Case, what: str) -> None:
    """Killed before and after any call: what can be loaded is the old output or the new one, and the same run finishes."""
    carry_out(case)
    new = NEWER[what]
    if what == "every file":
        (case.base / "sub/config.json").unlink()
    plan = dataclasses.replace(
        case.other(), files=tuple((name, len(data)) for name, data in new.items())
    )
    plan = dataclasses.replace(
        plan, conflicting_names=tuple({INDEX, "model.safetensors"} - new.keys())
    )

    with copied_at(case.out, "fsync", "rename", "pwrite", "rmdir") as copies:
        carry_out(case, plan, contents=new, overwrite=True)
    whole = tree_digest(case.out)
    loaded = set()
    assert whole.keys() == {*new, RECORD_NAME}
    for copy in copies:
        found = {
            str(p.relative_to(copy)): p.read_bytes()
            for p in copy.rglob("*")
            if p.is_file() and p.name[0] != "."
        }
        found = {
            name: data
            for name, data in found.items()
            if name != RECORD_NAME and STAGE_NAME not in name
        }
        if INDEX in found or "model.safetensors" in found:
            assert found in (DATA, new)
            loaded.add(found == new)
        else:
            assert what not in ("one shard", "no file")
        again = dataclasses.replace(plan, path=copy)
        if inspect_output(again, overwrite=(copy / JOURNAL_NAME).exists()) != "done":
            carry_out(case, again, contents=new, overwrite=True)
        (copy / LOCK_NAME).unlink(missing_ok=True)  # of the process that was killed last of all
        assert tree_digest(copy) == whole, copy
    assert loaded == {True, False} or what == "no file"


def test_what_an_interrupted_overwrite_made_goes_with_it(case: Case) -> None:
    """Of a third plan: the first output stays, the second's files go, and their room on the disk counts as free."""
    carry_out(case)
    with pytest.raises(Killed):
        carry_out(case, case.other(), until=INDEX, overwrite=True)
    assert (case.out / STAGE_NAME / "model-1").exists()
    third = case.other("third")
    assert missing_bytes(third, "new") < third.total_bytes
    with pytest.raises(Killed):
        carry_out(case, third, until="model-1", overwrite=True)
    assert not (case.out / STAGE_NAME / "model-1").exists()
    assert {name: (case.out / name).read_bytes() for name in DATA} == DATA
    carry_out(case, third)
    check_whole(case, "third")


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


def test_a_commit_point_that_became_a_directory(case: Case) -> None:
    carry_out(case)
    (case.out / INDEX).unlink()
    (case.out / INDEX).mkdir()
    expected = f"{case.out / INDEX}: exists and is not ours; choose another output, or move it away"
    assert refusal(OutputExistsError, case, overwrite=True) == expected


def test_a_large_file_that_was_edited_stays(tmp_path: Path) -> None:
    """At its size: only its digest tells it from the one that was written, however long that takes."""
    import hashlib

    from streamer.storage.transaction import OldFile, remove_own_files

    data = bytes(70_000_000)
    files = [
        OldFile(name, len(data), hashlib.sha256(data).hexdigest()) for name in ("edited", "own")
    ]
    for file in files:
        (tmp_path / file.file).write_bytes(data)
    with (tmp_path / "edited").open("r+b") as f:
        f.seek(1_000_000)
        f.write(b"x")
    remove_own_files(tmp_path, files, ())
    assert [p.name for p in tmp_path.iterdir()] == ["edited"]


OLD_TENSORS = {f"t{i}": torch.full((10,), float(i)) for i in range(3)}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Three shards of the public writer."""
    write_all(tmp_path / "out", OLD_TENSORS.items())
    return tmp_path / "out"


def write_all(out: Path, tensors: Iterable[tuple[str, torch.Tensor]], **options: Any) -> None:
    options = {"max_shard_bytes": 40, **options}
    streamer.write_safetensors(out, [(n, "F32", (10,)) for n in OLD_TENSORS], tensors, **options)


@pytest.mark.parametrize("most", [40, 80, 1000])
def test_the_public_writer_replaces_an_output_by_one_made_from_it(written: Path, most: int) -> None:
    """An error after any tensor leaves the old files byte for byte; what a killed run left beside them is removed."""
    before = tree_digest(written)

    def doubled(until: int) -> Iterator[tuple[str, torch.Tensor]]:
        for i, (name, tensor) in enumerate(streamer.read_tensors(written)):
            if i == until:
                raise ZeroDivisionError
            yield name, tensor * 2

    for until in range(3):
        with pytest.raises(ZeroDivisionError):
            write_all(written, doubled(until), overwrite=True, max_shard_bytes=most)
        assert tree_digest(written) == before
    (written / f".model.safetensors.{'0' * 16}.partial").write_bytes(b"left")
    write_all(written, doubled(3), overwrite=True, max_shard_bytes=most)
    assert all(torch.equal(t, OLD_TENSORS[n] * 2) for n, t in streamer.read_tensors(written))
    files = [f["file"] for f in json.loads((written / "streamer.json").read_text())["files"]]
    assert sorted(p.name for p in written.iterdir()) == sorted([*files, "streamer.json"])


def test_the_public_writer_keeps_what_is_left_of_a_finished_output(written: Path) -> None:
    (written / "model-00002-of-00003.safetensors").unlink()
    before = tree_digest(written)
    with pytest.raises(OutputExistsError, match="holds another output"):
        write_all(written, OLD_TENSORS.items())
    assert tree_digest(written) == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("out/model-00001-of-00003.safetensors", "lies inside the output"),
        ("out/new.safetensors", "lies inside the output"),
        ("models--a--b/x.safetensors", "lies inside a hub cache"),
        (f"{'n' * 230}.safetensors", "its name is too long"),
        ("s3:/x.safetensors", "is an address"),
    ],
)
def test_the_public_writer_refuses_a_file_where_no_output_may_be(
    written: Path, name: str, words: str
) -> None:
    (written.parent / "models--a--b" / "blobs").mkdir(parents=True)
    before = tree_digest(written.parent)
    with pytest.raises(StreamerError, match=words), contextlib.chdir(written.parent):
        write_all(Path(name), OLD_TENSORS.items(), overwrite=True)
    assert tree_digest(written.parent) == before


def test_the_public_writer_looks_at_a_file_under_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    with locked(lock_of(path), path):
        path.write_bytes(b"of the other run")
        with pytest.raises(LockedError):
            write_all(path, OLD_TENSORS.items())
    with pytest.raises(OutputExistsError):
        write_all(path, OLD_TENSORS.items())


def test_an_output_of_the_public_writer_is_none_that_is_verified(written: Path) -> None:
    with pytest.raises(FormatError, match="is of write_safetensors, which records digests alone"):
        streamer.verify_output(written)
