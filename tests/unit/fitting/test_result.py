"""What a fit says of the adapter as it is."""

from __future__ import annotations

import numpy as np
import pytest

from streamer.errors import MismatchError
from streamer.fitting.points import Point
from streamer.fitting.result import SHRINKS, adapter_facts, misses, set_facts
from streamer.measuring.statistics import SequenceSums


def sums(falls: list[float]) -> SequenceSums:
    """Of base and adapter, on sequences of 10 tokens: by how much the adapter's mean loss is below the base's."""
    base = np.full(len(falls), 50.0)
    loss = np.stack([base, base - 10 * np.array(falls)])
    return SequenceSums(np.full(len(falls), 10.0), loss, np.abs(loss - base), *[np.zeros_like(loss)] * 2)


@pytest.mark.parametrize(("left", "near"), [(0.2, False), (0.53, False), (0.55, True), (0.7, True)])
def test_what_is_near_a_shrink_is_told(left: float, near: bool) -> None:
    one = {"keep": 0.9, "kept": 0.9, "mu": 1.0, "divergence": left, "shrink": {"divergence": 0.6}}
    facts = {"forgotten": True, "reliable": {"kept": True, "forgetting": True}, "sets": [one]}
    line = "90%: the result is close to the shrink that keeps the same share, and diverges nearly as much from the base; the "
    assert (
        misses(facts) == [f"{line}texts may be too similar: give general text of another kind than the task's"] * near
    )
    for other in (
        {"forgotten": False}, {"sets": [{**one, "shrink": None}]},
    ):  # fmt: skip
        assert misses({**facts, **other}) == []


def test_a_refusal_says_how_many_errors_the_sequences_take() -> None:
    """Of two sequences a fall of four errors does not tell: without the number the message would contradict itself."""
    few = sums([0.3, 0.5])
    with pytest.raises(MismatchError, match="no evidence that the adapter learned this text") as refused:
        adapter_facts(few, few, "task.txt")
    line = str(refused.value)
    assert (
        "-0.4000 ± 0.1000 on 2 held-out sequences, where only 12.7 standard errors are evidence; give more text" in line
    )
    many = sums([0.3, 0.5] * 4)
    assert adapter_facts(many, many, "task.txt")["learning"] == pytest.approx(0.4)


def test_a_loss_above_the_bases_asks_whether_the_texts_are_swapped() -> None:
    swapped = sums([-0.3, -0.5] * 4)
    with pytest.raises(MismatchError) as refused:
        adapter_facts(swapped, swapped, "task.txt")
    said = "above the base's, by 0.4000 ± 0.0378: are the two texts swapped?"
    assert str(refused.value) == f"task.txt: the adapter's loss on the task's text is {said}"


@pytest.mark.parametrize(("left", "missed", "exceeded"), [
    (0.1, False, False), (0.105, False, False), (0.15, True, False), (0.075, False, False), (0.06, False, True),
])  # fmt: skip
def test_a_set_that_keeps_less_than_was_wanted_or_much_more_says_so(left: float, missed: bool, exceeded: bool) -> None:
    falls = [0.0, 1.0, *(1 - lam for lam in SHRINKS), 1 - left]
    loss = np.stack([np.linspace(40, 60, 6) - 10 * fall for fall in falls])
    own = SequenceSums(np.full(6, 10.0), loss, np.abs(loss - loss[:1]), *[np.zeros_like(loss)] * 2)
    (one,) = set_facts(own, own, [(0.9, Point(1.0, {}))])
    assert (one["missed"], one["exceeded"]) == (missed, exceeded)
    lines = misses({"forgotten": False, "sets": [one]})
    assert (lines != []) is (missed or exceeded)
    assert misses({"sets": [one], "reliable": {"kept": False}}) == []
    if missed:
        assert lines[0].startswith("90% was to be kept, and 85.0% is, on the held-out sequences;")
    elif exceeded:
        assert lines[0].startswith(
            "90% was to be kept, and 94.0% is, on the held-out sequences; to forget less, ask for a smaller share"
        )
