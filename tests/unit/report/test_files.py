"""The page of a report as a file, the curves on it, and what it embeds."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from evaluations import of_findings
from helpers import names, tree_digest
from safetensors.torch import load_file

import streamer
from streamer.detection.findings import Findings
from streamer.errors import LockedError, OutputError, OutputExistsError, UsageError
from streamer.report.page import lambda_curve, threshold_curve, write_files
from streamer.storage.files import locked


def test_a_page_is_written_found_again_and_replaced_on_demand(
    findings: Findings, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "r.html"
    subject = findings
    assert write_files(subject, path).state == "written"
    before = path.read_bytes()
    assert write_files(subject, path).state == "present"
    other = of_findings(findings)
    with pytest.raises(
        OutputExistsError, match="holds another report; choose another output, or pass --overwrite"
    ):
        write_files(other, path)
    assert path.read_bytes() == before
    assert write_files(other, path, overwrite=True).state == "written"
    assert path.read_bytes() != before
    assert names(path.parent) == ["r.html"]


@pytest.mark.parametrize(
    "content",
    [
        b"my thesis",
        b"<!doctype html>\n<title>mine</title>\n",
        b"<p>How to call streamer report: it has -o",
        b"x" * 10_000,
    ],
)
def test_what_is_no_report_is_never_replaced(
    findings: Findings, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "r.html"
    path.write_bytes(content)
    for overwrite in (False, True):
        with pytest.raises(
            OutputExistsError, match="exists and is not a report, and no other file is replaced"
        ):
            write_files(findings, path, overwrite)
    assert path.read_bytes() == content
    path.write_bytes(b"")  # made beforehand, as mktemp does
    assert write_files(findings, path).state == "written"


def test_paths_that_are_refused(findings: Findings, tmp_path: Path) -> None:
    (tmp_path / "d.html").mkdir()
    (tmp_path / "link.html").symlink_to(tmp_path / "no")
    (tmp_path / "file").write_text("x")
    cases: list[tuple[str, type[Exception], str]] = [
        ("d.html", OutputError, "is a directory; name a page in it"),
        ("link.html", OutputError, "is a symlink"),
        ("figures", UsageError, "expected a name that ends in .html, such as"),
        ("file/r.html", OutputError, "not a directory"),
        (f"{'x' * 250}.html", OutputError, "too long"),
    ]
    before = tree_digest(tmp_path)
    for name, kind, words in cases:
        with pytest.raises(kind, match=words):
            write_files(findings, tmp_path / name)
    assert tree_digest(tmp_path) == before
    with pytest.raises(UsageError, match="is an address"):
        write_files(findings, "s3://bucket/r.html")
    with (
        locked(tmp_path / ".r.html.lock"),
        pytest.raises(LockedError, match="another run is writing here"),
    ):
        write_files(findings, tmp_path / "r.html")


@pytest.mark.parametrize("name", ["r.html", "new/r.html"])
def test_nothing_is_written_into_a_complete_output(
    pair: tuple[Path, Path], findings: Findings, tmp_path: Path, name: str
) -> None:
    streamer.reduce_intruder_dimension(*pair, tmp_path / "out", findings=findings)
    before = tree_digest(tmp_path)
    with pytest.raises(
        OutputError,
        match=r"lies inside the output .*/out, which is complete: its streamer.json lists its files",
    ):
        write_files(findings, tmp_path / "out" / name)
    assert tree_digest(tmp_path) == before


def delta(adapter: Path, module: str) -> torch.Tensor:
    tensors = load_file(adapter / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{module}.lora_{f}.weight"].double() for f in "AB")
    return B @ A


def test_what_a_lambda_takes_away_is_what_the_formulas_do(
    pair: tuple[Path, Path], findings: Findings
) -> None:
    total = {"before": 0.0, "project": 0.0, "left": 0.0, "paper": 0.0}
    lam = 0.25
    for m in findings:
        D = delta(pair[1], m.module)
        d = m.detection
        U = d.U.double()
        S = d.S.double()
        Vh = d.Vh.double()
        project = D - (1 - lam) * U @ (U.T @ D)
        paper = D + (lam - 1) * U @ torch.diag(S) @ Vh
        total["before"] += float(D.square().sum())
        total["left"] += float(project.square().sum())
        total["project"] += float((project - D).square().sum())
        total["paper"] += float((paper - D).square().sum())
    found = next(c for c in lambda_curve(findings) if c.mitigation_lambda == lam)
    for key, square in (("norm_left", "left"), ("project", "project"), ("paper", "paper")):
        assert getattr(found, key) == pytest.approx(
            math.sqrt(total[square] / total["before"]), rel=1e-5
        )


def test_thresholds_count_what_detection_finds_there(
    pair: tuple[Path, Path], findings: Findings
) -> None:
    curve = {c.epsilon: c for c in threshold_curve(findings)}
    assert curve[0.5].intruders == curve[0.5].least == curve[0.5].most == findings.intruders
    other = streamer.detect_intruder_dimensions(*pair, threshold_epsilon=0.7)
    assert curve[0.7].least <= other.intruders <= curve[0.7].most
    values = list(curve.values())
    assert all(
        a.intruders <= b.intruders and a.most <= b.most for a, b in itertools.pairwise(values)
    )


def test_a_threshold_between_the_steps_is_among_them(findings: Findings) -> None:
    options = dataclasses.replace(findings.options, threshold_epsilon=0.513)
    curve = threshold_curve(dataclasses.replace(findings, options=options))
    assert 0.513 in [c.epsilon for c in curve]
