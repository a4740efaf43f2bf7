"""What the documentation says is so: its commands exist, its Python runs, its demo output is what the demo prints."""

from __future__ import annotations

import argparse
import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
from helpers import run_cli

import streamer
from streamer.cli.parser import build_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def subparsers() -> dict[str, argparse.ArgumentParser]:
    actions = build_parser()._actions
    return next(a for a in actions if isinstance(a, argparse._SubParsersAction)).choices


@pytest.mark.parametrize("command", sorted(subparsers()))
def test_every_command_is_in_the_readme(command: str) -> None:
    assert re.search(rf"streamer {command}\b", README)


def test_every_option_in_the_readme_exists() -> None:
    known = {o for p in (build_parser(), *subparsers().values()) for a in p._actions for o in a.option_strings}
    shell = "\n".join(line for line in README.splitlines() if "streamer" in line or line.startswith("- `--"))
    used = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", shell)) - {"--quiet"}
    assert used - known - {"--hidden", "--intermediate"} <= {"--pairs", "--double", "--size-gb", "--shards"}
    assert {"--lambda", "--method", "--scale", "--top-k", "--epsilon", "--findings", "--json"} <= used


def test_every_option_has_help() -> None:
    for name, parser in subparsers().items():
        for action in parser._actions:
            assert action.help, f"streamer {name}: {action.dest} has no help"


def test_the_table_of_encodings_is_the_registrys() -> None:
    from streamer.bases.registry import table

    rows = ["| " + " | ".join(row) + " |" for row in table()]
    assert len(rows) > 6
    assert "\n".join(rows) in README


def test_the_readmes_python_runs(job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {"base": job[0], "adapter": job[1]})
    assert (tmp_path / "mitigated" / "adapter_config.json").exists()
    assert (tmp_path / "merged" / "model.safetensors.index.json").exists()


def test_the_demo_prints_what_the_readme_shows() -> None:
    done = run_cli("demo")
    assert done.returncode == 0, done.stderr
    shown = next(b for b in blocks("text") if "streamer demo" in b)

    def counts(text: str) -> list[tuple[str, ...]]:
        return [tuple(line.split()[:4]) for line in text.splitlines() if line.startswith(("model.", "all "))]

    assert counts(shown) == counts(done.stdout)
    assert len(counts(shown)) > 10


def test_the_demo_finds_exactly_what_it_planted() -> None:
    import json

    tree = json.loads(run_cli("demo", "--json", "--lambda", "0").stdout)
    assert tree["totals"]["planted"] == tree["totals"]["found"] == 16
    assert all(row["planted"] == row["found"] for row in tree["matrices"])
    assert tree["totals"]["left"] == 0


@pytest.mark.parametrize(
    "name",
    [m.name for m in pkgutil.walk_packages(streamer.__path__, "streamer.") if "__main__" not in m.name] + ["streamer"],
)
def test_docstring_examples_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_public_names_resolve_and_are_documented() -> None:
    assert streamer.__all__ == sorted(streamer.__all__)
    for name in streamer.__all__:
        assert getattr(streamer, name).__doc__, name
    assert not hasattr(streamer, "no_such_name")


def test_the_table_of_kinds_is_the_registrys() -> None:
    from streamer.support import support_table

    assert support_table() in (ROOT / "README.md").read_text()
