"""The notebook on a live model runs, cell after cell, as Python."""

import ast
import json
import re
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
    namespace: dict[str, Any] = {}
    shown = [value for source in CELLS if (value := run_cell(source, namespace)) is not None]
    findings, diff = namespace["findings"], namespace["diff"]
    assert len(findings) == 18
    assert findings.intruders > 4
    assert diff.count("gone") > findings.intruders / 2
    assert not namespace["home"].exists()
    kinds = [type(value) for value in shown]
    assert kinds == [
        str, streamer.Findings, pandas.DataFrame, str, streamer.FindingsDiff, pandas.DataFrame, pandas.DataFrame,
    ]  # fmt: skip
    measured = shown[-1]
    moved = measured["moved from the base"]
    assert moved["base"] < moved["paper 0.5"] < moved["adapter"]
    for share in (0.75, 0.5, 0.3):  # what the text below the table says
        assert (
            measured["loss"][f"shrink {share}"] <= measured["loss"][f"paper {share}"] + 1e-3
        )  # kernels differ by less
        assert moved[f"shrink {share}"] < moved[f"paper {share}"]


def test_what_stands_below_its_cells_has_no_error() -> None:
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert kinds
    assert set(kinds) <= {"display_data", "execute_result"}


def run_notebook(directory: Path, *sources: str) -> tuple[list[Any], list[Any]]:
    """Execute cells in a kernel, and return what each shows, and the widgets at the end."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("ipywidgets")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(directory)}}).execute()
    widgets = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    return [cell.outputs for cell in notebook.cells], [one["state"] for one in widgets.values()]


@pytest.mark.long
def test_a_call_in_a_notebook_shows_a_bar(job: tuple[Path, Path], tmp_path: Path) -> None:
    """By default; not if the caller takes the events, and not if it is declined."""
    call = f"streamer.detect_intruder_dimensions({str(job[0])!r}, {str(job[1])!r}"
    (default, heard, declined), widgets = run_notebook(
        tmp_path, f"import streamer; _ = {call})", f"_ = {call}, on_event=print)", f"_ = {call}, progress=False)"
    )
    (bar,) = [output.data for output in default if output.output_type == "display_data"]
    assert "application/vnd.jupyter.widget-view+json" in bar
    assert re.match(r"detect \d/9 matrices +\d+%\|", bar["text/plain"])
    (drawn,) = [one for one in widgets if one["_model_name"] == "FloatProgressModel"]
    assert (drawn["value"], drawn["max"], drawn["bar_style"]) == (9, 9, "success")
    texts = [re.sub(r"\s", " ", one["value"]) for one in widgets if one["_model_name"] == "HTMLModel"]
    assert "detect 9/9 matrices 100%" in texts
    assert any(re.fullmatch(r" 00:0\d&lt;00:00, +\S+matrix/s", text) for text in texts)
    assert [output.output_type for output in heard] == ["stream"]
    assert declined == []
