"""Patterns of an adapter's config: PEFT's own choice, and none that takes for ever."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from streamer.adapters.rank_patterns import first_match

PATHS = st.lists(
    st.sampled_from(["model", "layers", "0", "1", "q_proj", "k_proj", "proj", "mlp"]), min_size=1, max_size=5
)
KEYS = st.one_of(
    PATHS.map(".".join),
    st.sampled_from(
        [
            ".*",
            "q_proj|k_proj",
            "(q|k)_proj",
            r"layers\.\d",
            "^model",
            "^q_proj$",
            ".*proj",
            "q",
            r"\w+_proj",
            "model.+proj",
        ]
    ),
)


@given(PATHS.map(".".join), st.lists(KEYS, unique=True, max_size=5))
def test_patterns_match_as_in_peft(module: str, keys: list[str]) -> None:
    found = first_match(keys, module)
    assert get_pattern_key(keys, module) == (module if found is None else found)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(([a-z._0-9])+)+#",
        r"(a|aa)+b",
        r"([a-z.]*)*x",
        r"(.*){9}#",
        r"(?:[\w.]+)+#",
        ".*.*.*.*.*.*#",
        r"((a?b?)){30}c",
        r"(\w{2,})+#",
    ],
)
def test_what_takes_for_ever_is_refused(pattern: str) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"may take for ever to match: .*; write it without"):
        first_match([pattern], "a" * 60 + ".layers.0")
    assert time.monotonic() - began < 5


def test_what_is_no_expression_is_refused() -> None:
    for pattern in ("(", "[", "*", "(?P<x>a)(?P<x>b)"):
        with pytest.raises(ValueError, match="is not a regular expression"):
            first_match([pattern], "a")
