"""Patterns of an adapter's config: PEFT's own choice, and none that takes for ever."""

from __future__ import annotations

import time

import pytest

from streamer.adapters.config_patterns import first_match, matched_otherwise


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


def test_what_peft_014_matched_otherwise() -> None:
    """Its rule was ``.*\\.{pattern}$``, without parentheses, and then the whole name."""
    modules = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "lm_head"]
    assert matched_otherwise({"q_proj|v_proj": 4}, modules)  # of these only the first
    assert matched_otherwise({"^model.layers.0.*": 4}, modules)  # nothing
    for same in ({"q_proj": 4, "lm_head": 2}, {r"layers\.\d+\.self_attn\.[qv]_proj": 4}, {"(q_proj|v_proj)": 4}):
        assert not matched_otherwise(same, modules)
