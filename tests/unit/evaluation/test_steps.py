"""What an evaluation measures, step by step, on losses that are known for every λ."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from evaluations import FACTS
from seeds import vary

from streamer.evaluation.evaluate import MOST_PLACED, Request, Sums, Wanted, answered, evaluation_steps
from streamer.evaluation.evaluation import Evaluation
from streamer.evaluation.suggestion import EXCESS, against_shrink
from streamer.measuring.statistics import SequenceSums
from streamer.methods import Shrink
from streamer.streaming.values import ADAPTER, BASE, Variant, make_variants

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

    def measure(self, request: Request) -> Sums:
        variants = request
        self.asked.append([v.name for v in variants])
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
        measured = np.outer(left, tokens), none, none
        return {"general": SequenceSums(tokens, general, *measured), "task": SequenceSums(tokens, task, *measured)}

    def share(self, variant: Variant) -> float:
        if variant.method is None:
            return float(variant.name == ADAPTER)
        assert variant.mitigation_lambda is not None
        return self.kept[variant.method](variant.mitigation_lambda)

    def evaluate(self, wanted: Sequence[Variant], known: Evaluation | None = None, keep: float = 0.9) -> Evaluation:
        return answered(evaluation_steps(Wanted(wanted, keep), known, FACTS), self.measure)


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


def test_every_method_with_a_lambda_is_placed_unless_it_has_lost() -> None:
    world = World({"shrink": SMOOTH["concave"], "project": lambda x: 0.65 + 0.35 * x, "paper": SMOOTH["late"]})
    # What `project` leaves at the share is less than what the shrink that keeps it leaves: 0.36 against 0.47.
    world.left = {"project": lambda x: x**3, "paper": lambda x: x}
    e = world.evaluate(make_variants(("paper", "project", "shrink"), LAMBDAS, "all"))
    found = e.best().variant
    assert found is not None
    assert found.method == "project"
    assert 0.9 <= e.task.fraction(e.variants.index(found)).value <= 0.9 + 2 * EXCESS
    tried = {name for names in world.asked[1:] for name in names[1:] if name not in world.asked[0]}
    assert {name.split()[0] for name in tried} == {"project", "shrink"}


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
    assert {names[1].split()[0] for names in world.asked} == {"shrink"}


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


def test_a_shrink_is_the_same_variant_whatever_intruders_are_scaled() -> None:
    assert make_variants(("shrink",), (0.5,), "first")[2:] == (Variant.of(Shrink(0.5)),)
