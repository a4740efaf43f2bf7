"""Findings that are saved: detect's own bytes, parts, and what is never written over."""

from __future__ import annotations

from pathlib import Path

import helpers
import pytest
import torch

import streamer
from streamer.detection.findings import Findings, load_findings
from streamer.detection.findings_file import journal_of, lock_of
from streamer.errors import FormatError, LockedError, OutputError, OutputExistsError, StorageError
from streamer.storage.lock import locked


@pytest.mark.parametrize("where", ["memory", "file"])
def test_saved_findings_are_detects_own_bytes(
    made: tuple[Path, Path, Path, Findings], tmp_path: Path, where: str
) -> None:
    base, adapter, path, memory = made
    given = memory if where == "memory" else load_findings(path)
    out = tmp_path / "some" / "where" / "f.safetensors"
    given.save(out)
    assert out.read_bytes() == path.read_bytes()
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    before = out.stat().st_ino
    again = streamer.detect_intruder_dimensions(base, adapter, out, top_k=6)  # it is detect's own output: nothing to do
    assert out.stat().st_ino == before
    assert again.digest() == memory.digest()


def test_saved_findings_are_used(made: tuple[Path, Path, Path, Findings], tmp_path: Path) -> None:
    base, adapter, path, memory = made
    memory.save(tmp_path / "f")
    for name, given in (("a", path), ("b", tmp_path / "f")):
        streamer.reduce_intruder_dimension(base, adapter, tmp_path / name, findings=given, top_k=6)
    assert helpers.tree_digest(tmp_path / "a") == helpers.tree_digest(tmp_path / "b")


def test_a_part_is_saved_as_a_part(findings: Findings, tmp_path: Path) -> None:
    findings["*.q_proj"].save(tmp_path / "f")
    read = load_findings(tmp_path / "f")
    assert [m.tensor for m in read] == [m.tensor for m in findings["*.q_proj"]]
    assert torch.equal(read[1].detection.U, findings["*.q_proj"][1].detection.U)


def test_saving_replaces_nothing_unasked(findings: Findings, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("mine")
    with pytest.raises(OutputExistsError, match=r"f: exists; choose another output, or pass overwrite=True$"):
        findings.save(path)
    with pytest.raises(
        OutputExistsError, match=r"f: exists and is not findings, which is all that is replaced; choose another output$"
    ):
        findings.save(path, overwrite=True)
    assert path.read_text() == "mine"
    path.write_text("")
    findings.save(path)
    with pytest.raises(OutputExistsError, match=r"f: exists; choose another output, or pass overwrite=True$"):
        findings[:2].save(path)
    again = load_findings(path)
    again[:3].save(path, overwrite=True)  # onto the file that is mapped
    assert len(load_findings(path)) == 3
    assert torch.equal(again[8].detection.U, findings[8].detection.U)


def test_weights_are_not_saved_over(findings: Findings, made: tuple[Path, Path, Path, Findings]) -> None:
    before = helpers.tree_digest(made[0])
    with pytest.raises(OutputExistsError, match="exists and is not findings"):
        findings.save(made[0] / "model-00001-of-00003.safetensors", overwrite=True)
    assert helpers.tree_digest(made[0]) == before


def test_findings_that_are_equal(made: tuple[Path, Path, Path, Findings]) -> None:
    _, _, path, memory = made
    assert load_findings(path) == memory  # seconds do not count
    assert memory[:3] != memory[3:6]
    assert memory[0].detection != memory[1].detection
    assert memory[0].detection != 3


def test_saving_beside_an_interrupted_run(findings: Findings, tmp_path: Path) -> None:
    path = tmp_path / "f"
    journal_of(path).write_bytes(b"x")
    with pytest.raises(OutputExistsError, match="f: an interrupted run has its journal there"):
        findings.save(path)
    findings.save(path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("what", ["directory", "symlink", "file above", "locked"])
def test_where_nothing_can_be_saved(findings: Findings, tmp_path: Path, what: str) -> None:
    path = tmp_path / "f"
    if what == "directory":
        path.mkdir()
    elif what == "symlink":
        path.symlink_to(tmp_path / "elsewhere")
    elif what == "file above":
        path.write_text("mine")
        path = path / "g"
    before = helpers.tree_digest(tmp_path)
    if what == "locked":
        with locked(lock_of(path), path), pytest.raises(LockedError, match=f"^{path}: another run is writing here"):
            findings.save(path)
    else:
        with pytest.raises(OutputError) as e:
            findings.save(path, overwrite=True)
        assert str(e.value).startswith(f"{path}: ")
    assert helpers.tree_digest(tmp_path) == before


def test_no_room_to_save(findings: Findings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 0, 9))  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match=r"f: needs \d+\.\d kB, the disk has 9 B free"):
        findings.save(tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_findings_file_still_is_none(tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        load_findings(tmp_path)
