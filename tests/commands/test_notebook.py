"""The notebook on a live model runs, cell after cell, as Python."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pandas
import pytest
from paths import ROOT

import streamer

NOTEBOOK = json.loads((ROOT / "docs" / "live-model.ipynb").read_text())
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def run_cell(source: str, namespace: dict[str, Any]) -> Any:
    """Run a cell, and return the value of its last expression, which a notebook shows."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "live-model.ipynb", "exec"), namespace)
    return None if last is None else eval(compile(ast.Expression(last.value), "live-model.ipynb", "eval"), namespace)


@pytest.mark.long
def test_the_notebook_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pictures: list[Any] = []
    namespace: dict[str, Any] = {"display": lambda image: pictures.append(image.copy())}
    shown = [value for source in CELLS if (value := run_cell(source, namespace)) is not None]
    findings, diff = namespace["findings"], namespace["diff"]
    assert len(findings) == 18
    assert findings.intruders > 4
    assert diff.count("gone") > findings.intruders / 2
    assert len(pictures) == 3
    for picture in pictures:
        assert picture.width > 600
        assert len(picture.convert("L").getcolors()) > 20
    assert not namespace["home"].exists()
    assert namespace["model"].active_adapter == "reduced"
    kinds = [type(value) for value in shown]
    assert kinds == [
        str,
        streamer.Findings,
        pandas.DataFrame,
        str,
        streamer.FindingsDiff,
        pandas.DataFrame,
        pandas.DataFrame,
    ]
    measured = shown[-1]
    assert measured.loc["reduced", "moved from the base"] < measured.loc["default", "moved from the base"]


def test_what_stands_below_its_cells_has_no_error() -> None:
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert kinds
    assert set(kinds) <= {"display_data", "execute_result"}
