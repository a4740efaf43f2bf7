"""The package: what is declared, what the source distribution holds, and what is said where another project's `streamer` is imported."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import streamer

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
AGAIN = "pip install --force-reinstall --no-deps intruder-streamer"


# Another project of the same name -------------------------------------------------------------------------------------


def entry(path: Path, *args: str) -> tuple[int, str, str]:
    """Run the command's entry with a directory in front of all others on the path, and no installed packages behind it."""
    env = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-P", "-S", str(ROOT / "intruder_streamer.py"), *args]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    return done.returncode, done.stdout, done.stderr


def foreign(home: Path, init: str = "", metadata: bool = True) -> Path:
    """A package called `streamer` that is another project's."""
    (home / "streamer").mkdir(parents=True, exist_ok=True)
    (home / "streamer" / "__init__.py").write_text(init)
    if metadata:
        info = home / "streamer-1.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: streamer\nVersion: 1.1\n")
        (info / "top_level.txt").write_text("streamer\n")
    return home


def test_nothing_of_that_name(tmp_path: Path) -> None:
    assert entry(tmp_path) == (1, "", f"intruder-streamer: its package `streamer` is not installed; {AGAIN}\n")


@pytest.mark.parametrize("init", ["", "import bs4_that_is_not_there", "1/0", "print 'python 2'", "__version__ = '3'"])
def test_another_projects_package_is_recognised(tmp_path: Path, init: str) -> None:
    code, out, err = entry(foreign(tmp_path, init), "--help")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    where = tmp_path / "streamer" / "__init__.py"
    assert err.startswith(
        f"intruder-streamer: `import streamer` finds {where}, a package of another project (streamer 1.1); "
    )
    assert err.endswith(f"or pip uninstall streamer and {AGAIN}\n")


def test_its_files_in_place_of_ours(tmp_path: Path) -> None:
    """As pip leaves them when it is installed after: its two files, and ours around them."""
    shutil.copytree(ROOT / "streamer", tmp_path / "streamer")
    code, out, err = entry(foreign(tmp_path), "--help")
    assert (code, out) == (1, "")
    assert "a package of another project (streamer 1.1)" in err


def test_our_files_without_those_that_it_took_along(tmp_path: Path) -> None:
    """As pip leaves them when it is uninstalled after."""
    shutil.copytree(ROOT / "streamer", tmp_path / "streamer")
    (tmp_path / "streamer" / "__init__.py").unlink()
    code, out, err = entry(tmp_path, "--help")
    assert (code, out) == (1, "")
    assert err.startswith(f"intruder-streamer: files of its package are missing from {tmp_path / 'streamer'}, ")
    assert err.endswith(f"; {AGAIN}\n")


def test_a_users_own_file_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "streamer.py").write_text("")
    code, _, err = entry(tmp_path, "--help")
    assert code == 1
    assert f"finds {tmp_path / 'streamer.py'}, which is not of this project; rename it, or take it off the path" in err


def test_the_entry_runs_the_command() -> None:
    code, out, err = entry(ROOT, "--version")
    assert (code, out, err) == (0, f"streamer {streamer.__version__}\n", "")


# What is declared -------------------------------------------------------------------------------------------------------


def test_versions_agree() -> None:
    version = streamer.__version__
    assert PROJECT["version"] == version
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_both_commands_and_the_extras() -> None:
    assert PROJECT["scripts"] == dict.fromkeys(("streamer", "intruder-streamer"), "intruder_streamer:main")
    assert "pandas" in PROJECT["optional-dependencies"]


def test_the_source_distribution_is_told_of_every_file() -> None:
    """Of what is tracked, `MANIFEST.in`, the package and pip's own rules name all but what only a checkout needs."""
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    grafted = {word for kind, *words in lines for word in words if kind == "graft"}
    included = {word for kind, *words in lines for word in words if kind == "include"}
    always = {"README.md", "LICENSE", "pyproject.toml", "MANIFEST.in", "intruder_streamer.py", "streamer", ".gitignore"}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    tops = {name.split("/")[0] for name in tracked if name}
    assert tops <= grafted | included | always
