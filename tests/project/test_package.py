"""The package: what is declared, and what the source distribution holds."""

from __future__ import annotations

import re
import subprocess
import tomllib

from paths import ROOT

import streamer

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


# What is declared -------------------------------------------------------------------------------------------------------


def test_versions_agree() -> None:
    version = streamer.__version__
    assert PROJECT["version"] == version
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_both_commands_and_the_extras() -> None:
    assert PROJECT["scripts"] == dict.fromkeys(("streamer", "intruder-streamer"), "streamer.cli.main:main")
    assert "pandas" in PROJECT["optional-dependencies"]


def test_the_source_distribution_is_told_of_every_file() -> None:
    """Of what is tracked, `MANIFEST.in`, the package and pip's own rules name all but what only a checkout needs."""
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    grafted = {word for kind, *words in lines for word in words if kind == "graft"}
    included = {word for kind, *words in lines for word in words if kind == "include"}
    always = {"README.md", "LICENSE", "pyproject.toml", "MANIFEST.in", "streamer", ".gitignore"}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    tops = {name.split("/")[0] for name in tracked if name}
    assert tops <= grafted | included | always
