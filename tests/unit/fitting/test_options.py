"""Options of a fit, and how texts are divided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamer.errors import FormatError, UsageError
from streamer.fitting.options import FitOptions, divide
from streamer.measuring.sequences import TextSequences

PATHS = {"general": Path("g.npy"), "task": Path("t.npy")}


def texts(general: int, task: int) -> dict[str, TextSequences]:
    counts = {"general": general, "task": task}
    return {name: TextSequences.of(np.full(3, i) for i in range(count)) for name, count in counts.items()}


@pytest.mark.parametrize(("options", "message"), [
    ({"keep": ()}, "keep: expected at least one share"),
    ({"keep": (0.9, 0.0)}, r"keep: expected a share in \(0, 1\], found 0.0"),
    ({"keep": ("0.9",)}, r"keep: expected a share in \(0, 1\], found '0.9'"),
    ({"keep": (1.5,)}, r"keep: expected a share in \(0, 1\], found 1.5"),
    ({"keep": (float("nan"),)}, "keep: expected a share"),
    ({"keep": (0.9, 0.9)}, "keep: expected shares that differ in six digits"),
    ({"keep": (0.9, 0.9000001)}, "keep: expected shares that differ in six digits"),
    ({"keep": (0.9, 1)}, "keep: 1 is the unchanged adapter, which needs no fit; give smaller shares"),
    ({"holdout": 0}, "holdout: expected a share between 0 and 1, found 0"),
    ({"holdout": 1.0}, "holdout: expected a share between 0 and 1"),
    ({"holdout": "x"}, "holdout: expected a share between 0 and 1, found 'x'"),
    ({"holdout": None}, "holdout: expected a share between 0 and 1, found None"),
    ({"sequences": 3}, "sequences: expected a whole number from 4, found 3"),
    ({"length": 1}, "length: expected a whole number from 2"),
    ({"seed": -1}, "seed: expected a whole number from 0"),
    ({"dtype": "fp16"}, "dtype: expected one of float32, bf16"),
])  # fmt: skip
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FitOptions(**options)


@pytest.mark.parametrize(
    ("count", "holdout", "held_out"), [(4, 0.25, 2), (8, 0.25, 2), (64, 0.25, 16), (5, 0.9, 3), (10, 0.5, 5)]
)
def test_every_sequence_is_in_one_part(count: int, holdout: float, held_out: int) -> None:
    divided = divide(texts(count, 8), PATHS, FitOptions(holdout=holdout))["general"]
    parts = [[int(ids[0]) for ids in part.ids] for part in (divided.fitted, divided.held_out)]
    assert sorted(parts[0] + parts[1]) == list(range(count))
    assert [len(part) for part in parts] == [count - held_out, held_out]
    assert all(part == sorted(part) for part in parts)


def test_of_running_text_neighbours_are_held_apart_and_of_documents_any() -> None:
    def gaps(path: str) -> list[int]:
        """How often a sequence that is held apart has a neighbour that is not, around the circle."""
        found = []
        for seed in range(8):
            divided = divide(texts(32, 32), {"general": Path(path), "task": Path(path)}, FitOptions(seed=seed))["task"]
            held_out = {int(ids[0]) for ids in divided.held_out.ids}
            found.append(sum((i + 1) % 32 not in held_out for i in held_out))
        return found

    assert gaps("g.txt") == gaps("g.npy") == [1] * 8
    assert min(gaps("g.jsonl")) > 1


@pytest.mark.parametrize("path", ["t.jsonl", "t.txt"])
def test_a_sequence_that_stands_twice_is_in_one_part(path: str) -> None:
    once = texts(20, 20)
    twice = {name: text.take([*range(20), *range(20)]) for name, text in once.items()}
    for seed in range(4):
        options, paths = FitOptions(seed=seed), {"general": Path(path), "task": Path(path)}
        found, wanted = divide(twice, paths, options)["task"], divide(once, paths, options)["task"]
        assert found.whole is twice["task"]
        assert [found.fitted.digest(), found.held_out.digest()] == [wanted.fitted.digest(), wanted.held_out.digest()]


def test_the_seed_decides() -> None:
    def held_out(seed: int) -> list[int]:
        return [int(ids[0]) for ids in divide(texts(16, 16), PATHS, FitOptions(seed=seed))["task"].held_out.ids]

    assert held_out(0) == held_out(0)
    assert len({tuple(held_out(seed)) for seed in range(8)}) > 1


def test_a_text_too_short_to_hold_sequences_apart() -> None:
    with pytest.raises(
        FormatError,
        match=r"t.npy: expected 4 different sequences at least, 2 to fit on and 2 to hold out, found 3; give more",
    ):
        divide(texts(4, 3), PATHS, FitOptions())
