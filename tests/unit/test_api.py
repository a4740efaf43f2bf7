"""The library's functions: warnings and sizes."""

import inspect
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import helpers
import pytest

import streamer
from streamer.errors import UsageError
from streamer.events import Event, Monitor
from streamer.plan.plan import PROCESS_BYTES

PROCESS_MIB = PROCESS_BYTES >> 20

# Warnings ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def odd(tmp_path: Path) -> tuple[Path, Path]:
    """A base whose index states a wrong size, and its adapter."""
    base, adapter = helpers.three_shards(tmp_path)
    index = base / "model.safetensors.index.json"
    index.write_text(re.sub(r'"total_size": \d+', '"total_size": 1', index.read_text()))
    return base, adapter


CALLS: dict[str, Callable[..., object]] = {
    "detect": lambda base, adapter, home, **o: streamer.detect_intruder_dimensions(
        base, adapter, **o
    ),
    "mitigate": lambda base, adapter, home, **o: streamer.reduce_intruder_dimension(
        base, adapter, home / "a", **o
    ),
    "merge": lambda base, adapter, home, **o: streamer.merge_with_reduced_intruder_dimensions(
        base, adapter, home / "m", **o
    ),
    "iterate": lambda base, adapter, home, **o: streamer.iter_merged(base, adapter, **o),
}


@pytest.mark.parametrize("name", CALLS)
def test_warnings_go_through_warnings_in_the_callers_name(
    odd: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CALLS[name](*odd, tmp_path)
    (warning,) = (w for w in caught if "lost in projection" not in str(w.message))
    assert warning.category is streamer.StreamerWarning
    assert issubclass(streamer.StreamerWarning, UserWarning)
    assert "total_size says 1" in str(warning.message)
    assert warning.filename == __file__
    assert "**o" in Path(__file__).read_text().splitlines()[warning.lineno - 1]


@pytest.mark.parametrize("listener", ["on_event", "monitor"])
def test_who_listens_is_told_and_python_is_not(odd: tuple[Path, Path], listener: str) -> None:
    told: list[Event] = []
    options = (
        {"on_event": told.append} if listener == "on_event" else {"monitor": Monitor(told.append)}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        streamer.detect_intruder_dimensions(*odd, **options)
    assert ["total_size says 1" in e.name for e in told if e.stage == "warning"] == [True]


def test_warnings_can_be_errors_and_nothing_is_written(
    odd: tuple[Path, Path], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", streamer.StreamerWarning)
        with pytest.raises(streamer.StreamerWarning, match="total_size says 1"):
            streamer.detect_intruder_dimensions(*odd, tmp_path / "f")
    assert not (tmp_path / "f").exists()


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
        ("100M", "max_memory: 100M is not enough for tensor "),
        (4e9, "max_memory: expected a whole number of bytes, found 4000000000.0"),
        (True, "max_memory: expected a whole number of bytes, found True"),
        (f"{PROCESS_MIB + 1}M", f"max_memory: {PROCESS_MIB + 1}M is not enough for tensor "),
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


# Types ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"general": 3}, "general: expected a path, found 3"),
        ({"task": ["a", "b"]}, "task: expected a path, found ['a', 'b']"),
        ({"base": None}, "base: expected a path, found None"),
        ({"adapter": 3}, "adapter: expected a path, found 3"),
        ({"output": 3}, "output: expected a path, found 3"),
        ({"max_memory": []}, "max_memory: expected a whole number of bytes, found []"),
        ({"io": 3}, "io: expected one of mmap, pread, found 3"),
        ({"architecture": 3}, "architecture: expected the name of a class, found 3"),
        ({"on_event": 3}, "on_event: expected a function that takes an event, found 3"),
        ({"monitor": 3}, "monitor: expected a Monitor, found 3"),
    ],
)
def test_keywords_of_other_types_are_refused_in_a_line(
    job: tuple[Path, Path], keywords: dict[str, Any], words: str
) -> None:
    given: dict[str, Any] = {
        "base": job[0],
        "adapter": job[1],
        "output": "out",
        "general": "general.txt",
        "task": "task.txt",
    }
    with pytest.raises(UsageError) as refused:
        streamer.repair_adapter(**{**given, **keywords})
    assert str(refused.value) == words


# Names ------------------------------------------------------------------------------------------------------------------


def test_keywords_of_no_function(job: tuple[Path, Path]) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'scale'"):
        streamer.iter_merged(*job, scale="all", select="all")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "name", [name for name in streamer.__all__ if inspect.isfunction(getattr(streamer, name))]
)
def test_the_types_of_keywords_can_be_asked_for(name: str) -> None:
    function = getattr(streamer, name)
    assert get_type_hints(function).keys() == {*inspect.signature(function).parameters, "return"}
