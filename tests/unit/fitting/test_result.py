"""What a fit says of the adapter as it is."""

from __future__ import annotations

import numpy as np
import pytest

from streamer.errors import MismatchError
from streamer.evaluation.statistics import SequenceSums
from streamer.fitting.result import adapter_facts


def sums(falls: list[float]) -> SequenceSums:
    """Of base and adapter, on sequences of 10 tokens: by how much the adapter's mean loss is below the base's."""
    base = np.full(len(falls), 50.0)
    loss = np.stack([base, base - 10 * np.array(falls)])
    return SequenceSums(np.full(len(falls), 10.0), loss, np.abs(loss - base), np.zeros_like(loss))


def test_a_refusal_says_how_many_errors_the_sequences_take() -> None:
    """Of two sequences a fall of four errors does not tell: without the number the message would contradict itself."""
    few = sums([0.3, 0.5])
    with pytest.raises(MismatchError, match="the adapter has learned this text") as refused:
        adapter_facts(few, few, "task.txt")
    line = str(refused.value)
    assert "-0.4000 ± 0.1000 on the 2 sequences held apart, of which it takes 12.7 errors; give more text" in line
    many = sums([0.3, 0.5] * 4)
    assert adapter_facts(many, many, "task.txt")["learning"] == pytest.approx(0.4)
