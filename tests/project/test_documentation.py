"""Docstrings and signatures of the public names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import pytest
from arguments import subparsers

import streamer

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
    found = re.search(rf"^{title}\n-+\n(.*?)(?=^\S[^\n]*\n-+\n|\Z)", inspect.cleandoc(doc), re.DOTALL | re.MULTILINE)
    out: dict[str, str] = {}
    for head, text in re.findall(r"^(\S[^\n]*)\n((?:[ \t]+[^\n]*\n?|\n)*)", found[1] if found else "", re.MULTILINE):
        out |= dict.fromkeys(re.split(r",\s*", head), text)
    return out


@pytest.mark.parametrize("called", CALLABLES, ids=lambda c: c.__qualname__)
def test_every_parameter_is_explained_where_it_is_called(called: Callable[..., object]) -> None:
    parameters = [name for name in inspect.signature(called).parameters if name != "self"]
    explained = section(called.__doc__ or "", "Parameters")
    assert list(explained) == [name for name in explained if name in parameters], "explained, but no parameter"
    if len(parameters) == 1 and not explained:
        assert called.__doc__, called  # of a single one the first line may say it
        return
    assert sorted(explained) == sorted(parameters)
    for name, text in explained.items():
        assert len(text.split()) > 2, name
        assert "See " not in text, name


@pytest.mark.parametrize("kind", [c for c in PUBLIC if inspect.isclass(c) and hasattr(c, "__dataclass_fields__")])
def test_every_attribute_is_explained(kind: type) -> None:
    fields = [name for name in kind.__dataclass_fields__ if not name.startswith("_")]  # type: ignore[attr-defined]
    assert sorted(section(kind.__doc__ or "", "Attributes")) == sorted(fields)


def test_defaults_are_those_of_the_command_line() -> None:
    merge = {a.dest: a for a in subparsers()["merge"]._actions}
    documented = streamer.merge_with_reduced_intruder_dimensions.__doc__ or ""
    for name, parameter in inspect.signature(streamer.merge_with_reduced_intruder_dimensions).parameters.items():
        action = merge.get(name)
        # A call draws a bar in a notebook only, the command line on any terminal.
        if action is None or parameter.default is inspect.Parameter.empty or name == "progress":
            continue
        stated = re.search(r"\(default: ([^)]*)\)", action.help or "")
        shown = stated[1] if stated else str(action.default)
        told = re.search(
            rf"^{name}\n(?:    .*\n)*?    .*(None is|else) `*{re.escape(shown)}`*[.,]", documented, re.MULTILINE
        )
        none = parameter.default in (None, ()) and shown in ("no limit", "None", "[]")
        assert told or none or shown == str(parameter.default), name
