"""What an evaluation measures, step by step, on losses that are known for every λ."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from evaluations import FACTS
from seeds import vary

from streamer.evaluation.evaluation import Evaluation
from streamer.evaluation.options import EvaluationOptions
from streamer.evaluation.race import WHOLE, rounds_of
from streamer.evaluation.shrinks import EXCESS, against_shrink
from streamer.evaluation.steps import MOST_PLACED, Request, Sums, Wanted, answered, evaluation_steps
from streamer.measuring.sequences import of_eighths
from streamer.measuring.statistics import SequenceSums
from streamer.measuring.variants import EvaluatedVariant
from streamer.methods import Shrink
from streamer.streaming.variants import ADAPTER, BASE, Variant, make_variants

Shares = Callable[[float], float]

LAMBDAS = (0.9, 0.75, 0.5, 0.25, 0.0)


@dataclass
class World:
    """Models whose losses are shares, by method and λ, of what each sequence loses or gains."""

    kept: dict[str, Shares]
    learns: float = 0.5
    forgets: float = 0.3
    left: dict[str, Shares] = field(default_factory=dict)
    asked: list[list[str]] = field(default_factory=list)
    cost: float = 0.0

    def measure(self, request: Request) -> Sums:
        variants = request.variants
        self.asked.append([v.name for v in variants])
        self.cost += len(variants) * len(request.eighths) / 8
        rng = np.random.default_rng(vary(0))
        tokens = rng.integers(50, 100, 64).astype(float)
        hard, gain, loss = rng.normal(4, 0.5, 64), rng.normal(1, 0.2, 64), rng.normal(1, 0.2, 64)
        kept = np.array([self.share(v) for v in variants])
        # A shrink by λ leaves λ² of what is forgotten; any other variant what `left` says, else as much as it keeps.
        curves = {"shrink": lambda x: x**2, **self.left}
        left = np.array(
            [
                curves[v.method](v.mitigation_lambda) if v.method in curves else k
                for v, k in zip(variants, kept, strict=True)
            ]
        )
        general = (hard + self.forgets * np.outer(left, loss)) * tokens
        task = (hard - self.learns * np.outer(kept, gain)) * tokens
        none = np.zeros_like(general)
        missing = np.ones(64)
        missing[of_eighths(64, request.eighths)] = 0
        out = {}
        for text, sums in (("general", general), ("task", task)):
            measured = (np.where(missing, np.nan, one) for one in (sums, np.outer(left, tokens), none, none))
            out[text] = SequenceSums(tokens, *measured)
        return out

    def share(self, variant: Variant) -> float:
        if variant.method is None:
            return float(variant.name == ADAPTER)
        assert variant.mitigation_lambda is not None
        return self.kept[variant.method](variant.mitigation_lambda)

    def evaluate(self, wanted: Sequence[Variant], known: Evaluation | None = None, keep: float = 0.9,
                 rounds: Sequence[range] = WHOLE, asked: bool = False) -> Evaluation:  # fmt: skip
        nodes = [v for v in wanted if v.method == "shrink" and not asked and rounds != WHOLE]
        steps = evaluation_steps(Wanted(wanted, keep, rounds, nodes), known, FACTS)
        return answered(steps, self.measure)


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
@pytest.mark.parametrize("lambdas", [LAMBDAS, (0.5,)])
def test_a_shrink_is_placed_that_keeps_the_share(lambdas: tuple[float, ...], curve: str, keep: float) -> None:
    world = World({"shrink": SMOOTH[curve]})
    e = world.evaluate(make_variants(("shrink",), lambdas, "all"), keep=keep)
    assert len(world.asked) <= 1 + MOST_PLACED
    kept = [e.task.fraction(v).value for v in range(1, len(e.variants))]
    placed = min(k for k in kept if k >= keep)
    lam = min((v.mitigation_lambda or 1.0) for v, k in zip(e.variants[1:], kept, strict=True) if k == placed)
    step = SMOOTH[curve](lam) - SMOOTH[curve](lam - 0.001)  # λ has three digits
    assert placed <= keep + (max(EXCESS, EXCESS / 2 + step) if lambdas == LAMBDAS else 0.005) + 1e-9
    assert [v.order for v in e.variants] == sorted(v.order for v in e.variants)


@pytest.mark.parametrize("rounds", [WHOLE, rounds_of([64, 64])])
def test_every_method_with_a_lambda_is_placed_unless_it_has_lost(rounds: Sequence[range]) -> None:
    world = World({"shrink": SMOOTH["concave"], "project": lambda x: 0.65 + 0.35 * x, "paper": SMOOTH["late"]})
    # What `project` leaves at the share is less than what the shrink that keeps it leaves: 0.36 against 0.47.
    world.left = {"project": lambda x: x**3, "paper": lambda x: x}
    e = world.evaluate(make_variants(("paper", "project", "shrink"), LAMBDAS, "all"), rounds=rounds)
    found = e.best().variant
    assert found is not None
    assert found.method == "project"
    assert 0.9 <= e.task.fraction(e.variants.index(found)).value <= 0.9 + 2 * EXCESS
    tried = {name for names in world.asked[1:] for name in names[1:] if name not in world.asked[0]}
    assert any(name.startswith("paper") for name in tried) == (rounds == WHOLE)


def test_the_suggestion_is_never_worse_than_a_shrink_that_keeps_the_same() -> None:
    rng = np.random.default_rng(vary(0))
    for _ in range(30):
        a, b = rng.uniform(0.3, 2, 2)
        world = World({"shrink": lambda x, b=b: 1 - (1 - x) ** (1 + b), "project": lambda x, a=a: x**a})
        keep = float(rng.uniform(0.5, 0.97))
        e = world.evaluate(make_variants(("project", "shrink"), LAMBDAS, "all"), keep=keep)
        found = e.best()
        assert (found.reason, found.keep) == ("forgets least", keep)
        assert found.variant is not None
        row = e.variants.index(found.variant)
        assert e.task.fraction(row).value >= keep
        compared = against_shrink(e.variants, e.general, e.task, row)
        assert compared is None or compared.verdict != "worse"
        assert e.general.kl_fraction(row).value <= (1 - (1 - keep - EXCESS) ** (1 / (1 + b))) ** 2 + 1e-3


def test_on_a_rough_curve_the_last_one_goes_beyond() -> None:
    """The share hardly rises where secants between smooth ends expect it."""
    world = World(
        {"shrink": lambda x: float(np.interp(x, [0, 0.5, 0.56, 0.6, 0.75, 1], [0, 0.86, 0.894, 0.899, 0.967, 1]))}
    )
    e = world.evaluate(make_variants(("shrink",), LAMBDAS, "all"))
    kept = [e.task.fraction(v).value for v in range(1, len(e.variants))]
    assert len(world.asked) == 1 + MOST_PLACED
    assert min(k for k in kept if k >= 0.9) < 0.96


def test_given_the_same_answers_it_asks_the_same() -> None:
    first, again = (World({"shrink": SMOOTH["concave"], "paper": SMOOTH["late"]}) for _ in range(2))
    wanted = make_variants(("paper", "shrink"), LAMBDAS, "all")
    assert first.evaluate(wanted).to_json() == again.evaluate(wanted).to_json()
    assert first.asked == again.asked


BETTER: dict[str, Shares] = {"project": lambda x: x**0.5, "paper": SMOOTH["late"], "shrink": SMOOTH["concave"]}
ROUNDS = rounds_of([64, 64])


def test_a_race_suggests_the_same_for_less_and_says_what_it_dropped() -> None:
    wanted, (whole, race) = (
        make_variants(("paper", "project", "shrink"), LAMBDAS, "all"),
        (World(BETTER) for _ in range(2)),
    )
    everything, raced = whole.evaluate(wanted), race.evaluate(wanted, rounds=ROUNDS)
    assert raced.best().variant == everything.best().variant
    assert race.cost < 0.5 * whole.cost
    rows = [v for v in range(len(raced.variants)) if raced.dropped(v)]
    assert {raced.task.ran(v) for v in rows} <= {8, 16, 32}
    assert len(rows) > 10
    names = raced.front()
    assert not {raced.variants[v].name for v in rows} & set(names)
    v = raced.variants.index(EvaluatedVariant.of(wanted[2]))
    ran, (loss, base) = of_eighths(64, range(1)), (raced.task.loss[row] for row in (v, 0))
    assert raced.task.ran(v) == 8
    difference = (loss - base)[ran].sum() / raced.task.tokens[ran].sum()
    assert raced.task.loss_difference(v, 0).value == pytest.approx(difference)
    again = Evaluation.from_json(raced.to_json())
    assert again.to_json() == raced.to_json()
    assert f"{raced.variants[v].name} †8" in again.table()


def test_a_race_that_is_over_asks_for_no_more_unless_for_another_share_or_for_all() -> None:
    wanted, world = make_variants(("paper", "project", "shrink"), LAMBDAS, "all"), World(BETTER)
    raced = world.evaluate(wanted, rounds=ROUNDS)
    world.asked.clear()
    assert world.evaluate(wanted, raced, rounds=ROUNDS).to_json() == raced.to_json()
    assert world.asked == []
    other = world.evaluate(wanted, raced, keep=0.6, rounds=ROUNDS)
    assert other.best().variant == World(BETTER).evaluate(wanted, keep=0.6).best().variant
    more = World(BETTER).evaluate((*wanted, *make_variants(("project",), (0.95,), "all")[2:]), raced, rounds=ROUNDS)
    assert more.task.ran(more.variants.index(EvaluatedVariant("project 0.95", "project", 0.95))) >= 8
    all_of_them = world.evaluate(wanted, raced)
    assert not any(
        all_of_them.dropped(v)
        for v in range(len(all_of_them.variants))
        if all_of_them.variants[v].mitigation_lambda in LAMBDAS
    )


def test_only_what_is_missing_is_measured() -> None:
    world = World({"shrink": SMOOTH["concave"], "paper": SMOOTH["late"]})
    known = world.evaluate(make_variants(("paper", "shrink"), LAMBDAS, "all"))
    world.asked.clear()
    assert world.evaluate(make_variants(("paper",), (0.5,), "all"), known) == known
    assert world.asked == []
    e = world.evaluate(make_variants(("paper",), (0.5, 0.8), "all"), known)
    assert world.asked == [[BASE, "paper 0.8"]]
    assert [v.name for v in e.variants if v not in known.variants] == ["paper 0.8"]
    for row, variant in enumerate(known.variants):
        at = e.variants.index(variant)
        assert (e.general.loss[at] == known.general.loss[row]).all()
        assert (e.task.kl[at] == known.task.kl[row]).all()
    world.asked.clear()
    world.evaluate(make_variants(("paper",), (0.5,), "all"), known, keep=0.7)
    assert {names[1].split()[0] for names in world.asked} == {"shrink", "paper"}


@pytest.mark.parametrize(("world", "methods", "keep"), [
    (World({"shrink": SMOOTH["concave"]}, learns=-0.5), ("shrink",), 0.9),
    (World({"shrink": SMOOTH["concave"]}), ("shrink",), 1.0),
    (World({"paper": lambda x: 0.95 + x / 20}), ("paper",), 0.9),  # every λ keeps the share
])  # fmt: skip
def test_where_nothing_is_to_be_placed_nothing_more_is_measured(
    world: World, methods: tuple[str, ...], keep: float
) -> None:
    world.asked.clear()
    world.evaluate(make_variants(methods, LAMBDAS, "all"), keep=keep)  # type: ignore[arg-type]
    assert len(world.asked) == 1


def test_where_nothing_is_missing_the_share_asked_for_is_the_evaluations() -> None:
    wanted, world = make_variants(("paper",), LAMBDAS, "all"), World({"paper": lambda x: 0.95 + x / 20})
    assert world.evaluate(wanted, world.evaluate(wanted), keep=0.7).keep == 0.7
    assert len(world.asked) == 1


@pytest.mark.parametrize("keep", [0.0001, 0.001, 0.9, 1.0])
def test_a_race_lists_no_shrink_twice(keep: float) -> None:
    names = [v.name for v in EvaluationOptions(keep=keep).variants]
    assert len(names) == len(set(names))


def test_a_shrink_that_was_asked_for_is_never_dropped() -> None:
    methods, world = ("paper", "project", "shrink"), World(BETTER)
    fresh = world.evaluate(make_variants(methods, LAMBDAS, "all"), rounds=ROUNDS, asked=True)
    assert not any(
        fresh.dropped(v) for v, one in enumerate(fresh.variants) if one.mitigation_lambda and one.method == "shrink"
    )
    raced = world.evaluate(make_variants(methods, LAMBDAS, "all"), rounds=ROUNDS)
    for lam in (0.25, 0.4):  # one was dropped, one is new
        more = world.evaluate(make_variants(("shrink",), (lam,), "all"), raced, rounds=ROUNDS, asked=True)
        assert not more.dropped(more.variants.index(EvaluatedVariant(f"shrink {lam}", "shrink", lam)))


def test_a_race_adds_no_shrinks_of_its_own_to_those_that_ran_on_all() -> None:
    world = World(BETTER)
    known = world.evaluate(make_variants(("paper", "shrink"), LAMBDAS, "all"))
    world.asked.clear()
    wanted = (*make_variants(("paper",), LAMBDAS, "all"), *make_variants(("shrink",), (0.85, 0.72), "all")[2:])
    assert world.evaluate(wanted, known, rounds=ROUNDS) == known
    assert world.asked == []


def test_a_table_for_another_share_says_what_was_dropped() -> None:
    wanted, line = make_variants(("paper", "shrink"), LAMBDAS, "all"), "run evaluate --keep 0.75 to compare all"
    for rounds in (ROUNDS, WHOLE):
        found = World(BETTER).evaluate(wanted, rounds=rounds)
        for one in (found, Evaluation.from_json(found.to_json(0.75))):
            assert (line in one.table(0.75)) == (rounds == ROUNDS)
            assert "to compare all" not in one.table(one.keep)
            assert one.keep == found.keep


def test_a_shrink_is_the_same_variant_whatever_intruders_are_scaled() -> None:
    assert make_variants(("shrink",), (0.5,), "first")[2:] == (Variant.of(Shrink(0.5)),)
