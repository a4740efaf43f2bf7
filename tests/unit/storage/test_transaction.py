"""An output directory as one transaction: where it may stand, its lock, what may be begun, and how it ends."""

import dataclasses
import errno
import fcntl
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from faults import failing
from helpers import names, tree_digest
from transactions import DATA, INDEX, Case, carry_out, check_whole, interrupt, refusal, run, take

from streamer.errors import (
    InputChangedError,
    LockedError,
    OutputError,
    OutputExistsError,
    StorageError,
)
from streamer.storage.checkpoint import read_json_object
from streamer.storage.files import locked
from streamer.storage.transaction import (
    JOURNAL_NAME,
    LOCK_NAME,
    RECORD_NAME,
    check_output_path,
    check_space,
    inspect_output,
    open_outputs,
)

# From nothing to done -----------------------------------------------------------------------------------------------


def test_new_then_done(case: Case) -> None:
    assert inspect_output(case.plan) == "new"
    assert not case.out.exists()
    assert carry_out(case) == list(DATA)
    check_whole(case)
    assert inspect_output(case.plan) == "done"
    record = read_json_object(case.plan.path / RECORD_NAME)
    assert record["made"] == "here"
    assert [(f["file"], f["bytes"]) for f in record["files"]] == list(case.plan.files)
    before = tree_digest(case.out)
    with pytest.raises(
        OutputError, match="another run has just finished this; run the command again to see it"
    ):
        carry_out(case)
    assert tree_digest(case.out) == before


def test_a_finished_output_is_known_by_its_plan_alone(case: Case) -> None:
    """Not by stamps: the inputs may have been copied since; their bytes decide."""
    carry_out(case)
    assert inspect_output(dataclasses.replace(case.plan, stamps={})) == "done"
    assert inspect_output(case.plan, resume=False) == "done"
    assert inspect_output(case.plan, overwrite=True) == "new"


@pytest.mark.parametrize("name", DATA)
def test_a_finished_output_that_lost_a_file_is_not_done(case: Case, name: str) -> None:
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


def test_a_name_that_is_too_long_for_a_partial_file(case: Case) -> None:
    """As of a shard of the base; refused before any work."""
    name = f"sub/{'x' * 243}.safetensors"
    message = refusal(OutputError, case, dataclasses.replace(case.plan, files=((name, 1),)))
    words = "its name is too long: with what a partial file adds it has 281 bytes, the file system takes 255"
    assert message == f"{case.out / name}: {words}; choose a shorter name"


def test_an_existing_empty_directory_is_taken(case: Case) -> None:
    case.out.mkdir()
    (case.out / ".gitattributes").write_text("mine")
    assert inspect_output(case.plan) == "new"
    carry_out(case)
    assert (case.out / ".gitattributes").read_text() == "mine"


# Failures while writing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync", "rename", "posix_fallocate"])
def test_a_system_that_refuses(
    case: Case, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    """Stops cleanly, keeps what is finished, and the same run finishes later."""
    interrupt(case)
    with monkeypatch.context() as m:
        m.setattr(os, call, failing(number))
        with pytest.raises(StorageError, match=os.strerror(number)):
            carry_out(case)
    assert sorted(p.name for p in case.out.iterdir()) == [JOURNAL_NAME, "model-1", "sub"]
    assert carry_out(case) == ["model-2", INDEX]
    check_whole(case)


@pytest.mark.parametrize("content", [b"", b"{", b"{}\n"])
def test_a_copied_file_that_changed_its_size_is_noticed(case: Case, content: bytes) -> None:
    source = case.base / "sub" / "config.json"
    source.write_bytes(content)
    with pytest.raises(InputChangedError) as caught:
        carry_out(case)
    words = f"expected 2 B, found {len(content)} B: it changed during the run; start again"
    assert str(caught.value) == f"{source}: {words}"
    assert list((case.out / "sub").iterdir()) == []


def test_a_copied_file_that_vanished_is_noticed(case: Case) -> None:
    def copy() -> None:
        with open_outputs([case.plan]) as (out,), out.file("sub/config.json", 2) as f:
            f.copy(case.base / "gone")

    with pytest.raises(
        InputChangedError, match="gone: vanished during the run; put it back and start again"
    ):
        copy()


def test_copies_take_the_umasks_mode(case: Case) -> None:
    (case.base / "sub" / "config.json").chmod(0o400)
    old = os.umask(0o027)
    try:
        carry_out(case)
    finally:
        os.umask(old)
    assert {(case.out / n).stat().st_mode & 0o777 for n in (*DATA, RECORD_NAME)} == {0o640}


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("base", "is the input {base}; choose another output"),
        ("base/../base", "is the input {base}; choose another output"),
        ("link", "is a symlink, and writing never follows one; name its target {base}"),
        (
            "dangling",
            "is a symlink, and writing never follows one; name its target {out.parent}/gone",
        ),
        ("base/out", "lies inside the input {base}; choose an output outside it"),
        ("base/sub/new/out", "lies inside the input {base}; choose an output outside it"),
        ("link/out", "lies inside the input {base}; choose an output outside it"),
        (".", "contains the input {base}; choose an output beside it"),
        ("base/sub/../../out/..", "contains the input {base}; choose an output beside it"),
        (
            "hub/models--x--y/snapshots/0f",
            "lies inside a hub cache, which is never written to; choose another output",
        ),
        (
            "hub/models--x--y",
            "lies inside a hub cache, which is never written to; choose another output",
        ),
        (
            "hub/datasets--x/new",
            "lies inside a hub cache, which is never written to; choose another output",
        ),
        (
            "cache/0f/out",
            "lies inside a hub cache, which is never written to; choose another output",
        ),
        ("file", "is a file, not a directory; choose another output, or move the file away"),
        (
            "file/out",
            "{out.parent} is a file, not a directory; choose another output, or move the file away",
        ),
    ],
)
def test_places_where_nothing_is_written(
    case: Case, tmp_path: Path, place: str, words: str
) -> None:
    (tmp_path / "link").symlink_to("base")
    (tmp_path / "dangling").symlink_to("gone")
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


def test_an_output_does_not_contain_an_input(case: Case, tmp_path: Path) -> None:
    (tmp_path / "one" / "two").mkdir(parents=True)
    (tmp_path / "one" / "model.safetensors").touch()
    inputs = (tmp_path / "one" / "model.safetensors",)
    with pytest.raises(OutputError, match="contains the input"):
        check_output_path(tmp_path / "one", inputs)
    check_output_path(tmp_path / "one" / "two", inputs)
    check_output_path(tmp_path / "three", inputs)


def test_one_directory_under_two_names(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As under a second mount: known by device and inode, in both directions."""
    (tmp_path / "mount" / "base").mkdir(parents=True)
    real = Path.samefile
    pairs = {(tmp_path / "mount" / "base", case.base), (case.base, tmp_path / "mount" / "base")}
    monkeypatch.setattr(Path, "samefile", lambda a, b: (a, Path(b)) in pairs or real(a, b))
    with pytest.raises(OutputError, match="is the input"):
        check_output_path(tmp_path / "mount" / "base", case.plan.inputs)
    with pytest.raises(OutputError, match="lies inside the input"):
        check_output_path(tmp_path / "mount" / "base" / "out", case.plan.inputs)
    with pytest.raises(OutputError, match="contains the input"):
        check_output_path(case.base, (tmp_path / "mount" / "base" / "model.safetensors",))


def test_a_place_that_is_not_writable(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    words = f"{case.out}: {case.out.parent} is not writable; choose another output"
    assert refusal(OutputError, case) == words


def test_a_second_run_on_an_output_is_refused(case: Case) -> None:
    case.out.mkdir()
    with locked(case.out / LOCK_NAME):
        assert inspect_output(case.plan) == "new"
        with pytest.raises(LockedError, match="another run is writing here"):
            carry_out(case)
    assert carry_out(case) == list(DATA)


# Space --------------------------------------------------------------------------------------------------------------


Usage = namedtuple("Usage", "total used free")


def test_a_plan_that_does_not_fit_the_disk_is_refused(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = case.plan.total_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(need, 1, need - 1))
    words = (
        f"needs {need} B, the disk has {need - 1} B free; free some space, or choose another disk"
    )
    with pytest.raises(StorageError) as caught:
        inspect_output(case.plan)
    assert str(caught.value) == f"{case.out}: {words}"
    assert caught.value.exit_code == 6
    assert not case.out.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(need, 0, need))
    assert inspect_output(case.plan) == "new"


def test_free_space_is_that_of_the_real_disk(case: Case) -> None:
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


def test_what_a_killed_run_holds_in_partials_is_free(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are removed first: without counting them a run on a nearly full disk could not be taken up."""
    interrupt(case)
    (case.out / f".model-2.{'0' * 16}.partial").write_bytes(bytes(8192))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 0))
    assert inspect_output(case.plan) == "resume"
    assert inspect_output(case.plan, resume=False) == "new"


def test_the_lock_comes_and_goes(tmp_path: Path) -> None:
    take(tmp_path / "lock")
    assert names(tmp_path) == []

    def fail() -> None:
        with locked(tmp_path / "lock"):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert names(tmp_path) == []


def test_a_lock_file_removed_between_open_and_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder before us ends just then: the lock of a file without a name would exclude nobody."""
    path = tmp_path / "lock"
    real = fcntl.flock
    calls = []

    def flock(fd: int, how: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            path.unlink()
        if len(calls) == 2:
            path.rename(tmp_path / "another")
            path.touch()
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(path):
        assert len(calls) == 3
        with pytest.raises(LockedError):
            take(path)
    assert names(tmp_path) == ["another"]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    take(tmp_path / "lock")
    assert names(tmp_path) == []


def test_a_symlink_where_the_lock_must_be(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to("elsewhere")
    with pytest.raises(OutputError, match="a symlink has the name of the lock; remove it"):
        take(tmp_path / "lock")
    assert names(tmp_path) == ["lock"]


def test_a_lock_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(StorageError, match="lock: cannot lock: Is a directory"):
        take(tmp_path / "lock")
