"""The numeric gallery: every claim of the certified solver against float64, a part by default, all of it with ``-m slow``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import gallery
import numpy as np
import pytest
import torch
from gallery import BASES, DELTAS, EPSILONS, Tally, cases, ingredients, judge, make_case, run, truth
from helpers import detect

from streamer.detection.intruders import Detection
from streamer.detection.options import DetectionOptions
from streamer.linalg.operators import Dense
from streamer.linalg.torch_state import threads

SHAPES = [(67, 97), (97, 67), (80, 80)]


@pytest.fixture
def tally() -> Iterator[Tally]:
    with threads(1):  # the matrices are small, and the counts the same on every machine
        yield Tally()


def check(tally: Tally) -> None:
    assert tally.disagreements == []
    assert tally.outside == []
    assert tally.unsettled == []


@pytest.mark.long
def test_a_part_of_the_gallery(tally: Tally) -> None:
    """Cut off by the count, not by the clock, so that a failure is met again."""
    run(cases(80), tally)
    check(tally)
    assert tally.matrices == 80
    assert tally.certified > 0.4 * tally.directions


@pytest.mark.slow
def test_the_whole_gallery(tally: Tally) -> None:
    run(cases(1200), tally)
    check(tally)
    assert tally.matrices >= 1000
    assert tally.certified > 0.4 * tally.directions


def test_the_walk_meets_every_ingredient_and_no_combination_twice() -> None:
    walk = [ingredients(i) for i in range(1200)]
    assert len(set(walk)) == 1200
    for position, kinds in enumerate((BASES, DELTAS, gallery.SHAPES, gallery.DTYPES)):
        assert {step[position] for step in walk} == set(kinds)
    first = next(cases(1, 3))
    again = next(cases(1, 3))
    assert first.name == again.name
    assert torch.equal(first.base, again.base)
    assert torch.equal(first.delta.L, again.delta.L)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("base", BASES)
def test_decisions_are_right_for_every_spectrum(
    base: str, shape: tuple[int, int], tally: Tally
) -> None:
    run(iter([make_case(base, "intruder", shape, torch.float32, 1)]), tally)
    check(tally)


@pytest.mark.long
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("delta", DELTAS)
def test_decisions_are_right_for_every_delta(
    delta: str, shape: tuple[int, int], tally: Tally
) -> None:
    for i, base in enumerate(("power", "pairs", "outlier")):
        run(iter([make_case(base, delta, shape, torch.bfloat16, i)]), tally)
    check(tally)


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 2), (2, 1), (1, 512), (512, 1), (2, 2), (16, 17), (17, 16), (3, 509), (509, 3)],
)
def test_decisions_are_right_for_extreme_shapes(shape: tuple[int, int], tally: Tally) -> None:
    for i, delta in enumerate(("intruder", "zero", "over rank", "cancelling")):
        run(iter([make_case("power", delta, shape, torch.float32, i)]), tally)
    check(tally)


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("shape", [(128, 200), (200, 128)])
def test_an_overlap_deep_in_the_bulk_just_beside_epsilon(
    shape: tuple[int, int], epsilon: float, tally: Tally
) -> None:
    for turn in range(2):  # below and above
        i = EPSILONS.index(epsilon) + 4 * turn
        case = make_case("flat", "deep", shape, torch.float32, i)
        assert case.epsilons == (epsilon,)
        run(iter([case]), tally)
    check(tally)


@pytest.mark.parametrize("base", ["power", "geometric", "deficient"])
@pytest.mark.parametrize("shape", [(200, 200), (200, 300), (512, 300)])
def test_a_small_base_direction_blown_up_is_never_called_an_intruder(
    base: str, shape: tuple[int, int], tally: Tally
) -> None:
    """In the tall, rank-deficient ones its singular value lies below the cut-off, where the bound does not look."""
    for i in (0, 2):
        case = make_case(base, "blown up", shape, torch.float32, i)
        run(iter([case]), tally)
        found = detect(
            Dense(case.base),
            case.delta,
            DetectionOptions(10, EPSILONS[i], "certified"),
            name=case.name,
        )
        similarity = truth(case)
        assert similarity[0] > 0.99
        assert not (found.certified and 0 in found.intruders)
    check(tally)


def test_a_mixture_of_two_nearly_equal_base_directions(tally: Tally) -> None:
    """1/√2 with each: a Ritz vector that is the mixture itself would show 1."""
    for i, shape in enumerate([(96, 96), (96, 160), (160, 96)]):
        for base in ("pairs", "clustered", "flat"):
            case = make_case(base, "mixture", shape, torch.float32, i)
            run(iter([replace(case, epsilons=(0.5, 0.69, 0.72, 0.8))]), tally)
    check(tally)


def test_the_last_direction_of_a_tall_matrix_under_a_large_delta(tally: Tally) -> None:
    """Its gap was taken to the next larger singular value, and not to zero: the interval was narrower than rounding allows."""
    for i in range(164, 168):
        run(iter([make_case("deficient", "much larger", (7, 5), torch.float32, i)]), tally)
    check(tally)


@pytest.mark.parametrize(
    "fault", ["high too low", "low too high", "intruder missed", "bound narrowed by a tenth"]
)
def test_the_gallery_can_fail(fault: str, tally: Tally) -> None:
    def faulty(base: Dense, *args: object, **kwargs: object) -> Detection:
        found = detect(base, *args, **kwargs)  # type: ignore[arg-type]
        low = np.array(found.similarity_low)
        high = np.array(found.similarity_high)
        if fault == "high too low":
            return replace(found, similarity_high=tuple(np.where(high < 0.5, 0.01, high)))
        if fault == "low too high":
            return replace(found, similarity_low=tuple(np.where(low >= 0.5, 1.0, low)))
        if fault == "intruder missed":
            return replace(found, intruders=())
        return replace(found, similarity_high=tuple(0.9 * high))

    run(
        iter([make_case("power", "intruder", (96, 128), torch.float32, i) for i in range(3)]),
        tally,
        faulty,
    )
    assert bool(tally.disagreements) == (fault == "intruder missed")
    assert bool(tally.outside) == (fault != "intruder missed")


def test_a_claim_by_no_one_is_noted() -> None:
    case = make_case("power", "intruder", (96, 128), torch.float32)
    found = detect(Dense(case.base), case.delta, DetectionOptions(10, 0.5, "certified"))
    assert found.certified
    tally = Tally()
    judge(case, replace(found, certified=False), truth(case), 0.5, tally)
    assert len(tally.unsettled) == 2
