"""Options of a fit, how texts are divided and cut, and what a fit says of the adapter as it is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluations import text_of
from seeds import vary

from streamer.api.texts import RepairRequest
from streamer.errors import FormatError, MismatchError, UsageError
from streamer.evaluation.evaluation import Evaluation
from streamer.fitting.choice import check_learning, misses, set_facts
from streamer.fitting.fit import SHRINKS, Point, divide
from streamer.measuring.batches import LENGTHS, of_few_lengths
from streamer.measuring.sequences import TextSequences
from streamer.measuring.statistics import EvaluatedVariant, SequenceSums
from streamer.options import RepairOptions

PATHS = {"general": Path("g.npy"), "task": Path("t.npy")}
HOLDOUT = RepairOptions.holdout


def texts(general: int, task: int) -> dict[str, TextSequences]:
    counts = {"general": general, "task": task}
    return {name: text_of(np.full(3, i) for i in range(count)) for name, count in counts.items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, r"keep: expected a share in \(0, 1\], found 0.0"),
        ({"keep": "0.9"}, r"keep: expected a share in \(0, 1\], found '0.9'"),
        ({"keep": (0.9,)}, r"keep: expected a share in \(0, 1\], found \[0.9\]"),
        ({"keep": 1.5}, r"keep: expected a share in \(0, 1\], found 1.5"),
        ({"keep": float("nan")}, "keep: expected a share"),
        (
            {"keep": 0.9999999},
            "keep: 0.9999999 is the unchanged adapter, which needs no fit; give a smaller share",
        ),
        ({"weights": 3}, "weights: expected rising numbers above 0, found 3"),
        ({"weights": ()}, r"weights: expected rising numbers above 0, found \[\]"),
        ({"weights": (6.0, 1.0)}, r"weights: expected rising numbers above 0, found \[6.0, 1.0\]"),
        ({"weights": (0.0,)}, "weights: expected rising numbers above 0"),
        ({"weights": (1.0, 1.0)}, "weights: expected rising numbers above 0"),
        ({"weights": (float("inf"),)}, "weights: expected rising numbers above 0"),
        ({"weights": (float("nan"),)}, "weights: expected rising numbers above 0"),
        ({"holdout": 0}, "holdout: expected a share between 0 and 1, found 0"),
        ({"holdout": 1.0}, "holdout: expected a share between 0 and 1"),
        ({"holdout": "x"}, "holdout: expected a share between 0 and 1, found 'x'"),
        ({"holdout": None}, "holdout: expected a share between 0 and 1, found None"),
        ({"sequences": 3}, "sequences: expected a whole number from 4, found 3"),
        ({"length": 1}, "length: expected a whole number from 2"),
        ({"seed": -1}, "seed: expected a whole number from 0"),
        ({"dtype": "fp16"}, "dtype: expected one of float32, bf16"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RepairRequest(base="b", adapter="a", output="o", general="g", task="t", **options)


@pytest.mark.parametrize(
    ("count", "holdout", "held_out"),
    [(4, 0.25, 2), (8, 0.25, 2), (64, 0.25, 16), (5, 0.9, 3), (10, 0.5, 5)],
)
def test_every_sequence_is_in_one_part(count: int, holdout: float, held_out: int) -> None:
    divided = divide(texts(count, 8), PATHS, holdout, 0)["general"]
    parts = [[int(ids[0]) for ids in part.ids] for part in (divided.fitted, divided.held_out)]
    assert sorted(parts[0] + parts[1]) == list(range(count))
    assert [len(part) for part in parts] == [count - held_out, held_out]
    assert all(part == sorted(part) for part in parts)


def test_of_running_text_neighbours_are_held_apart_and_of_documents_any() -> None:
    def gaps(path: str) -> list[int]:
        """How often a sequence that is held apart has a neighbour that is not, around the circle."""
        found = []
        for seed in range(8):
            divided = divide(
                texts(32, 32), {"general": Path(path), "task": Path(path)}, HOLDOUT, seed
            )["task"]
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
        paths = {"general": Path(path), "task": Path(path)}
        found, wanted = (divide(text, paths, HOLDOUT, seed)["task"] for text in (twice, once))
        assert found.whole is twice["task"]
        assert [found.fitted.digest(), found.held_out.digest()] == [
            wanted.fitted.digest(),
            wanted.held_out.digest(),
        ]


def test_the_seed_decides_which_part_is_held_out() -> None:
    def held_out(seed: int) -> list[int]:
        return [
            int(ids[0]) for ids in divide(texts(16, 16), PATHS, HOLDOUT, seed)["task"].held_out.ids
        ]

    assert held_out(0) == held_out(0)
    assert len({tuple(held_out(seed)) for seed in range(8)}) > 1


def test_a_text_too_short_to_hold_sequences_apart() -> None:
    with pytest.raises(
        FormatError,
        match=r"t.npy: expected 4 different sequences at least, 2 to fit on and 2 to hold out, found 3; give more",
    ):
        divide(texts(4, 3), PATHS, HOLDOUT, 0)


def least_cut(lengths: np.ndarray[Any, Any], kept: int) -> float:
    """Count the tokens that must be cut so that these many lengths are left, by trying all choices of lengths."""
    ordered = np.sort(lengths)
    ends = np.arange(len(ordered) + 1)
    tokens = np.cumsum([0, *ordered])
    of_first = np.where(ends == 0, 0.0, np.inf)  # the least for the first i sequences, by i
    for _ in range(kept):
        cut_to_one = (
            tokens[None, 1:]
            - tokens[:-1, None]
            - ordered[:, None] * (ends[None, 1:] - ends[:-1, None])
        )
        last = np.where(
            ends[:-1, None] < ends[None, 1:], of_first[:-1, None] + cut_to_one, np.inf
        ).min(0)
        of_first = np.minimum(of_first, [0.0, *last])
    return float(of_first[-1])


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
    # Lengths are dropped one by one, which is not the best choice of all.
    assert text.tokens - cut.tokens <= 1.5 * least_cut(np.array([len(one) for one in ids]), LENGTHS)


def sums(falls: list[float]) -> SequenceSums:
    """Of base and adapter, on sequences of 10 tokens: by how much the adapter's mean loss is below the base's."""
    base = np.full(len(falls), 50.0)
    loss = np.stack([base, base - 10 * np.array(falls)])
    return SequenceSums(
        np.full(len(falls), 10.0), loss, np.abs(loss - base), *[np.zeros_like(loss)] * 3
    )


@pytest.mark.parametrize(("left", "near"), [(0.2, False), (0.53, False), (0.55, True), (0.7, True)])
def test_what_is_near_a_shrink_is_told(left: float, near: bool) -> None:
    one = {
        "keep": 0.9,
        "kept": 0.9,
        "mu": 1.0,
        "missed": False,
        "divergence": left,
        "shrink": {"divergence": 0.6},
    }
    facts = {"forgotten": True, "reliable": {"kept": True, "forgetting": True}, "sets": [one]}
    line = "90%: the result is close to the shrink that keeps the same share, and diverges nearly as much from the base; the "
    assert (
        list(misses(facts))
        == [f"{line}texts may be too similar: give general text of another kind than the task's"]
        * near
    )
    for other in (
        {"forgotten": False},
        {"sets": [{**one, "shrink": None}]},
    ):
        assert list(misses({**facts, **other})) == []


def test_a_refusal_says_how_many_errors_the_sequences_take() -> None:
    """Of two sequences a fall of four errors does not tell: without the number the message would contradict itself."""
    few = sums([0.3, 0.5])
    with pytest.raises(
        MismatchError, match="no evidence that the adapter learned this text"
    ) as refused:
        check_learning(few, "task.txt")
    line = str(refused.value)
    assert (
        "-0.4000 ± 0.1000 on 2 held-out sequences, where only 12.7 standard errors are evidence; give more text"
        in line
    )
    check_learning(sums([0.3, 0.5] * 4), "task.txt")


@pytest.mark.parametrize(
    ("left", "missed"), [(0.1, False), (0.105, False), (0.15, True), (-0.2, False)]
)
def test_a_set_says_if_it_keeps_less_than_the_floor(left: float, missed: bool) -> None:
    falls = [0.0, 1.0, *(1 - lam for lam in SHRINKS), 1 - left]
    loss = np.stack([np.linspace(40, 60, 6) - 10 * fall for fall in falls])
    zeros = [np.zeros_like(loss)] * 3
    own = SequenceSums(np.full(6, 10.0), loss, np.abs(loss - loss[:1]), *zeros)
    shrinks = [EvaluatedVariant(f"shrink {lam}", "shrink", lam) for lam in SHRINKS]
    others = [EvaluatedVariant(name, None, None) for name in ("base", "adapter")]
    variants = (*others, *shrinks, EvaluatedVariant("regmean 0.9", "regmean", None))
    one = set_facts(Evaluation(variants, own, own, {}), 0.9, 1.0)
    assert one["missed"] is missed
    # Of the shrinks, the adapter alone keeps 90 %.
    assert (one["shrink"]["lambda"], one["shrink"]["kept"]) == (1, 1)
    line = "90% was to be kept, and 85.0% is, on the held-out sequences; ask for a larger share, or give more text"
    assert (
        list(misses({"forgotten": False, "sets": [one], "reliable": {"kept": True}}))
        == [line] * missed
    )
    assert list(misses({"sets": [one], "reliable": {"kept": False}})) == []


def test_candidates_are_interpolated_by_the_logarithm_of_their_weights() -> None:
    first, last = (
        Point(mu, {"a": torch.full((2,), value)}) for mu, value in ((2.0, 1.0), (18.0, 3.0))
    )
    between = first.towards(last, 0.5)
    assert between.weight == pytest.approx(6)
    assert between.factors["a"].tolist() == [2, 2]
    assert Point(0.0, first.factors).towards(last, 0.25).weight == 4.5
