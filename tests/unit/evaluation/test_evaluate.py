"""The shrink that is placed, when an answer is clear, and the order of sequences, on losses that are known for every λ."""

from collections.abc import Callable

import numpy as np
import pytest
from evaluations import CURVES, LAMBDAS, evaluation, text_of

from streamer.evaluation.curve import EXCESS, LAMBDA_STEPS, lambda_to_place
from streamer.evaluation.evaluate import BLOCK_SEQUENCES, clear, spread
from streamer.methods import Shrink
from streamer.streaming.variants import Variant, make_variants

Shares = Callable[[float], float]

SMOOTH: dict[str, Shares] = {
    "concave": lambda x: 1 - (1 - x) ** 2,
    "more so": lambda x: 1 - (1 - x) ** 4,
    "straight": lambda x: x,
    "an S": lambda x: x**2 * (3 - 2 * x),
    "the adapter overshoots": lambda x: 3.2 * x - 2.2 * x**2,
    "late": lambda x: x**3,
}


@pytest.mark.parametrize("keep", [0.99, 0.95, 0.9, 0.8, 0.5, 0.1])
@pytest.mark.parametrize("curve", SMOOTH)
def test_a_shrink_is_placed_that_keeps_the_share(curve: str, keep: float) -> None:
    """A cubic through shrinks a quarter apart is off by up to 0.02, of a quartic and where it leaves the adapter."""
    share = SMOOTH[curve]
    e = evaluation({"shrink": lambda x: (x**2, share(x))}, noise=0.0)
    lam = lambda_to_place(e, keep)
    if lam is None:
        assert any(0 <= share(x) - keep <= EXCESS for x in (*LAMBDAS, 1.0))
        return
    assert lam == round(lam * LAMBDA_STEPS) / LAMBDA_STEPS
    assert keep - 0.02 <= share(lam) <= keep + 0.02
    assert share(min(x for x in (*LAMBDAS, 1.0) if x > lam)) >= keep


@pytest.mark.parametrize(
    "curves",
    [
        {"paper": CURVES["paper"]},
        {"shrink": lambda x: (x, 0.95 + x / 20)},  # every shrink keeps the share
        {"shrink": lambda x: (x, 0.901 if x == 0.5 else x)},
    ],
)
def test_where_nothing_is_to_be_placed(curves: dict[str, Shares]) -> None:
    e = evaluation(curves, noise=0.0)  # type: ignore[arg-type]
    assert lambda_to_place(e, 0.9) is None


@pytest.mark.parametrize(
    ("options", "is_clear"),
    [
        ({}, True),
        ({"noise": 0.08}, False),  # the shares are not known
        ({"learns": 0.0}, False),
        ({"forgets": 0.0, "noise": 0.0}, False),
        (
            {
                "curves": {"shrink": CURVES["shrink"], "project": CURVES["shrink"]},
                "noise": 0.0,  # which would tell equals apart once in forty seeds
            },
            False,
        ),  # a rival as good
        (
            {
                "curves": {"shrink": lambda x: (x**2, 0.901 if x == 0.75 else 1 - (1 - x) ** 2)},
                "noise": 0.02,
            },
            False,
        ),  # it may keep less
    ],
)
def test_sampling_stops_when_the_answer_is_clear(
    options: dict[str, object], is_clear: bool
) -> None:
    assert clear(evaluation(**options)) is is_clear  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, BLOCK_SEQUENCES, 3 * BLOCK_SEQUENCES, 70])
def test_every_block_is_spread_over_a_text(count: int) -> None:
    text = text_of(np.full(2, i) for i in range(count))
    order = [int(ids[0]) for ids in spread(text).ids]
    assert sorted(order) == list(range(count))
    steps = -(-count // BLOCK_SEQUENCES)
    assert max(np.diff([*order[: -(-count // steps)], count])) <= steps


def test_a_shrink_is_the_same_variant_whatever_intruders_are_scaled() -> None:
    assert make_variants(("shrink",), (0.5,), "first")[2:] == (Variant.of(Shrink(0.5)),)
