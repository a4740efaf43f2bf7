"""Odd surroundings of a command: Python's options, streams of few characters, variables that are unset, a directory that is gone."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
from command_line import ENV
from learned import make_learned

import streamer
from streamer.errors import UsageError


def run(*argv: object, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "streamer", *map(str, argv)]
    environment = {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), **ENV, **variables}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, check=False)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return helpers.one_file(tmp_path_factory.mktemp("inputs"))


def test_without_docstrings(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    done = run("merge", *inputs, "-o", tmp_path / "out", PYTHONOPTIMIZE="2")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


@pytest.mark.long
@pytest.mark.parametrize(
    ("variables", "code", "said"),
    [
        ({"PYTHONWARNINGS": "error"}, 0, ""),  # torch and transformers warn when they are imported
        (
            {"PYTHONOPTIMIZE": "2"},
            3,
            "; run Python without -OO, which removes docstrings\n",
        ),  # transformers reads its own
    ],
)
def test_transformers_under_options_of_python(tmp_path: Path, variables: dict[str, str], code: int, said: str) -> None:
    home = make_learned(tmp_path)
    texts = ["--general", home / "general.npy", "--task", home / "task.npy", "--length", 8, "--method", "shrink"]
    done = run("evaluate", home / "base", home / "adapter", *texts, "-o", tmp_path / "e.json", "-qq", **variables)
    assert (done.returncode, done.stderr.count("\n"), done.stderr.endswith(said)) == (code, code // 3, True), (
        done.stderr
    )


def test_a_stdout_of_few_characters(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Paths may have characters that ASCII lacks, and so have some tables."""
    base, adapter = inputs
    named = Path(shutil.copytree(adapter, tmp_path / "ünï±"))
    done = run("mitigate", base, named, "-o", tmp_path / "out±", "--lambda", "0.5", PYTHONIOENCODING="ascii")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert r"out\xb1" in done.stdout


def test_files_are_in_utf8_whatever_the_locale_says(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    named = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    config = json.loads((named / "adapter_config.json").read_bytes())
    (named / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "Zoë"}, ensure_ascii=False), "utf-8"
    )
    (named / "README.md").write_text("# Für alle", "utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for argv in (["merge", base, named, "-o", tmp_path / "out"], ["verify", tmp_path / "out", base, named]):
        done = run(*argv, **ascii_only)
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


@pytest.mark.parametrize("place", ["BASE", "--output"])
def test_an_empty_argument(inputs: tuple[Path, Path], tmp_path: Path, place: str) -> None:
    """An unset variable of the shell gives one."""
    base, adapter = inputs
    argv = ["inspect", "", adapter] if place == "BASE" else ["merge", base, adapter, "--output="]
    done = run(*argv, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("streamer: an argument is empty; ")
    assert os.listdir(tmp_path) == []


def test_a_current_directory_that_is_gone(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """MKL would abort."""
    (tmp_path / "gone").mkdir()
    line = f'cd "$0" && rmdir "$0" && exec {shlex.quote(sys.executable)} -m streamer inspect "$1" "$2"'
    environment = {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), **ENV}
    command = ["sh", "-c", line, tmp_path / "gone", *inputs]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 6
    assert "streamer: the current directory: No such file or directory; " in done.stderr


def test_control_characters_of_a_path_are_escaped(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    done = run("mitigate", *inputs, "-o", tmp_path / "red\x1b[31m", "--lambda", "0.5")
    assert done.returncode == 0
    assert r"red\x1b[31m" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


def test_a_sample_needs_inputs(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    streamer.merge_with_reduced_intruder_dimensions(*inputs, tmp_path / "out")
    with pytest.raises(UsageError, match="sample: 'all' recomputes matrices from BASE and ADAPTER"):
        streamer.verify_output(tmp_path / "out", sample="all")
