"""Accuracies on questions, in JSON and in tables."""

from __future__ import annotations

from dataclasses import replace

import pytest
from evaluations import evaluation, faults

from streamer.evaluation.columns import figures
from streamer.evaluation.evaluation import Evaluation


def test_accuracies_stand_beside_the_losses() -> None:
    """Their shares are null, and dashes with a reason, where the adapter changes them by too little."""
    e = evaluation(answers=True, forgets=0.02, others={"quiz.jsonl": -0.3})
    tree = e.to_dict()
    assert faults(tree) == []
    assert Evaluation.from_json(e.to_json()).to_json() == e.to_json()
    columns = {c.head: c.cells for c in figures(e)}
    for v, name in enumerate(one.name for one in e.variants):
        right, found = e.task.acc, tree["variants"][v]["task"]["acc"]
        assert found["value"] == right[v].mean()
        assert found["against_base"] == pytest.approx((right[v] - right[0]).mean())
        assert found["against_adapter_se"] == pytest.approx((right[v] - right[1]).std(ddof=1) / 8)
        assert found["share"] == pytest.approx((right[v] - right[0]).sum() / (right[1] - right[0]).sum())
        assert tree["variants"][v]["task"]["acc_norm"]["value"] == 1 - found["value"]
        assert tree["variants"][v]["general"]["acc"]["share"] is None, name
        assert columns["task acc"][v].startswith(f"{100 * found['value']:.1f}% ± ")
        assert columns["task acc kept"][v].startswith(f"{100 * found['share']:.1f}% ± ")
    assert set(columns["general acc left"]) == {"-"}
    assert "quiz.jsonl acc kept" in columns
    (line,) = [line for line in e.table().splitlines() if "acc left or kept" in line]
    assert line.startswith(
        "general acc left or kept is not shown: the adapter changes the accuracy by only -1.6% ± 1.6, "
    )


def test_a_share_of_accuracy_is_named_by_what_the_adapter_does_to_it() -> None:
    e = evaluation(answers=True)
    assert "general acc left" in [c.head for c in figures(e)]
    assert e.general.acc is not None
    raised = replace(e, general=replace(e.general, acc=1 - e.general.acc))
    assert "general acc kept" in [c.head for c in figures(raised)]
