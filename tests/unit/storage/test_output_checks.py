"""Where an output may stand, and whether there is room for it."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from transactions import DATA, INDEX, Case, carry_out, interrupt, refusal, run

from streamer.errors import LockedError, OutputError, StorageError
from streamer.storage.lock import locked
from streamer.storage.output_checks import check_output_path, check_space
from streamer.storage.output_plan import LOCK_NAME, inspect_output
from streamer.storage.transaction import open_outputs


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
        ("hub/models--x--y/snapshots/0f", "lies inside a hub cache, which is never written to; choose another output"),
        ("hub/models--x--y", "lies inside a hub cache, which is never written to; choose another output"),
        ("hub/datasets--x/new", "lies inside a hub cache, which is never written to; choose another output"),
        ("cache/0f/out", "lies inside a hub cache, which is never written to; choose another output"),
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
        check_output_path(tmp_path / "one", inputs)
    check_output_path(tmp_path / "one" / "two", inputs)
    check_output_path(tmp_path / "three", inputs)


def test_one_directory_under_two_names(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
