"""Dividing a text's sequences into chunks that a gradient pass takes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from streamer.errors import UsageError
from streamer.fitting.fit_memory import gradient_bytes, plan_chunks
from streamer.measuring.sequences import TextSequences
from streamer.streaming.model import ModelSize

LARGE = ModelSize(widest=14336, hidden=4096, vocabulary=128256, attention=0, dense=0, factors=0, products={}, read=0,
                  layer_width=82000)  # fmt: skip
RESIDENT = 250 << 20


def text(*lengths: int) -> TextSequences:
    return TextSequences.of(np.zeros(n, np.int64) for n in lengths)


def test_long_sequences_go_together() -> None:
    assert plan_chunks(text(10, 500, 20, 490, 30), LARGE, RESIDENT, None, False) == [(1, 3), (4, 2, 0)]


def test_short_sequences_are_not_padded_to_where_rotary_embeddings_are_others() -> None:
    assert plan_chunks(text(10, 40, 16), replace(LARGE, short=16), RESIDENT, None, False) == [(1,), (2, 0)]


def test_sequences_of_one_length_go_together_if_padding_changes_the_model() -> None:
    assert plan_chunks(text(10, 40, 16, 40), LARGE, RESIDENT, None, True) == [(1, 3), (2,), (0,)]


def test_a_budget_makes_chunks_smaller_and_is_kept() -> None:
    sequences = text(*[128] * 8)
    free = plan_chunks(sequences, LARGE, RESIDENT, None, False)
    budget = gradient_bytes(LARGE, RESIDENT, 300, 128)
    chunks = plan_chunks(sequences, LARGE, RESIDENT, budget, False)
    assert len(free) < len(chunks) == 4
    assert sorted(i for chunk in chunks for i in chunk) == list(range(8))
    assert all(gradient_bytes(LARGE, RESIDENT, 128 * len(chunk), 128) <= budget for chunk in chunks)


def test_a_budget_that_holds_no_sequence_is_refused_with_one_that_does() -> None:
    with pytest.raises(
        UsageError, match=r"max_memory: 100M is not enough for the gradient .* of 512 tokens; it needs \d+M"
    ) as refused:
        plan_chunks(text(512, 8), LARGE, RESIDENT, 100 << 20, False)
    enough = int(str(refused.value).rpartition(" ")[2].removesuffix("M")) << 20
    assert plan_chunks(text(512, 8), LARGE, RESIDENT, enough, False) == [(0,), (1,)]


def test_it_grows_with_what_one_layer_needs() -> None:
    rows = 512, 128
    least = gradient_bytes(LARGE, RESIDENT, *rows)
    assert gradient_bytes(replace(LARGE, layer_width=2 * LARGE.layer_width), RESIDENT, *rows) > least
    assert gradient_bytes(replace(LARGE, attention=32), RESIDENT, *rows) > least
    assert gradient_bytes(replace(LARGE, layer_factors=10 << 20), RESIDENT, *rows) == least + (30 << 20)
