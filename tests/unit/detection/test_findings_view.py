"""Findings for people: how they look, how a matrix is found, data frames."""

import sys
from html.parser import HTMLParser
from pathlib import Path

import helpers
import pandas
import pytest

import streamer
from streamer.detection.findings import Findings, index_of, indices_of, is_pattern
from streamer.errors import MismatchError, MissingPackageError, UnknownNameError, UsageError

Q = "model.layers.1.self_attn.q_proj"

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
    (rank,), least = m.detection.intruders, min(m.detection.similarity)
    assert (
        repr(m.detection)
        == f"<Detection: intruders [{rank}] (ranks from 0) of 6 directions, least similarity {least:.3f}, dense>"
    )
    assert repr(m) == f"<MatrixFinding {Q}.weight 48x48: {m.detection.summary()}>"
    assert len(repr(findings.matrices)) < 200 * len(findings)


def test_the_table_and_the_totals(findings: Findings) -> None:
    tree = findings.record()
    assert findings.totals == tree["totals"]
    head, _, *rows = findings.table().splitlines()
    assert head.split()[:5] == ["matrix", "shape", "r", "intruders", "ranks"]
    assert len(rows) == len(findings) + 3
    for row, m in zip(rows, tree["matrices"], strict=False):
        assert row.split()[:4] == [
            m["tensor"],
            "x".join(map(str, m["shape"])),
            str(m["rank"]),
            str(len(m["intruders"])),
        ]
    assert rows[-2].startswith(f"{findings.intruders} intruders in ")
    assert findings[:0].table().splitlines()[0].startswith("matrix  shape")


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
    assert parser.rows[0][:5] == ["matrix", "shape", "r", "intruders", "ranks"]
    assert len(parser.rows) == 1 + len(findings)
    assert {row[0] for row in parser.rows[1:]} == {m.tensor for m in findings}
    row = next(row for row in parser.rows if row[0] == f"{Q}.weight")
    (rank,) = findings[Q].detection.intruders
    assert row[1:5:2] == ["48x48", "1"]
    assert row[4] == str(rank + 1)


def test_names_are_escaped_in_html(tmp_path: Path) -> None:
    name = "a.<script>alert('x')</script>"
    base = helpers.write_sharded(
        tmp_path / "base",
        [{f"{name}.weight": helpers.power_law(16, 12).float()}],
        {"model_type": "test", "tie_word_embeddings": False},
    )
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


@pytest.mark.parametrize(("name", "words"), [
    ("q_proj", "'q_proj' fits 3 matrices: model.layers.0.self_attn.q_proj.weight, "),
    (f"{Q}s", f"no matrix is called '{Q}s'; did you mean '{Q}'?"),
    ("elf_attn.q_proj", "no matrix is called 'elf_attn.q_proj'"),
    ("nothing like it", "no matrix is called 'nothing like it'; there are model.layers.0.mlp.down_proj.weight, "),
    ("", "no matrix is called ''"),
    ("*.k_proj", "no matrix fits '*.k_proj'; there are model.layers.0.mlp.down_proj.weight, "),
])  # fmt: skip
def test_a_name_that_is_none(findings: Findings, name: str, words: str) -> None:
    with pytest.raises(KeyError) as e:
        findings[name]
    assert isinstance(e.value, UnknownNameError)
    assert str(e.value).startswith("findings: ")
    assert words in str(e.value)
    assert len(str(e.value)) < 300
    assert name not in findings


@pytest.mark.parametrize(("pattern", "tensors"), [
    ("*.q_proj", [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)]),
    ("*.q_proj.weight", [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)]),
    ("*.layers.[!12].self_attn.*", ["model.layers.0.self_attn.q_proj.weight"]),
    ("*.layers.?.mlp.up_proj", [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]),
])  # fmt: skip
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


def test_names_do_not_break_lines(tmp_path: Path) -> None:
    name = "layers.0.\u2028x\u202ey\x1b[31m"
    base = helpers.write_sharded(tmp_path / "base", [{f"{name}.weight": helpers.power_law(16, 12).float()}])
    adapter = helpers.write_adapter(tmp_path / "adapter", {name: helpers.intruding_factors(16, 12, 2)}, r=2)
    found = streamer.detect_intruder_dimensions(base, adapter, top_k=3)
    assert len(found.table().splitlines()) == 2 + len(found) + 3
    for text in (found.table(), repr(found), found._repr_html_()):
        assert all(line.isprintable() for line in text.split("\n"))
        assert r"layers.0.\u2028x\u202ey\x1b[31m.weight" in text
