"""Patterns of an adapter's config: PEFT's own choice, and none that takes for ever."""

from __future__ import annotations

import time

import pytest

from streamer.adapters.config_patterns import first_match


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
    began = time.process_time()
    with pytest.raises(ValueError, match=r"may never finish matching: .*; write it without"):
        first_match([pattern], "a" * 60 + ".layers.0")
    assert time.process_time() - began < 5


def test_what_is_no_expression_is_refused() -> None:
    for pattern in ("(", "[", "*", "(?P<x>a)(?P<x>b)"):
        with pytest.raises(ValueError, match="is not a regular expression"):
            first_match([pattern], "a")
