"""The variant that is suggested, on losses that are known."""

from __future__ import annotations

import pytest
from evaluations import CURVES, evaluation

from streamer.errors import UsageError
from streamer.evaluation.suggestion import WORTH, Trade, front
from streamer.measuring.statistics import Estimate
from streamer.measuring.variants import EvaluatedVariant

ADAPTER = EvaluatedVariant("adapter", None, None)


def test_the_one_that_forgets_least_of_those_that_keep_enough() -> None:
    e = evaluation()
    for keep in (0.95, 0.9, 0.7, 0.4, 0.05):
        found = e.best(keep)
        assert found.variant is not None
        keeping = [v for v in range(1, len(e.variants)) if e.task.fraction(v).value >= keep]
        assert found.variant == e.variants[min(keeping, key=lambda v: e.general.kl[v].sum())]
        assert (found.reason, found.keep) == ("forgets least", keep)
    assert e.best(0.9).variant == EvaluatedVariant("shrink 0.75", "shrink", 0.75)
    assert e.best().shrink is None


def test_where_nothing_was_learned_nothing_is_suggested() -> None:
    found = evaluation(learns=0.0).best()
    assert (found.variant, found.reason) == (None, "not learned")
    assert not found.swapped
    found = evaluation(learns=-0.5).best()
    assert (found.variant, found.reason, found.swapped) == (None, "not learned", True)


def test_an_adapter_that_does_not_forget_is_shipped_as_it_is() -> None:
    found = evaluation(forgets=0.0, noise=0.0).best()
    assert (found.variant, found.reason) == (ADAPTER, "not forgotten")


def test_an_adapter_that_improves_general_text_forgets_all_the_same() -> None:
    """As on an instruction-tuned base, the loss on plain text falls; the divergence from the base says what is lost."""
    found = evaluation(forgets=-0.2).best()
    assert (found.variant, found.reason) == (EvaluatedVariant("shrink 0.75", "shrink", 0.75), "forgets least")


def test_an_adapter_that_no_variant_improves_on_is_shipped_as_it_is() -> None:
    found = evaluation({"paper": lambda x: (1 + x / 10, x), "project": lambda x: (x, 0.8)}).best(0.9)
    assert (found.variant, found.reason) == (ADAPTER, "none better")


def test_a_trade_that_gives_up_many_times_what_it_regains_is_not_suggested() -> None:
    """An adapter that hardly forgets: what a shrink gives up of the task is many times what it regains."""
    e = evaluation(forgets=0.0037, noise=0.0005)
    found = e.best()
    assert (found.variant, found.reason, found.declined) == (ADAPTER, "not worth it", e.variants[-4])
    assert e.variants[-4].name == "shrink 0.75"
    tree = e.to_dict()["suggestion"]
    trade = tree["trade"]
    assert trade is not None
    assert (tree["name"], trade["name"], trade["worth"]) == ("adapter", "shrink 0.75", WORTH)
    assert trade["regained"] == -e["shrink 0.75"]["against_adapter"]["general_kl"]
    assert trade["given_up"] == e["shrink 0.75"]["against_adapter"]["task_loss"] > 5 * trade["regained"]
    lines = e.table().splitlines()
    assert (
        lines[0] == "use the adapter as it is: no variant that keeps 90% of what it learned is worth what it gives up"
    )
    assert any(line.startswith("shrink 0.75, which diverges least, regains 0.00") and line.endswith(
        "; a suggested variant regains over 0.5 of what it gives up, by two standard errors") for line in lines)  # fmt: skip
    assert lines[-1] == "next: streamer merge BASE ADAPTER -o OUTPUT --lambda 1"


def test_of_what_keeps_enough_the_worth_decides_before_the_divergence() -> None:
    """The mildest shrink is worth it, and the one of least divergence is not."""
    e = evaluation({"shrink": lambda x: (0.1 + 0.8 * x, 0.99 if x > 0.8 else 0.4 + 0.5 * x)}, learns=3.0)
    assert e.task.fraction(-1).value == pytest.approx(0.4, abs=0.01)
    found = e.best(0.3)
    assert (found.reason, found.variant) == ("forgets least", EvaluatedVariant("shrink 0.9", "shrink", 0.9))
    trade = Trade.of(e.general, e.task, 2)
    assert trade.is_worth_it
    assert not Trade.of(e.general, e.task, len(e.variants) - 1).is_worth_it


def test_what_is_worth_it_by_less_than_its_error_is_not() -> None:
    few = Estimate(0.1, 0.04, 64), Estimate(0.05, 0.02, 64)
    assert not Trade(*few).is_worth_it
    assert Trade(Estimate(0.1, 0.02, 64), few[1]).is_worth_it
    assert not Trade(Estimate(0.1, 0.02, 3), few[1]).is_worth_it


@pytest.mark.parametrize("keep", [0, -0.5, 1.01, 90, float("nan")])
def test_a_share_that_makes_no_sense(keep: float) -> None:
    with pytest.raises(UsageError, match=r"keep: expected a share in \(0, 1\], found"):
        evaluation().best(keep)


def test_the_front_has_what_no_other_excels() -> None:
    e = evaluation()
    found = front(e.variants, e.general, e.task)
    task, kl = e.task.loss.sum(axis=1), e.general.kl.sum(axis=1)
    numbers = range(len(e.variants))
    excelled = {v for v in numbers if any(task[w] <= task[v] and kl[w] <= kl[v] and w != v for w in numbers)}
    assert set(found) == set(numbers) - excelled
    assert e.front() == [e.variants[v].name for v in found]
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
    assert (found.reason, found.variant) == ("forgets least", EvaluatedVariant("shrink 0.75", "shrink", 0.75))
