"""Files of a report: what is written, what stands already, what is refused, and the figures."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

import pytest
from evaluations import evaluation, of_findings
from helpers import names, tree_digest

import streamer
from streamer.detection.findings import Findings
from streamer.errors import LockedError, MissingPackageError, OutputError, OutputExistsError, UsageError
from streamer.evaluation.evaluation import Evaluation
from streamer.report.figures import _SETTINGS, _draw_output_map, _draw_tradeoff, draw_figures
from streamer.report.files import write_files
from streamer.report.subject import make_subject, open_subject
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
        ("r.pdf", UsageError, "expected a page, whose name ends in .html, or a directory for figures"),
        ("file", OutputError, "not a directory"),
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


def test_figures_without_matplotlib(findings: Findings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'intruder-streamer\[plots\]'"):
        write_files(make_subject(findings), tmp_path / "figures")
    assert names(tmp_path) == []
    write_files(make_subject(findings), tmp_path / "r.html")


class Figures(NamedTuple):
    """A few findings, an evaluation, and the figures of both."""

    few: Findings
    evaluation: Evaluation
    drawn: dict[str, bytes]


@pytest.fixture(scope="module")
def figures(findings: Findings) -> Figures:
    pytest.importorskip("matplotlib")
    few, evaluation = findings.select("*layers.0.*"), of_findings(findings)
    return Figures(few, evaluation, draw_figures(make_subject(few, evaluation)))


@pytest.mark.long
def test_figures_as_svg_and_png(figures: Figures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, evaluation, again = figures
    streamer.write_report(few, tmp_path / "f", evaluation=evaluation)
    stems = {"map", "similarity", "spectrum", "thresholds", "tradeoff"}
    assert set(names(tmp_path / "f")) == {f"{stem}.{image_format}" for stem in stems for image_format in ("svg", "png")}
    for stem in stems:
        root = ET.fromstring((tmp_path / "f" / f"{stem}.svg").read_text())
        assert len(list(root.iter())) > 50
        assert (tmp_path / "f" / f"{stem}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert {name: (tmp_path / "f" / name).read_bytes() for name in again} == again, "the same bytes"
    (tmp_path / "f" / "notes.txt").write_text("mine")
    monkeypatch.setattr("streamer.report.files.draw_figures", lambda _: again)
    (tmp_path / "f" / "map.svg").write_bytes(again["map.svg"].replace(b"e", b"E", 1))
    (tmp_path / "f" / "map.png").write_bytes(again["map.png"] + b"\0")
    assert write_files(make_subject(few, evaluation), tmp_path / "f", overwrite=True).state == "written"
    (tmp_path / "f" / "map.png").write_text("not a picture of ours, which streamer report draws")
    before = tree_digest(tmp_path)
    with pytest.raises(OutputExistsError, match=r"map\.png: exists and is not a report"):
        write_files(make_subject(few, evaluation), tmp_path / "f", overwrite=True)
    assert tree_digest(tmp_path) == before


def test_the_tradeoff_shows_or_names_every_variant() -> None:
    """Some keep or forget more than the adapter, and some are outside of the frame."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    made = evaluation(
        {
            "paper": lambda x: (1.15 - 0.1 * x, 1.15 * x),
            "shrink": lambda x: (x, 1 + x),
            "project": lambda x: (-0.6 * x, x),
        },
        noise=0,
    )
    _draw_tradeoff(figure, made)
    (ax,) = figure.axes
    named = figure.get_supxlabel().replace("\n", " ")
    least, most = ax.get_xlim()
    for v in made.to_dict()["variants"]:
        inside = -0.05 <= v["kept"] <= 1.2 and -0.3 <= v["forgetting"] <= 1.4
        assert (f"{v['name']} (kept" in named) != inside
        if inside:
            assert least <= 100 * (v["kept"] - v["kept_se"])
            assert 100 * (v["kept"] + v["kept_se"]) <= most
            assert ax.get_ylim()[0] <= 100 * v["forgetting"] <= ax.get_ylim()[1]
    assert "project 0.9 (kept 90%, left -54%)" in named, "what forgets less than the base by more than the frame holds"
    assert named.startswith("Outside the frame: shrink 0.9 (kept 190%, left 90%), ")
    assert most > 103


def test_no_tradeoff_without_shares(findings: Findings) -> None:
    """Texts that are too short show neither learning nor forgetting: the picture would be empty."""
    pytest.importorskip("matplotlib")
    few, noisy = findings.select("*layers.0.*"), evaluation({"shrink": lambda x: (x, 1 + x)}, noise=1e3)
    noisy = replace(noisy, facts=of_findings(findings).facts)
    assert all(v["kept"] is None for v in noisy.shown_variants())
    drawn = draw_figures(make_subject(few, noisy))
    assert {name.partition(".")[0] for name in drawn} == {"map", "similarity", "spectrum", "thresholds"}


def test_labels_of_the_tradeoff_do_not_overlap() -> None:
    """Variants in nearly the same place need labels on other sides, or none; the suggested variant keeps its own."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    crowded = evaluation({name: lambda x: (0.9 + 0.01 * x, 0.5 + 0.01 * x) for name in ("paper", "project")}, noise=0)
    _draw_tradeoff(figure, crowded)
    texts = figure.axes[0].texts
    boxes, names = [text.get_window_extent() for text in texts], {text.get_text() for text in texts}
    assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i])
    best = crowded.best().variant
    assert best is not None
    assert {"base", "adapter", best.name.split()[-1]} <= names


@pytest.mark.parametrize("layers", [6, 40])
def test_no_label_of_a_map_of_two_rows_is_cut_above_or_below(layers: int) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    make = pytest.importorskip("matplotlib.figure").Figure
    names = [f"model.layers.{i}.self_attn.{part}.weight" for i in range(layers) for part in ("q_proj", "v_proj")]
    with matplotlib.rc_context(_SETTINGS):
        figure = make(layout="constrained")
        _draw_output_map(figure, names, [1] * len(names), [0.5] * len(names))
        figure.draw_without_rendering()
    for ax in figure.axes:
        box = ax.get_tightbbox()
        assert box.y0 >= -1
        assert box.y1 <= figure.bbox.height + 1


def test_the_figure_of_a_shrink_has_no_map_of_intruders(
    pair: tuple[Path, Path], findings: Findings, tmp_path: Path
) -> None:
    """It scales none: their map would be empty, beside that of the norms."""
    pytest.importorskip("matplotlib")
    streamer.reduce_intruder_dimension(*pair, tmp_path / "paper", findings=findings)
    streamer.reduce_intruder_dimension(*pair, tmp_path / "shrink", method="shrink")
    for name, maps in (("paper", 2), ("shrink", 1)):
        write_files(open_subject(tmp_path / name), tmp_path / f"{name} figures")
        axes = ET.fromstring((tmp_path / f"{name} figures" / "map.svg").read_text()).iterfind(".//*[@id]")
        assert sum(node.attrib["id"].startswith("axes_") for node in axes) == 2 * maps, "each with its scale"


def test_figures_that_a_report_has_not_are_removed_with_the_old_ones(
    figures: Figures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, drawn = make_subject(figures.few), {n: data for n, data in figures.drawn.items() if "tradeoff" not in n}
    monkeypatch.setattr("streamer.report.files.draw_figures", lambda _: drawn)
    (tmp_path / "f").mkdir()
    for name, data in {**drawn, "tradeoff.svg": drawn["spectrum.svg"], "tradeoff.png": drawn["spectrum.png"]}.items():
        (tmp_path / "f" / name).write_bytes(data)
    (tmp_path / "f" / "notes.svg").write_text("mine")
    before = tree_digest(tmp_path)
    with pytest.raises(OutputExistsError, match=r"tradeoff\.svg: belongs to another report, and this one lacks it;"):
        write_files(few, tmp_path / "f")
    assert tree_digest(tmp_path) == before
    assert write_files(few, tmp_path / "f", overwrite=True).state == "written"
    assert "notes.svg" in names(tmp_path / "f")
    assert not any("tradeoff" in name for name in names(tmp_path / "f"))
    (tmp_path / "f" / "tradeoff.png").write_text("mine too")
    assert write_files(few, tmp_path / "f").state == "present"


@pytest.mark.parametrize("name", ["r.html", "figures", "new/r.html", "new/figures"])
def test_nothing_is_written_into_a_complete_output(
    pair: tuple[Path, Path], findings: Findings, tmp_path: Path, name: str
) -> None:
    streamer.reduce_intruder_dimension(*pair, tmp_path / "out", findings=findings)
    before = tree_digest(tmp_path)
    with pytest.raises(OutputError, match=r"lies inside the output .*/out, which is complete: its streamer.json lists"):
        write_files(make_subject(findings), tmp_path / "out" / name)
    assert tree_digest(tmp_path) == before
