"""Findings in Python: how they look, how a matrix is found in them, as data frames, and saved."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import helpers
import pandas
import pytest
import torch
from forks import server

import streamer
from streamer.detection.findings import Findings, load_findings
from streamer.detection.findings_file import journal_of, lock_of
from streamer.detection.findings_view import index_of, indices_of, is_pattern
from streamer.errors import (
    FormatError,
    LockedError,
    MismatchError,
    MissingPackageError,
    OutputError,
    OutputExistsError,
    StorageError,
    UnknownNameError,
    UsageError,
)
from streamer.storage.lock import locked

Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, Findings]:
    """Base, adapter, the findings file, and the findings in memory."""
    home = tmp_path_factory.mktemp("view")
    base, adapter = helpers.three_shards(home)
    path = home / "findings.safetensors"
    streamer.detect_intruder_dimensions(base, adapter, path, top_k=6)
    return base, adapter, path, streamer.detect_intruder_dimensions(base, adapter, top_k=6)


@pytest.fixture(scope="module")
def findings(made: tuple[Path, Path, Path, Findings]) -> Findings:
    return made[3]


# How they look ----------------------------------------------------------------------------------------------------------


def test_findings_are_three_lines(findings: Findings) -> None:
    lines = repr(findings).splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) < 140
    assert lines[0] == (
        f"<Findings: {findings.intruders} intruders in 9 of 9 matrices, 9 certified; top_k=6, threshold_epsilon=0.5, solver=auto"
    )
    assert lines[1].startswith(" base model-00001-of-00003.safetensors and 2 more (7")
    assert lines[2] == " model.layers.0.mlp.down_proj.weight … model.layers.2.self_attn.q_proj.weight>"
    assert f"{findings}" == repr(findings)


def test_a_matrix_and_a_detection_are_one_line(findings: Findings) -> None:
    m = findings[Q]
    assert (
        repr(m.detection)
        == f"<Detection: intruders [1] (ranks from 0) of 6 directions, least similarity {min(m.detection.similarity):.3f}, dense>"
    )
    assert repr(m) == f"<MatrixFinding {Q}.weight 48x48: {m.detection.summary()}>"
    assert len(repr(findings.matrices)) < 200 * len(findings)


def test_a_part_without_matrices(findings: Findings) -> None:
    none = findings[:0]
    assert repr(none).startswith("<Findings: 0 intruders in 0 of 0 matrices")
    assert "<table>" in none._repr_html_()
    assert none.to_pandas().empty


class Table(HTMLParser):
    """Rows of cells; refuses what is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1].append(data)


def test_the_html_table(findings: Findings) -> None:
    parser = Table()
    parser.feed(findings._repr_html_())
    assert parser.open == []
    assert parser.rows[0][:4] == ["matrix", "shape", "intruders", "ranks (1 = largest)"]
    assert len(parser.rows) == 1 + len(findings)
    assert {row[0] for row in parser.rows[1:]} == {m.tensor for m in findings}
    row = next(row for row in parser.rows if row[0] == f"{Q}.weight")
    assert row[1:4] == ["48×48", "1", "2"]


def test_names_are_escaped_in_html(tmp_path: Path) -> None:
    name = "a.<script>alert('x')</script>"
    base = helpers.write_sharded(tmp_path / "base", [{f"{name}.weight": helpers.power_law(16, 12).float()}])
    factors = {name: helpers.intruding_factors(16, 12, 2)}
    adapter = helpers.write_adapter(tmp_path / "adapter", factors, r=2, base_model_name_or_path="<b>org/model")
    shown = streamer.detect_intruder_dimensions(base, adapter, top_k=3)._repr_html_()
    assert "<script>" not in shown
    assert "<b>" not in shown
    assert "a.&lt;script&gt;" in shown


def test_many_matrices_make_a_small_table(findings: Findings) -> None:
    import dataclasses

    many = dataclasses.replace(findings, matrices=findings.matrices * 20)
    parser = Table()
    parser.feed(many._repr_html_())
    assert len(parser.rows) == 11
    assert "and 170 matrices more" in many._repr_html_()


# Finding a matrix -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [f"{Q}.weight", Q, "layers.1.self_attn.q_proj", "1.self_attn.q_proj", "1.self_attn.q_proj.weight"]
)
def test_a_matrix_by_its_name(findings: Findings, name: str) -> None:
    assert findings[name] is findings.find(name)
    assert findings[name].tensor == f"{Q}.weight"
    assert name in findings


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("q_proj", "'q_proj' fits 3 matrices: model.layers.0.self_attn.q_proj.weight, "),
        (f"{Q}s", f"no matrix is called '{Q}s'; did you mean '{Q}'?"),
        ("elf_attn.q_proj", "no matrix is called 'elf_attn.q_proj'"),
        ("nothing like it", "no matrix is called 'nothing like it'; there are model.layers.0.mlp.down_proj.weight, "),
        ("", "no matrix is called ''"),
        ("*.k_proj", "no matrix fits '*.k_proj'; there are model.layers.0.mlp.down_proj.weight, "),
    ],
)
def test_a_name_that_is_none(findings: Findings, name: str, words: str) -> None:
    with pytest.raises(KeyError) as e:
        findings[name]
    assert isinstance(e.value, UnknownNameError)
    assert str(e.value).startswith("findings: ")
    assert words in str(e.value)
    assert len(str(e.value)) < 300
    assert name not in findings


@pytest.mark.parametrize(
    ("pattern", "tensors"),
    [
        ("*.q_proj", [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)]),
        ("*.q_proj.weight", [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)]),
        ("*.layers.[!12].self_attn.*", ["model.layers.0.self_attn.q_proj.weight"]),
        ("*.layers.?.mlp.up_proj", [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]),
    ],
)
def test_matrices_by_a_pattern(findings: Findings, pattern: str, tensors: list[str]) -> None:
    part = findings[pattern]
    assert isinstance(part, Findings)
    assert [m.tensor for m in part] == tensors
    assert [m.tensor for m in findings.select(pattern)] == tensors
    assert (part.base, part.adapter, part.options) == (findings.base, findings.adapter, findings.options)


def test_integers_and_slices(findings: Findings) -> None:
    assert findings[0] is findings.matrices[0]
    assert findings[-1] is findings.matrices[-1]
    assert isinstance(findings[2:5], Findings)
    assert findings[2:5].matrices == findings.matrices[2:5]
    assert findings[::3].intruders == sum(len(m.detection.intruders) for m in findings.matrices[::3])
    assert findings.matrices[4] in findings
    assert 3 not in findings
    with pytest.raises(IndexError):
        findings[9]


def test_experts_are_numbered_in_brackets() -> None:
    names = [(f"mlp.experts.gate_up_proj[{i}]", "mlp.experts") for i in range(12)]
    assert not is_pattern("experts.gate_up_proj[3]")
    assert index_of(names, "experts.gate_up_proj[3]") == 3
    assert indices_of(names, "*.gate_up_proj[11]") == [11]
    assert indices_of(names, "*.gate_up_proj[[]?]") == list(range(10))
    with pytest.raises(UnknownNameError, match="fits 12 matrices"):
        index_of(names, "mlp.experts")


def test_a_part_does_not_pass_for_the_whole(made: tuple[Path, Path, Path, Findings], tmp_path: Path) -> None:
    base, adapter, _, findings = made
    with pytest.raises(
        MismatchError,
        match=r"^findings: has no findings on 6 of 9 matrices, 'model.layers.0.mlp.down_proj.weight' first; pass those on all",
    ):
        streamer.reduce_intruder_dimension(base, adapter, tmp_path / "out", findings=findings["*.q_proj"], top_k=6)
    assert not (tmp_path / "out").exists()


# Data frames ------------------------------------------------------------------------------------------------------------


def test_a_row_for_each_matrix(findings: Findings) -> None:
    frame = findings.to_pandas()
    assert list(frame.tensor) == [m.tensor for m in findings]
    assert list(frame.intruder_count) == [len(m.detection.intruders) for m in findings]
    row = frame.set_index("module").loc[Q]
    m = findings[Q]
    assert (row["rows"], row["columns"], row["rank"], row["scale"], row["dtype"]) == (48, 48, 4, 1.0, "BF16")
    assert row.intruders == m.detection.intruders
    assert row.least_similarity == min(m.detection.similarity)
    assert row.delta_norm == m.detection.delta_norm
    assert row.seconds == m.seconds
    assert frame.certified.dtype == bool
    assert isinstance(frame, pandas.DataFrame)


def test_a_row_for_each_direction(findings: Findings) -> None:
    frame = findings.to_pandas("direction")
    assert len(frame) == 9 * 6
    assert frame.intruder.sum() == findings.intruders
    mine = frame[frame.module == Q]
    assert list(mine.direction) == list(range(6))
    assert list(mine.singular_value) == list(findings[Q].detection.singular_values)
    assert ((mine.similarity_low <= mine.similarity) & (mine.similarity <= mine.similarity_high)).all()


def test_another_kind_of_row(findings: Findings) -> None:
    with pytest.raises(UsageError, match=r"^by: expected 'matrix' or 'direction', found 'layer'$"):
        findings.to_pandas("layer")  # type: ignore[arg-type]


def test_without_pandas(findings: Findings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'intruder-streamer\[pandas\]'") as e:
        findings.to_pandas()
    assert isinstance(e.value, MissingPackageError)
    assert e.value.name == "pandas"


def test_the_record_is_what_report_prints(made: tuple[Path, Path, Path, Findings]) -> None:
    done = server().run("report", made[2], "--json")
    assert json.loads(done.out) == load_findings(made[2]).record()


# Saving -----------------------------------------------------------------------------------------------------------------


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


def test_a_killed_save_leaves_the_old_file(made: tuple[Path, Path, Path, Findings], tmp_path: Path) -> None:
    """Killed at each call that changes something on disk; the next save clears up."""
    _, _, path, findings = made
    out = tmp_path / "f"
    findings[:3].save(out)
    old = out.read_bytes()
    program = (
        "import os, signal, sys\n"
        "from streamer.detection.findings import load_findings\n"
        "findings, n = load_findings(sys.argv[1]), [0]\n"
        "def at(name, real):\n"
        "    def call(*args, **kwargs):\n"
        "        n[0] += 1\n"
        "        if n[0] == k: os._exit(9)\n"
        "        return real(*args, **kwargs)\n"
        "    return call\n"
        "for name in ('write', 'pwrite', 'fsync', 'rename', 'replace', 'unlink'): setattr(os, name, at(name, getattr(os, name)))\n"
        "for k in range(1, 99):\n"
        "    n[0] = 0\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        findings.save(sys.argv[2], overwrite=True)\n"
        "        os._exit(0)\n"
        "    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])\n"
        "    data = open(sys.argv[2], 'rb').read()\n"
        "    assert data in (old, new), k\n"
        "    if code == 0: break\n"
        "else: raise SystemExit('never finished')\n"
        "assert k > 3 and data == new\n"
    )
    program = program.replace(
        "findings, n", "old, new = open(sys.argv[2], 'rb').read(), open(sys.argv[1], 'rb').read()\nfindings, n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path), str(out)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert out.read_bytes() == path.read_bytes() != old


def test_what_is_no_findings_file_still_is_none(tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        load_findings(tmp_path)
