"""The variant that is suggested, and its comparison with the equal shrink, on losses that are known."""

from dataclasses import replace

import numpy as np
import pytest
from evaluations import CURVES, evaluation
from scipy.stats import binom, norm

from streamer.errors import UsageError
from streamer.evaluation.curve import ShrinkComparison, against_shrink
from streamer.evaluation.judgement import WORTH, Trade
from streamer.measuring.statistics import Estimate, EvaluatedVariant

ADAPTER = EvaluatedVariant("adapter", None, None)


def test_the_one_that_forgets_least_of_those_that_keep_enough() -> None:
    e = evaluation()
    for keep in (0.95, 0.9, 0.7, 0.4, 0.05):
        found = e.best(keep)
        assert found.variant is not None
        keeping = [v for v in range(1, len(e.variants)) if e.task.share("loss", v).value >= keep]
        assert found.variant == e.variants[min(keeping, key=lambda v: e.general.kl[v].sum())]
        assert (found.reason, found.keep) == ("forgets least", keep)
    assert e.best(0.9).variant == EvaluatedVariant("shrink 0.75", "shrink", 0.75)
    assert e.best().shrink is None


def test_an_adapter_that_improves_general_text_forgets_all_the_same() -> None:
    """As on an instruction-tuned base, the loss on plain text falls; the divergence from the base says what is lost."""
    found = evaluation(forgets=-0.2).best()
    assert (found.variant, found.reason) == (
        EvaluatedVariant("shrink 0.75", "shrink", 0.75),
        "forgets least",
    )


def test_a_trade_that_gives_up_many_times_what_it_regains_is_not_suggested() -> None:
    """An adapter that hardly forgets: what a shrink gives up of the task is many times what it regains."""
    e = evaluation(forgets=0.0037, noise=0.0005)
    found = e.best()
    assert found.trade is not None
    assert (found.variant, found.reason, found.trade.name) == (
        ADAPTER,
        "not worth it",
        e.variants[-4].name,
    )
    assert e.variants[-4].name == "shrink 0.75"
    tree = e.to_dict()["suggestion"]
    trade = tree["trade"]
    assert trade is not None
    assert (tree["name"], trade["name"], trade["worth"]) == ("adapter", "shrink 0.75", WORTH)
    assert trade["regained"] == -e["shrink 0.75"]["against_adapter"]["general_kl"]
    assert (
        trade["given_up"]
        == e["shrink 0.75"]["against_adapter"]["task_loss"]
        > 5 * trade["regained"]
    )
    lines = e.table().splitlines()
    assert (
        lines[0]
        == "use the adapter as it is: no variant that keeps 90% of what it learned is worth what it gives up"
    )
    assert any(
        line.startswith("shrink 0.75, which diverges least, regains 0.00")
        and line.endswith(
            "; a suggested variant regains over 0.5 of what it gives up, by two standard errors"
        )
        for line in lines
    )
    assert lines[-1] == "next: streamer merge BASE ADAPTER -o OUTPUT --lambda 1"


def test_of_what_keeps_enough_the_worth_decides_before_the_divergence() -> None:
    """The mildest shrink is worth it, and the one of least divergence is not."""
    e = evaluation(
        {"shrink": lambda x: (0.1 + 0.8 * x, 0.99 if x > 0.8 else 0.4 + 0.5 * x)}, learns=3.0
    )
    assert e.task.share("loss", -1).value == pytest.approx(0.4, abs=0.01)
    found = e.best(0.3)
    assert (found.reason, found.variant) == (
        "forgets least",
        EvaluatedVariant("shrink 0.9", "shrink", 0.9),
    )
    trade = Trade.of(e, 2)
    assert trade.worth_it
    assert not Trade.of(e, len(e.variants) - 1).worth_it


def test_what_is_worth_it_by_less_than_its_error_is_not() -> None:
    few = Estimate(0.1, 0.04, 64), Estimate(0.05, 0.02, 64)
    assert not Trade("few", *few).worth_it
    assert Trade("few", Estimate(0.1, 0.02, 64), few[1]).worth_it
    assert not Trade("few", Estimate(0.1, 0.02, 3), few[1]).worth_it


@pytest.mark.parametrize("keep", [0, -0.5, 1.01, 90, float("nan")])
def test_a_share_that_makes_no_sense(keep: float) -> None:
    with pytest.raises(UsageError, match=r"keep: expected a share in \(0, 1\], found"):
        evaluation().best(keep)


def test_the_front_has_what_no_other_excels() -> None:
    e = evaluation()
    names = [v.name for v in e.variants]
    found = [names.index(name) for name in e.front()]
    task = e.task.loss.sum(axis=1)
    kl = e.general.kl.sum(axis=1)
    numbers = range(len(e.variants))
    excelled = {
        v for v in numbers if any(task[w] <= task[v] and kl[w] <= kl[v] and w != v for w in numbers)
    }
    assert set(found) == set(numbers) - excelled
    assert found == sorted(found, key=lambda v: task[v])


def test_nothing_is_suggested_that_is_known_to_be_worse_than_a_shrink() -> None:
    """`project` has the least divergence of what was measured and keeps enough, and a shrink that keeps the same share has less."""
    curves = {"project": lambda x: (x**3, x**0.5), "shrink": CURVES["shrink"]}
    found = evaluation(curves).best(0.94)
    assert (found.variant, found.reason) == (None, "a shrink is better")
    assert found.shrink is not None
    assert found.shrink.verdict == "worse"
    # as little as a shrink that is placed may keep beyond the share, it is the one
    e = evaluation({"project": lambda x: (0.561, 0.9361), "shrink": CURVES["shrink"]}, noise=0.0)
    found = e.best(0.936)
    assert e["project 0.5"]["general"]["kl"] < e["shrink 0.75"]["general"]["kl"]
    assert (found.reason, found.variant) == (
        "forgets least",
        EvaluatedVariant("shrink 0.75", "shrink", 0.75),
    )


def test_the_shrink_that_keeps_as_much_is_found_between_those_that_were_tried() -> None:
    """Its λ and losses are known: what a shrink by x keeps, and what it forgets, are polynomials."""
    e = evaluation(noise=0.0)
    for v, variant in enumerate(e.variants):
        if (
            variant.method not in ("paper", "project")
            or not 0.02 < e.task.share("loss", v).value < 0.98
        ):
            continue
        found = against_shrink(e, v)
        assert found is not None
        forgets, keeps = CURVES[variant.method](variant.mitigation_lambda)
        x = 1 - np.sqrt(1 - keeps)
        assert found.mitigation_lambda == pytest.approx(x, abs=1e-9)
        assert found.between[0] <= x <= found.between[1]
        rise = e.general.mean("loss", 1, 0).value
        assert found.loss.value == pytest.approx((forgets - x**2) * rise, abs=1e-9)
        assert found.verdict == ("better" if forgets < x**2 else "worse")


FALSE_ALARMS = 2 * norm.sf(2)
"""Probability that a difference of zero is told: that it is two errors above or below."""


@pytest.mark.long
def test_what_is_uncertain_about_the_share_kept_is_in_the_error() -> None:
    """A method on the shrink's own curve is told apart from it about as seldom as two errors permit."""
    told = 0
    values = []
    errors = []
    trials = 600
    for seed in range(trials):
        e = evaluation(
            {"project": lambda x: CURVES["shrink"](x * 0.85), "shrink": CURVES["shrink"]},
            noise=0.05,
            seed=seed,
            exact=False,
        )
        found = against_shrink(e, 4)
        assert found is not None
        told += found.verdict != "not told apart"
        values.append(found.loss.value)
        errors.append(found.loss.error)
    assert told <= binom.isf(1e-6, trials, FALSE_ALARMS)  # more are seen once in a million runs
    # Five standard deviations, of a standard deviation from so many values, and of a mean.
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(
        np.std(values), rel=5 / np.sqrt(2 * trials)
    )
    assert abs(np.mean(values)) < 5 * np.std(values) / np.sqrt(trials)


@pytest.mark.parametrize(
    ("loss", "kl", "verdict"),
    [
        (-3, -3, "better"),
        (3, -3, "better"),  # the loss decides nothing
        (-3, 1, "not told apart"),
        (3, -1, "not told apart"),
        (-3, 3, "worse"),
        (1, 3, "worse"),
    ],
)
def test_the_verdict_is_by_the_divergence(loss: float, kl: float, verdict: str) -> None:
    """Differences are in units of their errors, over 64 sequences: two tell."""
    found = ShrinkComparison(
        0.7, (0.5, 0.75), Estimate(loss, 1, 64), Estimate(kl, 1, 64), Estimate(0, 1, 64)
    )
    assert found.verdict == verdict


@pytest.mark.parametrize("lam", [1e-320, 1e-12])
def test_a_lambda_of_almost_zero_counts_as_zero(lam: float) -> None:
    """A cubic through the losses at both would be steep, or NaN."""
    e = evaluation({"project": CURVES["project"], "shrink": CURVES["shrink"]})
    near = tuple(
        replace(v, mitigation_lambda=lam) if v.name == "shrink 0" else v for v in e.variants
    )
    for variant in range(2, 7):
        assert against_shrink(replace(e, variants=near), variant) == against_shrink(e, variant)


def test_no_comparison_where_there_is_none() -> None:
    e = evaluation({"project": CURVES["project"]})
    assert against_shrink(e, 3) is None
    e = evaluation()
    assert against_shrink(e, 1) is None
    assert against_shrink(e, len(e.variants) - 1) is None


def test_what_keeps_more_than_every_shrink_is_compared_with_the_one_that_keeps_most() -> None:
    e = evaluation(
        {"project": lambda x: (x, 2.0), "shrink": lambda x: (x**2, 1.2 if x == 0.75 else x)}
    )
    found = against_shrink(e, 4)
    assert found is not None
    assert (found.mitigation_lambda, found.between) == (0.75, (0.75, 0.75))
    row = e.variants.index(EvaluatedVariant("shrink 0.75", "shrink", 0.75))
    assert (found.loss, found.kl) == (e.general.mean("loss", 4, row), e.general.mean("kl", 4, row))
    assert found.verdict == "better"
    line = "\nit is better than shrink 0.75, which keeps the most: general loss -0."
    assert (
        line
        in evaluation(
            {
                **CURVES,
                "project": lambda x: (x**9, 2.0),
                "shrink": lambda x: (x, 1.2 if x == 0.75 else x),
            }
        ).table()
    )


@pytest.mark.parametrize("left_out", [0.9, 0.75, 0.5, 0.25])
def test_a_shrink_that_is_left_out_is_found_again_within_the_error(left_out: float) -> None:
    """On a curve that no cubic follows: from neighbours twice as far apart as any that are used."""

    def kept(x: float) -> float:
        return np.sin(x * np.pi / 2) ** 0.8

    def found_again(noise: float, seed: int) -> ShrinkComparison | None:
        e = evaluation({"shrink": lambda x: (x**2.5, kept(x))}, noise=noise, seed=seed)
        variants = tuple(
            replace(v, method="project") if v.mitigation_lambda == left_out else v
            for v in e.variants
        )
        row = next(i for i, v in enumerate(variants) if v.method == "project")
        found = against_shrink(replace(e, variants=variants), row)
        assert (found is None) == (
            e.task.share("loss", row).value > 1
        )  # more than the whole adapter keeps: noise, and no shrink encloses it
        return found

    exact = found_again(0.0, 0)
    assert exact is not None
    interpolated = exact.mitigation_lambda
    assert abs(interpolated - left_out) < 0.06
    # A share's standard deviation is noise / √64 / 0.5, 6 % more because lengths differ. It is in the share sought, in that of the whole
    # adapter, and in the interpolated curve, which has up to 1.4 times as much: twice as much in all. Five of these are allowed.
    noise = 0.01
    trials = 20
    allowed = abs(kept(interpolated) - kept(left_out)) + 5 * 2 * 1.06 * noise / 8 / 0.5
    found = [one for seed in range(trials) if (one := found_again(noise, seed)) is not None]
    assert len(found) > trials / 2
    assert all(abs(kept(one.mitigation_lambda) - kept(left_out)) < allowed for one in found)
    told = sum(one.verdict != "not told apart" for one in found)
    assert told <= binom.isf(1e-6, trials, FALSE_ALARMS)
