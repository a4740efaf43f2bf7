"""What the documentation says is so: its commands exist, its Python runs, its demo output is what the demo prints."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
from arguments import subparsers
from command_line import run_cli
from paths import ROOT

import streamer
from streamer.cli.parser import build_parser

README = (ROOT / "README.md").read_text()
PAGES = {
    p.name: p.read_text() for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("command", sorted(subparsers()))
def test_every_command_is_in_the_readme(command: str) -> None:
    assert re.search(rf"streamer {command}\b", README)


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_option_of_streamer_in_the_docs_exists(page: str) -> None:
    known = {o for p in (build_parser(), *subparsers().values()) for a in p._actions for o in a.option_strings}
    commands = "|".join(subparsers())
    lines = re.findall(rf"(?:streamer )?\b(?:{commands})\b[^`\n]*", PAGES[page])
    used = {
        option for line in lines for option in re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", line) if "bench" not in line
    }
    assert used <= known


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_link_leads_somewhere(page: str) -> None:
    folder = ROOT if page in ("README.md", "CONTRIBUTING.md") else ROOT / "docs"
    for target in re.findall(r"\]\(([^)#]+)", PAGES[page]):
        assert target.startswith("https://") or (folder / target).exists(), target


def test_every_source_file_named_in_the_docs_exists() -> None:
    for page, text in PAGES.items():
        for path in re.findall(r"`((?:streamer|tests|tools)/[\w/.-]+\.\w+)", text):
            assert (ROOT / path).exists(), f"{page}: {path}"


def test_the_messages_in_troubleshooting_are_the_programs() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "streamer").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a message over several lines is one
    rows = re.findall(r"^\| (.*?) \| ", PAGES["troubleshooting.md"], re.MULTILINE)
    quoted = [text for row in rows for text in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 30
    assert [text for text in quoted if text not in source] == []


def test_every_option_has_help() -> None:
    for name, parser in subparsers().items():
        for action in parser._actions:
            assert action.help, f"streamer {name}: {action.dest} has no help"


def test_the_table_of_encodings_is_the_registrys() -> None:
    from tools.support_tables import encodings_table

    assert encodings_table().count("\n") > 6
    assert encodings_table() in PAGES["support.md"]


def test_the_readmes_commands_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line, in order, in one directory; then the Python."""
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("streamer ")]
    assert {line.split()[1] for line in lines} >= {"demo", "inspect", "detect", "report", "mitigate", "merge"}
    for line in lines:
        done = run_cli(*line.split()[1:], cwd=tmp_path)
        assert done.returncode == 0, f"{line}: {done.stderr}"
    assert (tmp_path / "mitigated" / "adapter_config.json").exists()
    assert (tmp_path / "merged" / "model.safetensors.index.json").exists()
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "merged-0.5" / "model.safetensors.index.json").exists()


@pytest.mark.long
def test_the_demo_prints_what_the_readme_shows() -> None:
    done = run_cli("demo")
    assert done.returncode == 0, done.stderr
    (shown,) = blocks("text")

    def counts(text: str) -> list[tuple[str, ...]]:
        return [tuple(line.split()[:4]) for line in text.splitlines() if line.startswith(("model.", "all "))]

    assert counts(shown) == counts(done.stdout)
    assert len(counts(shown)) > 10


@pytest.mark.long
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
    from tools.support_tables import support_table

    assert support_table() in PAGES["support.md"]
