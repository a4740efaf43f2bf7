"""The library as a caller in Python meets it: documented where it is called, warnings as Python has them, sizes as the shell has them."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import helpers
import pytest

import streamer
from streamer.errors import UsageError
from streamer.events import Event, Monitor

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
    from test_docs import subparsers

    renamed = {"threshold_epsilon": "epsilon", "mitigation_lambda": "mitigation_lambda", "max_memory": "max_memory"}
    merge = {a.dest: a for a in subparsers()["merge"]._actions}
    for name, parameter in inspect.signature(streamer.merge_with_reduced_intruder_dimensions).parameters.items():
        action = merge.get(renamed.get(name, name))
        if action is None or parameter.default is inspect.Parameter.empty:
            continue
        stated = re.search(r"\(default: ([^)]*)\)", action.help or "")
        shown = stated[1] if stated else str(action.default)
        assert shown in (str(parameter.default), "as much as it takes", "None"), name


# Warnings ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def odd(tmp_path: Path) -> tuple[Path, Path]:
    """A base whose index states a wrong size, and its adapter."""
    base, adapter = helpers.three_shards(tmp_path)
    index = base / "model.safetensors.index.json"
    index.write_text(re.sub(r'"total_size": \d+', '"total_size": 1', index.read_text()))
    return base, adapter


CALLS: dict[str, Callable[..., object]] = {
    "detect": lambda base, adapter, home, **o: streamer.detect_intruder_dimensions(base, adapter, **o),
    "mitigate": lambda base, adapter, home, **o: streamer.reduce_intruder_dimension(base, adapter, home / "a", **o),
    "merge": lambda base, adapter, home, **o: streamer.merge_with_reduced_intruder_dimensions(
        base, adapter, home / "m", **o
    ),
    "iterate": lambda base, adapter, home, **o: streamer.iter_merged(base, adapter, **o),
}


@pytest.mark.parametrize("name", CALLS)
def test_warnings_go_through_warnings_in_the_callers_name(odd: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CALLS[name](*odd, tmp_path)
    (warning,) = caught
    assert warning.category is streamer.StreamerWarning
    assert issubclass(streamer.StreamerWarning, UserWarning)
    assert "total_size says 1" in str(warning.message)
    assert warning.filename == __file__
    assert "**o" in Path(__file__).read_text().splitlines()[warning.lineno - 1]


@pytest.mark.parametrize("listener", ["on_event", "monitor"])
def test_who_listens_is_told_and_python_is_not(odd: tuple[Path, Path], listener: str) -> None:
    told: list[Event] = []
    options = {"on_event": told.append} if listener == "on_event" else {"monitor": Monitor(told.append)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        streamer.detect_intruder_dimensions(*odd, **options)
    assert ["total_size says 1" in e.name for e in told if e.stage == "warning"] == [True]


def test_warnings_can_be_errors_and_nothing_is_written(odd: tuple[Path, Path], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", streamer.StreamerWarning)
        with pytest.raises(streamer.StreamerWarning, match="total_size says 1"):
            streamer.detect_intruder_dimensions(*odd, tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_a_script_sees_its_own_line(odd: tuple[Path, Path], tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(f"import streamer\n\nstreamer.detect_intruder_dimensions({str(odd[0])!r}, {str(odd[1])!r})\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr.startswith(
        f"{script}:3: StreamerWarning: {odd[0] / 'model.safetensors.index.json'}: total_size says 1, "
    )


# Sizes ------------------------------------------------------------------------------------------------------------------


def test_memory_is_given_as_in_the_shell(job: tuple[Path, Path]) -> None:
    by_text = streamer.detect_intruder_dimensions(*job, max_memory="1.5G")
    by_number = streamer.detect_intruder_dimensions(*job, max_memory=3 << 29)
    assert by_text.options == by_number.options
    assert by_text.options.max_memory == 3 << 29
    assert by_text.digest() == by_number.digest()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("much", "max_memory: expected a size like 600M or 4G, found 'much'"),
        ("100M", "max_memory: expected more than the 200M of Python and torch, found 100M"),
        (4e9, "max_memory: expected a whole number of bytes, found 4000000000.0"),
        (True, "max_memory: expected a whole number of bytes, found True"),
        ("201M", "max_memory: 201M is not enough for tensor "),
    ],
)
@pytest.mark.parametrize("name", CALLS)
def test_memory_that_makes_no_sense(
    job: tuple[Path, Path], tmp_path: Path, name: str, given: object, words: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(words)}") as e:
        CALLS[name](*job, tmp_path / "out", max_memory=given)
    assert isinstance(e.value, UsageError)
    assert not (tmp_path / "out").exists()
