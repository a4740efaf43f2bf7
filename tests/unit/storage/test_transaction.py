"""An output directory as one transaction: what may be begun, what is taken up, and how it ends."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from pathlib import Path

import pytest
from faults import failing
from helpers import tree_digest
from transactions import DATA, INDEX, Case, Killed, carry_out, check_whole, interrupt, refusal

from streamer.errors import InputChangedError, OutputError, OutputExistsError, StorageError
from streamer.storage.atomic_file import AtomicFile
from streamer.storage.output_plan import JOURNAL_NAME, RECORD_NAME, finished_record, inspect_output
from streamer.storage.transaction import open_outputs

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
    with pytest.raises(OutputError, match="another run has just finished this; run the command again to see it"):
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


def test_a_name_that_is_too_long_for_a_partial_file(case: Case) -> None:
    """As of a shard of the base; refused before any work."""
    name = f"sub/{'x' * 243}.safetensors"
    message = refusal(OutputError, case, dataclasses.replace(case.plan, files=((name, 1),)))
    words = "its name is too long: with what a partial file adds it has 281 bytes, the file system takes 255"
    assert message == f"{case.out / name}: {words}; choose a shorter name"


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
    (case.out / ".gitattributes").write_text("mine")
    assert inspect_output(case.plan) == "new"
    carry_out(case)
    assert (case.out / ".gitattributes").read_text() == "mine"


# Failures while writing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync", "rename", "posix_fallocate"])
def test_a_system_that_refuses(case: Case, monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    """Stops cleanly, keeps what is finished, and the same run finishes later."""
    interrupt(case)
    with monkeypatch.context() as m:
        m.setattr(os, call, failing(number))
        with pytest.raises(StorageError, match=os.strerror(number)):
            carry_out(case)
    assert sorted(p.name for p in case.out.iterdir()) == [JOURNAL_NAME, "model-1", "sub"]
    assert carry_out(case) == ["model-2", INDEX]
    check_whole(case)


def test_a_check_before_the_rename_stops_it(case: Case) -> None:
    def write() -> None:
        with open_outputs([case.plan]) as (out,), out.file("sub/config.json", 2) as f:
            f.write(b"{}")
            f.complete()
            raise InputChangedError("changed")

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
        with open_outputs([case.plan]) as (out,), out.file("sub/config.json", 2) as f:
            f.copy(case.base / "gone")

    with pytest.raises(InputChangedError, match="gone: vanished during the run; put it back and start again"):
        copy()


def test_copies_take_the_umasks_mode(case: Case) -> None:
    (case.base / "sub" / "config.json").chmod(0o400)
    old = os.umask(0o027)
    try:
        carry_out(case)
    finally:
        os.umask(old)
    assert {(case.out / n).stat().st_mode & 0o777 for n in (*DATA, RECORD_NAME)} == {0o640}


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
