"""Documents that run: the notebook on a live model, cell after cell; workflow systems, as docs/shell.md has them, on real files."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import helpers
import pandas
import pytest
from command_line import ENV
from helpers import tree_digest
from paths import ROOT

import streamer

NOTEBOOK = json.loads((ROOT / "docs" / "live-model.ipynb").read_text())
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def run_cell(source: str, namespace: dict[str, Any]) -> Any:
    """Run a cell, and return the value of its last expression, which a notebook shows."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "live-model.ipynb", "exec"), namespace)
    return (
        None
        if last is None
        else eval(compile(ast.Expression(last.value), "live-model.ipynb", "eval"), namespace)
    )


@pytest.mark.long
def test_the_notebook_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    namespace: dict[str, Any] = {}
    shown = [value for source in CELLS if (value := run_cell(source, namespace)) is not None]
    findings = namespace["findings"]
    after = namespace["after"]
    assert len(findings) == 18
    assert findings.intruders > 4
    assert after.intruders < findings.intruders / 2
    assert not namespace["home"].exists()
    kinds = [type(value) for value in shown]
    assert kinds == [
        str,
        streamer.Findings,
        str,
        tuple,
        pandas.DataFrame,
    ]
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
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("ipywidgets")
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in sources]
    )
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(directory)}}
    ).execute()
    widgets = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    return [cell.outputs for cell in notebook.cells], [one["state"] for one in widgets.values()]


@pytest.mark.long
def test_a_call_in_a_notebook_shows_a_bar(job: tuple[Path, Path], tmp_path: Path) -> None:
    """By default; not if the caller takes the events, and not if it is declined."""
    call = f"streamer.detect_intruder_dimensions({str(job[0])!r}, {str(job[1])!r}"
    (default, heard, declined), widgets = run_notebook(
        tmp_path,
        f"import streamer; _ = {call})",
        f"_ = {call}, on_event=print)",
        f"_ = {call}, progress=False)",
    )
    (bar,) = [output.data for output in default if output.output_type == "display_data"]
    assert "application/vnd.jupyter.widget-view+json" in bar
    assert re.match(r"detect \d/9 matrices +\d+%\|", bar["text/plain"])
    (drawn,) = [one for one in widgets if one["_model_name"] == "FloatProgressModel"]
    assert (drawn["value"], drawn["max"], drawn["bar_style"]) == (9, 9, "success")
    texts = [
        re.sub(r"\s", " ", one["value"]) for one in widgets if one["_model_name"] == "HTMLModel"
    ]
    assert "detect 9/9 matrices 100%" in texts
    assert any(re.fullmatch(r" 00:0\d&lt;00:00, +\S+matrix/s", text) for text in texts)
    assert [output.output_type for output in heard] == ["stream"]
    assert declined == []


STREAMER = f"{sys.executable} -m streamer"
PAGE = (ROOT / "docs" / "shell.md").read_text()


def block(language: str, before: str) -> str:
    """The block of a language in docs/shell.md, which runs here as it stands there, but for how the command is called."""
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert f"{before}streamer " in text
    return text.replace(f"{before}streamer ", f"{before}{STREAMER} ")


# Targets of both kinds: a file of an output, and its directory.
MAKEFILE = block("make", "\t")
SNAKEFILE = block("python", 'shell: "')

OUTPUTS = ("build", "merged-0.5", "merged-0.25", "adapter-0.5")
"""Of both; what one does not make has no files."""
QUIET = {**ENV, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def digests(home: Path) -> dict[str, dict[str, str]]:
    return {name: tree_digest(home / name) for name in OUTPUTS}


def touch(path: Path) -> None:
    time.sleep(0.02)  # a tick of the file system's clock
    os.utime(path)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_runs_what_is_needed_and_then_nothing(tmp_path: Path) -> None:
    def make() -> int:
        """How many commands `make -j2` ran."""
        line = ["make", "-j2", "--no-print-directory"]
        done = subprocess.run(
            line, cwd=tmp_path, capture_output=True, text=True, env=QUIET, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout.count(STREAMER)

    helpers.three_shards(tmp_path)
    (tmp_path / "Makefile").write_text(MAKEFILE)
    assert make() == 3
    made = digests(tmp_path)
    assert make() == 0
    touch(tmp_path / "adapter" / "adapter_config.json")
    assert make() == 3  # each finds its output there and gives it the time of now
    assert make() == 0
    assert digests(tmp_path) == made
    (tmp_path / "merged-0.5" / "model.safetensors.index.json").unlink()
    assert make() == 1  # a target that was removed is made again
    assert digests(tmp_path) == made


@pytest.mark.slow
def test_snakemake_runs_what_is_needed_and_then_nothing(tmp_path: Path) -> None:
    pytest.importorskip("snakemake")

    def snakemake(*options: str) -> str:
        line = [sys.executable, "-m", "snakemake", "--cores", "2", *options]
        env = {**QUIET, "XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
        done = subprocess.run(
            line, cwd=tmp_path, capture_output=True, text=True, env=env, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    helpers.three_shards(tmp_path)
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    assert "This was a dry-run" in snakemake("-n")
    assert not (tmp_path / "build").exists()
    snakemake()
    made = digests(tmp_path)
    assert "Nothing to be done" in snakemake("-n")
    snakemake("--forceall")
    assert "Nothing to be done" in snakemake("-n")
    assert digests(tmp_path) == made
