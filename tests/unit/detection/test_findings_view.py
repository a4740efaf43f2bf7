"""Findings for people: how they look, how a matrix is found."""

from dataclasses import replace
from pathlib import Path

import helpers
import pytest

import streamer
from streamer.detection.findings import Findings
from streamer.errors import MismatchError, UnknownNameError

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
    assert (
        lines[2] == " model.layers.0.mlp.down_proj.weight … model.layers.2.self_attn.q_proj.weight>"
    )
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


# Finding a matrix -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        f"{Q}.weight",
        Q,
        "layers.1.self_attn.q_proj",
        "1.self_attn.q_proj",
        "1.self_attn.q_proj.weight",
    ],
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
        (
            "nothing like it",
            "no matrix is called 'nothing like it'; there are model.layers.0.mlp.down_proj.weight, ",
        ),
        ("", "no matrix is called ''"),
        ("*.k_proj", "no matrix fits '*.k_proj'; there are model.layers.0.mlp.down_proj.weight, "),
    ],
)
def test_an_unknown_name_is_refused(findings: Findings, name: str, words: str) -> None:
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
    assert (part.base, part.adapter, part.options) == (
        findings.base,
        findings.adapter,
        findings.options,
    )


def test_integers_and_slices(findings: Findings) -> None:
    assert findings[0] is findings.matrices[0]
    assert findings[-1] is findings.matrices[-1]
    assert isinstance(findings[2:5], Findings)
    assert findings[2:5].matrices == findings.matrices[2:5]
    assert findings[::3].intruders == sum(
        len(m.detection.intruders) for m in findings.matrices[::3]
    )
    assert findings.matrices[4] in findings
    assert 3 not in findings
    with pytest.raises(IndexError):
        findings[9]


def test_experts_are_numbered_in_brackets(findings: Findings) -> None:
    stack = [
        replace(findings[0], tensor=f"mlp.experts.gate_up_proj[{i}]", module="mlp.experts")
        for i in range(12)
    ]
    experts = replace(findings, matrices=tuple(stack))
    assert experts["experts.gate_up_proj[3]"] is stack[3]
    assert experts["*.gate_up_proj[11]"].matrices == (stack[11],)
    assert experts["*.gate_up_proj[[]?]"].matrices == tuple(stack[:10])
    with pytest.raises(UnknownNameError, match="fits 12 matrices"):
        experts["mlp.experts"]


def test_a_part_does_not_pass_for_the_whole(
    made: tuple[Path, Path, Path, Findings], tmp_path: Path
) -> None:
    base, adapter, _, findings = made
    with pytest.raises(
        MismatchError,
        match=r"^findings: has no findings on 6 of 9 matrices, 'model.layers.0.mlp.down_proj.weight' first; pass those on all",
    ):
        streamer.reduce_intruder_dimension(
            base, adapter, tmp_path / "out", findings=findings["*.q_proj"], top_k=6
        )
    assert not (tmp_path / "out").exists()


def test_names_do_not_break_lines(tmp_path: Path) -> None:
    name = "layers.0.\u2028x\u202ey\x1b[31m"
    base = helpers.write_sharded(
        tmp_path / "base", [{f"{name}.weight": helpers.power_law(16, 12).float()}]
    )
    adapter = helpers.write_adapter(
        tmp_path / "adapter", {name: helpers.intruding_factors(16, 12, 2)}, r=2
    )
    found = streamer.detect_intruder_dimensions(base, adapter, top_k=3)
    assert len(found.table().splitlines()) == 2 + len(found) + 3
    for text in (found.table(), repr(found)):
        assert all(line.isprintable() for line in text.split("\n"))
        assert r"layers.0.\u2028x\u202ey\x1b[31m.weight" in text
