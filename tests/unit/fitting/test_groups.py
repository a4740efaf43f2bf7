"""Sequences whose inputs are collected run together by length."""

from __future__ import annotations

import numpy as np
import pytest
from seeds import vary

from streamer.fitting.groups import LENGTHS, of_few_lengths
from streamer.measuring.sequences import TextSequences


@pytest.mark.parametrize("count", [20, 64, 400])
def test_few_tokens_are_cut_for_few_lengths(count: int) -> None:
    rng = np.random.default_rng(vary(count))
    ids = tuple(np.arange(n) for n in rng.integers(20, 512, count))
    text = TextSequences(ids, tuple(np.ones(len(one), bool) for one in ids), "text")
    cut = of_few_lengths(text)
    assert len({len(one) for one in cut.ids}) <= LENGTHS
    for one, counted, whole in zip(cut.ids, cut.counted, text.ids, strict=True):
        assert len(counted) == len(one)
        np.testing.assert_array_equal(one, whole[: len(one)])
    tokens, kept = (sum(len(one) for one in some) for some in (text.ids, cut.ids))
    assert kept >= (1 if len({len(one) for one in ids}) <= LENGTHS else 0.985 if count == 64 else 0.97) * tokens
