"""The page of a report: what is written, what exists already, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluations import of_findings
from helpers import names, tree_digest

import streamer
from streamer.detection.findings import Findings
from streamer.errors import LockedError, OutputError, OutputExistsError, UsageError
from streamer.report.files import write_files
from streamer.report.subject import make_subject
from streamer.storage.lock import locked


def test_a_page_is_written_found_again_and_replaced_on_demand(findings: Findings, tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.html"
    subject = make_subject(findings)
    assert write_files(subject, path).state == "written"
    before = path.read_bytes()
    assert write_files(subject, path).state == "present"
    other = make_subject(findings, of_findings(findings))
    with pytest.raises(OutputExistsError, match="holds another report; choose another output, or pass --overwrite"):
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
def test_what_is_no_report_is_never_replaced(findings: Findings, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.html"
    path.write_bytes(content)
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match="exists and is not a report; only reports are replaced"):
            write_files(make_subject(findings), path, overwrite)
    assert path.read_bytes() == content
    path.write_bytes(b"")  # made beforehand, as mktemp does
    assert write_files(make_subject(findings), path).state == "written"


def test_paths_that_are_refused(findings: Findings, tmp_path: Path) -> None:
    (tmp_path / "d.html").mkdir()
    (tmp_path / "link.html").symlink_to(tmp_path / "no")
    (tmp_path / "file").write_text("x")
    cases: list[tuple[str, type[Exception], str]] = [
        ("d.html", OutputError, "is a directory; name a page in it"),
        ("link.html", OutputError, "is a symlink"),
        ("figures", UsageError, "expected a page, whose name ends in .html; figures for a paper were removed"),
        ("file/r.html", OutputError, "not a directory"),
        (f"{'x' * 250}.html", OutputError, "too long"),
    ]
    before = tree_digest(tmp_path)
    for name, kind, words in cases:
        with pytest.raises(kind, match=words):
            write_files(make_subject(findings), tmp_path / name)
    assert tree_digest(tmp_path) == before
    with pytest.raises(UsageError, match="is an address"):
        write_files(make_subject(findings), "s3://bucket/r.html")
    with locked(tmp_path / ".r.html.lock"), pytest.raises(LockedError, match="another run is writing here"):
        write_files(make_subject(findings), tmp_path / "r.html")


@pytest.mark.parametrize("name", ["r.html", "new/r.html"])
def test_nothing_is_written_into_a_complete_output(
    pair: tuple[Path, Path], findings: Findings, tmp_path: Path, name: str
) -> None:
    streamer.reduce_intruder_dimension(*pair, tmp_path / "out", findings=findings)
    before = tree_digest(tmp_path)
    with pytest.raises(OutputError, match=r"lies inside the output .*/out, which is complete: its streamer.json lists"):
        write_files(make_subject(findings), tmp_path / "out" / name)
    assert tree_digest(tmp_path) == before
