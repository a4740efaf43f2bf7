"""What the documentation says is so: commands, options, links and examples; docstrings and signatures of the public names."""

import doctest
import importlib
import inspect
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from arguments import subparsers
from command_line import ENV
from forks import Server
from paths import ROOT

import streamer
from streamer.cli.parser import build_parser

README = (ROOT / "README.md").read_text()
PAGES = {
    p.name: p.read_text()
    for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def anchors(text: str) -> list[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("command", sorted(subparsers()))
def test_every_command_is_in_the_readme(command: str) -> None:
    assert re.search(rf"streamer {command}\b", README)


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_option_of_streamer_in_the_docs_exists(page: str) -> None:
    known = {
        o
        for p in (build_parser(), *subparsers().values())
        for a in p._actions
        for o in a.option_strings
    }
    commands = "|".join(subparsers())
    lines = re.findall(rf"(?:streamer )?\b(?:{commands})\b[^`\n]*", PAGES[page])
    used = {
        option
        for line in lines
        for option in re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", line)
        if "bench" not in line
    }
    assert used <= known
    for command, rest in re.findall(rf"streamer ({commands})\b([^`\n|]*)", PAGES[page]):
        own = {
            option for action in subparsers()[command]._actions for option in action.option_strings
        }
        assert {*re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", rest)} <= own, f"{command}{rest}"


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_link_leads_somewhere(page: str) -> None:
    folder = ROOT if page in ("README.md", "CONTRIBUTING.md") else ROOT / "docs"
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", PAGES[page]):
        assert target.startswith("https://") or (folder / target).exists(), target
        if anchor and not target.startswith("https://"):
            assert anchor in anchors((folder / target).read_text() if target else PAGES[page]), (
                f"{target}#{anchor}"
            )


def test_every_source_file_named_in_the_docs_exists() -> None:
    for page, text in PAGES.items():
        for path in re.findall(r"`((?:streamer|tests|tools|examples)/[\w/.-]+\.\w+)", text):
            assert (ROOT / path).exists(), f"{page}: {path}"


def test_both_listings_of_the_package_name_every_folder_in_its_order() -> None:
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ][0]["layers"]
    rank = {name: i for i, layer in enumerate(reversed(layers)) for name in layer.split(" | ")}
    folders = {path.parent.name for path in (ROOT / "streamer").glob("*/__init__.py")}
    for text, form in (
        (PAGES["CONTRIBUTING.md"], r"^\| `(\w+)/` \|"),
        (streamer.__doc__ or "", r"^    (\w+)/ "),
    ):
        listed = [name for name in re.findall(form, text, re.MULTILINE) if name in rank]
        assert set(listed) == folders
        assert listed == sorted(listed, key=rank.__getitem__)


def test_the_messages_in_troubleshooting_are_the_programs() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "streamer").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a message over several lines is one
    rows = re.findall(r"^(?:\|(.*?) \| |- (?=`)(.*?): )", PAGES["troubleshooting.md"], re.MULTILINE)
    quoted = [text for row in rows for text in re.findall(r"`([^`]+)`", "".join(row))]
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


@pytest.mark.long
def test_the_readmes_commands_run_in_order(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every line in one directory, of half the layers and a tenth of the training; then the Python. Lines that install are .ci/run's."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    trains = [line for line in lines if line.startswith("python tools/train_small.py")]
    commands = [line for line in lines if line.startswith("streamer ")]
    assert len(trains) == 1
    assert {line.split()[1] for line in commands} >= set(subparsers()) - {"demo"}
    short = trains[0].replace("--steps 400", "--steps 40").replace("--layers 4", "--layers 2")
    tool, *options = short.split()[1:]
    subprocess.run([sys.executable, ROOT / tool, *options], cwd=tmp_path, env=ENV, check=True)
    for line in commands:
        done = server.run(*shlex.split(line)[1:], before=f"os.chdir({str(tmp_path)!r})")
        assert done.code == 0, f"{line}: {done.err}"
    assert (tmp_path / "repaired" / "adapter_config.json").exists()
    assert (tmp_path / "merged" / "model.safetensors").exists()
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "merged-0.5" / "model.safetensors").exists()


def test_the_readme_begins_with_two_commands_that_set_up_all() -> None:
    """Each is one line that can be pasted: the first runs the demo, the second the tests; .ci/run runs them as they are."""
    demo, tests = (block.splitlines() for block in blocks("sh")[:2])
    assert len(demo) == len(tests) == 1
    assert re.fullmatch(r"python3 -m venv \.venv && .* && \.venv/bin/streamer demo", demo[0])
    assert re.fullmatch(r"python3 -m venv \.venv && .* && \.venv/bin/pytest .*", tests[0])


@pytest.mark.parametrize(
    "name",
    [
        m.name
        for m in pkgutil.walk_packages(streamer.__path__, "streamer.")
        if "__main__" not in m.name
    ]
    + ["streamer"],
)
def test_docstring_examples_run(name: str) -> None:
    if name == "streamer.lm_eval":
        pytest.importorskip("lm_eval")
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_public_names_resolve_and_are_documented() -> None:
    assert streamer.__all__ == sorted(streamer.__all__)
    for name in streamer.__all__:
        assert getattr(streamer, name).__doc__, name
    assert not hasattr(streamer, "no_such_name")


def test_the_table_of_kinds_is_the_registrys() -> None:
    from tools.support_tables import support_table

    assert support_table() in PAGES["support.md"]


PUBLIC = [getattr(streamer, name) for name in streamer.__all__]


CALLABLES = [
    *(c for c in PUBLIC if inspect.isfunction(c)),
    *(
        method
        for c in PUBLIC
        if inspect.isclass(c) and not issubclass(c, BaseException)
        for name, method in vars(c).items()
        if inspect.isfunction(method) and not name.startswith("_")
    ),
]


def section(doc: str, title: str) -> dict[str, str]:
    """Names in a section of a NumPy docstring, each with its text."""
    found = re.search(
        rf"^{title}\n-+\n(.*?)(?=^\S[^\n]*\n-+\n|\Z)",
        inspect.cleandoc(doc),
        re.DOTALL | re.MULTILINE,
    )
    out: dict[str, str] = {}
    for head, text in re.findall(
        r"^(\S[^\n]*)\n((?:[ \t]+[^\n]*\n?|\n)*)", found[1] if found else "", re.MULTILINE
    ):
        out |= dict.fromkeys(re.split(r",\s*", head), text)
    return out


@pytest.mark.parametrize("called", CALLABLES, ids=lambda c: c.__qualname__)
def test_every_parameter_is_explained_where_it_is_called(called: Callable[..., object]) -> None:
    parameters = [name for name in inspect.signature(called).parameters if name != "self"]
    explained = section(called.__doc__ or "", "Parameters")
    assert list(explained) == [name for name in explained if name in parameters], (
        "explained, but no parameter"
    )
    if len(parameters) == 1 and not explained:
        assert called.__doc__, called  # of a single one the first line may say it
        return
    assert sorted(explained) == sorted(parameters)
    for name, text in explained.items():
        assert len(text.split()) > 2, name
        assert "See " not in text, name


@pytest.mark.parametrize(
    "kind", [c for c in PUBLIC if inspect.isclass(c) and hasattr(c, "__dataclass_fields__")]
)
def test_every_attribute_is_explained(kind: type) -> None:
    fields = [name for name in kind.__dataclass_fields__ if not name.startswith("_")]  # type: ignore[attr-defined]
    assert sorted(section(kind.__doc__ or "", "Attributes")) == sorted(fields)


def test_the_types_of_keywords_are_those_of_the_options() -> None:
    from tools.make_keywords import FILE, keywords

    assert FILE.read_text() == keywords(), "run `python tools/make_keywords.py`"


def test_defaults_are_those_of_the_command_line() -> None:
    merge = {a.dest: a for a in subparsers()["merge"]._actions}
    documented = section(
        streamer.merge_with_reduced_intruder_dimensions.__doc__ or "", "Parameters"
    )
    for name, parameter in inspect.signature(
        streamer.merge_with_reduced_intruder_dimensions
    ).parameters.items():
        action = merge.get(name)
        # A call draws a bar in a notebook only, the command line on any terminal.
        if action is None or parameter.default is inspect.Parameter.empty or name == "progress":
            continue
        stated = re.findall(r"\(default: [^)]*\)", action.help or "")
        assert all(default in " ".join(documented[name].split()) for default in stated), name
        assert parameter.default == (
            tuple(action.default) if isinstance(action.default, list) else action.default
        ), name


def test_the_choices_of_a_method_have_the_figures_of_the_table() -> None:
    from streamer.api.intruders import METHOD_LINES

    rows = [line.strip("| ").split(" | ") for line in README.splitlines() if line.startswith("| ")]
    rounded = {
        row[0]: [re.sub(r"\*| ±.*", "", cell) for cell in row[1:3]] for row in rows if len(row) == 6
    }
    for words, first in (
        ("no text needed: kept {} %, left {} %", "`repair` without text"),
        ("with text of the task {} and {} %", "`repair`:"),
        ("nothing needed: kept {} %, left {} %", "`--method shrink --lambda 0.5`"),
        ("from `streamer map`: kept {} %, left {} %", "`--map`"),
        ("kept {} %, left {} % (none were found)", "`--method paper`"),
    ):
        (figures,) = (cells for name, cells in rounded.items() if name.startswith(first))
        assert any(words.format(*figures) in line for line in METHOD_LINES), words.format(*figures)
