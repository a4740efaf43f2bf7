"""Choosing a variant: by what it keeps and forgets, with errors paired by sequence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from streamer.errors import FormatError, UsageError
from streamer.evaluation.losses import SequenceSums
from streamer.evaluation.result import Evaluation, load_evaluation

NAMED = [("base", None, None), ("adapter", None, None), ("project 0.5", "project", 0.5), ("shrink 0.75", "shrink", 0.75),
         ("shrink 0.5", "shrink", 0.5)]  # fmt: skip


def evaluation(task: list[float], kl: list[float], noise: float = 0.0) -> Evaluation:
    """Means that are as given, of eight sequences that differ by much more than the variants do."""
    rng = np.random.default_rng(0)
    tokens, each = np.full(8, 10.0), rng.normal(0, 1, 8)
    each -= each.mean()

    def sums(means: list[float]) -> np.ndarray:
        own = rng.normal(0, noise, (len(means), 8)) if noise else np.zeros((len(means), 8))
        return 10 * (np.array(means)[:, None] + each + own - own.mean(1, keepdims=True))

    agreement = np.full((5, 8), 5.0)
    general = SequenceSums(tokens, sums([2.0, 2.5, 2.4, 2.3, 2.2]), sums(kl), agreement)
    return Evaluation(
        {"options": {"keep": 0.9}},
        NAMED,
        {"general": general, "task": SequenceSums(tokens, sums(task), sums(kl), agreement)},
    )


TASK, KL = [4.0, 3.0, 3.05, 3.08, 3.3], [0.0, 0.5, 0.3, 0.35, 0.1]


def test_the_variant_that_forgets_least_of_those_that_keep_enough() -> None:
    e = evaluation(TASK, KL)
    assert [v.kept for v in e.variants] == pytest.approx([0, 1, 0.95, 0.92, 0.7])
    best = {keep: e.best(keep) for keep in (0.99, 0.94, 0.9, 0.7)}
    assert [v and v.name for v in best.values()] == ["adapter", "project 0.5", "project 0.5", "shrink 0.5"]
    assert [v.name for v in e.front()] == ["base", "shrink 0.5", "project 0.5", "adapter"]


def test_errors_are_paired_by_sequence() -> None:
    e = evaluation(TASK, KL, noise=0.01)
    unpaired, paired = e["shrink 0.5"].task.loss.error, e["shrink 0.5"].task_change.error
    assert unpaired is not None
    assert paired is not None
    assert paired < unpaired / 10
    assert e["shrink 0.5"].task_change.value == pytest.approx(0.3)
    assert e["adapter"].general_change == (0, 0)


@pytest.mark.parametrize(("noise", "beyond"), [(0.001, True), (1.0, False)])
def test_the_suggestion_is_set_against_the_shrink_of_the_same_loss_on_the_task(noise: float, beyond: bool) -> None:
    """At a task loss of 3.05, 5/8 of the way from the adapter (KL 0.5) to shrink 0.75 (KL 0.35), the line is at 0.40625."""
    found = evaluation(TASK, KL, noise).suggestion(0.9)
    assert found is not None
    assert (found["name"], found["options"]) == ("project 0.5", "--method project --lambda 0.5")
    assert found["kept"] == pytest.approx(0.95)
    assert found["forgetting_left"] == pytest.approx(0.6)
    against = found["against_shrink"]
    assert against["between"] == ["adapter", "shrink 0.75"]
    assert against["lambda"] == pytest.approx(1 - 0.25 * 5 / 8)
    assert against["kl"] == pytest.approx(0.3 - 0.40625)
    assert against["beyond_error"] is beyond


def test_the_error_of_that_comparison_is_of_both_texts() -> None:
    """By simulation: evaluations of new sequences spread as much as one of them says."""
    rng = np.random.default_rng(3)
    tokens, agreement = np.full(40, 10.0), np.zeros((5, 40))

    def draw() -> tuple[float, float]:
        def sums(means: list[float]) -> np.ndarray:
            return 10 * (np.array(means)[:, None] + rng.normal(0, 1, 40) + rng.normal(0, 0.05, (5, 40)))

        texts = (SequenceSums(tokens, sums(loss), sums(KL), agreement) for loss in ([2.0, 2.5, 2.4, 2.3, 2.2], TASK))
        e = Evaluation({}, NAMED, dict(zip(("general", "task"), texts, strict=True)))
        found = e.against_shrink(e["project 0.5"])
        assert found is not None
        return found["kl"], found["kl_se"]

    values, errors = np.array([draw() for _ in range(2000)]).T
    assert np.mean(errors) == pytest.approx(values.std(), rel=0.15)


def test_an_adapter_that_learned_nothing_has_no_suggestion() -> None:
    e = evaluation([3.0, 3.0, 3.0, 3.0, 3.0], KL)
    assert (e.best(), e.suggestion(0.9)) == (None, None)
    assert e["adapter"].kept is None


def test_written_and_read_again(tmp_path: Path) -> None:
    e = evaluation(TASK, KL, 0.1)
    path = tmp_path / "e.json"
    path.write_text(json.dumps(e.record(0.9)))
    again = load_evaluation(path)
    assert again.record(0.9) == e.record(0.9)
    assert again.rows() == e.rows()
    assert str(again) == str(e)
    with pytest.raises(UsageError, match="has no variant 'paper'; it has base, adapter"):
        again["paper"]


@pytest.mark.parametrize("change", ["schema", "sums", "variants", "text"])
def test_what_is_no_evaluation(change: str, tmp_path: Path) -> None:
    tree = evaluation(TASK, KL).record(0.9)
    if change == "sums":
        tree["sums"]["task"]["loss"].pop()
    elif change == "variants":
        tree["variants"] = tree["variants"][2:]
    elif change == "schema":
        tree["schema"] = "streamer.findings/1"
    path = tmp_path / "e.json"
    path.write_text("[" if change == "text" else json.dumps(tree))
    with pytest.raises(FormatError, match="is not an evaluation"):
        load_evaluation(path)
