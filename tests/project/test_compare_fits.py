"""The table of what fits leave is made of measured points, and the whole tool runs."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import compare_fits
import pytest
from line_figure import line_figure
from tool_calls import call_tool


def test_what_is_left_is_read_off_measured_points() -> None:
    points = [(0.9, 0.6), (0.8, 0.4), (0.5, 0.1)]
    assert compare_fits.left_at(points, 0.8) == pytest.approx(0.4)
    assert 0.4 < compare_fits.left_at(points, 0.85) < 0.6
    assert 0.6 < compare_fits.left_at(points, 0.95) < 1.0
    assert compare_fits.left_at(points, 0.4) is None
    assert compare_fits.left_at([], 0.9) is None
    # What keeps more though it is stronger is left out, and all after it.
    assert compare_fits.left_at([(0.9, 0.6), (0.95, 0.2), (0.7, 0.1)], 0.8) is None


def test_the_table_has_means_with_errors_over_seeds() -> None:
    def one(seed: int, left: float) -> dict:
        points = {method: [(0.9, left), (0.5, 0.1)] for method in compare_fits.COLUMNS}
        points["shrink"] = [(0.9, 2 * left), (0.5, 0.2)]
        points["paper"] = [(0.95, 0.9)]
        return {"kind": "llama", "adapter": "high", "seed": seed, "points": points}

    lines = compare_fits.table([one(0, 0.2), one(1, 0.3)], (0.9,)).splitlines()
    assert lines[2] == "| llama | high | 90% | 25 ± 5 | 25 ± 5 | 25 ± 5 | 25 ± 5 | 50 ± 10 | 25 ± 5 | – |"
    assert lines[3].startswith("| mean | | 90% | 25 | 25 | 25 | 25 | 50 | 25 | – |")
    assert lines[4].startswith("| by inputs / shrink | | 90% | 0.50 |")
    assert lines[5].startswith("| by direction / shrink | | 90% | 0.50 |")
    words = compare_fits.kept_on_test([one(0, 0.2), one(1, 0.3)], (0.9,))
    assert words.startswith(
        "asked to keep 90%, on the test text they keep, in percent: by inputs 90.0 (90 to 90), by direction"
    )


def test_an_adapter_that_was_refused_is_a_row_without_figures() -> None:
    points = {method: [] for method in compare_fits.COLUMNS}
    result = [{"kind": "qwen", "adapter": "mild", "seed": 0, "points": points}]
    assert "| qwen | mild | 90% | – | – | – | – | – | – | – |" in compare_fits.table(result, (0.9,))
    assert compare_fits.kept_on_test(result, (0.9,)).endswith("in percent: ")


def test_lines_are_drawn_within_the_picture() -> None:
    text = line_figure({"one": [(2.0, 0.9), (4.0, 0.5)], "two": [(2.0, 1.2), (8.0, 0.5)]}, "passes", "left")
    root = ET.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{space}polyline")) == 2
    assert len(root.findall(f"{space}circle")) == 4
    width, height = float(root.get("width")), float(root.get("height"))
    for circle in root.findall(f"{space}circle"):
        assert 0 < float(circle.get("cx")) < width
        assert 0 < float(circle.get("cy")) < height
    words = [t.text for t in root.findall(f"{space}text")]
    assert {"one", "two", "passes", "left", "0.25", "8"} <= set(words)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_all_is_trained_fitted_measured_and_drawn(tmp_path: Path) -> None:
    arguments = ("--tiny", "--kinds", "llama", "--adapters", "high", "--seeds", 1, "--sequences", 16, "--length", 64)
    done = call_tool("compare_fits", tmp_path / "made", *arguments, "--figure", tmp_path / "passes.svg")
    assert done.returncode == 0, done.stderr
    assert "| llama | high | 90% |" in done.stdout
    assert "by direction" in done.stdout
    assert ET.parse(tmp_path / "passes.svg").getroot().get("width")
    again = call_tool("compare_fits", tmp_path / "made", *arguments)
    assert again.stdout == done.stdout
