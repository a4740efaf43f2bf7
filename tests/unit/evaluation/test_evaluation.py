"""An evaluation as JSON, as a table and in words."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from evaluations import COLUMNS, CURVES, evaluation, faults

from streamer.cli.tables import evaluation_table
from streamer.errors import FormatError
from streamer.evaluation.evaluation import Evaluation
from streamer.evaluation.words import ShellWords, command_of, figures
from streamer.measuring.statistics import EvaluatedVariant
from streamer.tables import Screen


@pytest.mark.parametrize(
    ("options", "keep"),
    [
        ({}, 0.9),
        ({}, 0.7),
        ({"learns": 0.0}, 0.9),
        ({"forgets": 0.0, "noise": 0.0}, 0.7),
        ({"learns": -0.4}, 0.9),
    ],
)
def test_an_evaluation_fits_its_schema_and_is_read_back(
    options: dict[str, float], keep: float
) -> None:
    e = evaluation(**options)
    tree = e.to_dict(keep)
    assert faults(tree) == []
    text = e.to_json(keep)
    again = Evaluation.from_json(text)
    assert again.to_json(keep) == text
    assert again.variants == e.variants
    assert np.array_equal(again.general.loss, e.general.loss)
    assert again.table(keep) == e.table(keep)


def test_figures_of_an_evaluation_are_those_of_its_sums() -> None:
    e = evaluation()
    tree = e.to_dict()
    base, adapter, *others = tree["variants"]
    assert [v["name"] for v in (base, adapter)] == ["base", "adapter"]
    assert base["method"] is base["lambda"] is adapter["method"] is adapter["lambda"] is None
    for v in others:
        assert v["name"] == f"{v['method']} {v['lambda']:g}"
        general = v["general"]
        assert general["loss"] == pytest.approx(
            sum(general["sums"]["loss"]) / sum(tree["tokens"]["general"])
        )
        assert general["perplexity"] == pytest.approx(np.exp(general["loss"]))
        assert v["against_base"]["general_loss"] == pytest.approx(
            general["loss"] - base["general"]["loss"]
        )
        assert v["against_adapter"]["task_loss"] == pytest.approx(
            v["task"]["loss"] - adapter["task"]["loss"]
        )
        learned = base["task"]["loss"] - adapter["task"]["loss"]
        assert v["kept"] == pytest.approx((base["task"]["loss"] - v["task"]["loss"]) / learned)
    assert e["paper 0.5"] == others[2]
    with pytest.raises(KeyError, match="evaluation: has no variant 'paper'; it has base, adapter"):
        e["paper"]
    assert tree["suggestion"]["name"] == "shrink 0.75"
    assert tree["suggestion"]["command"] == ["mitigate", "--method", "shrink", "--lambda", "0.75"]


def test_a_share_of_nothing_and_a_perplexity_beyond_all_are_null() -> None:
    e = evaluation()
    e.task.loss[1] = e.task.loss[0]
    e.general.loss[3] = 1000 * e.general.tokens
    tree = e.to_dict()
    assert {v["kept"] for v in tree["variants"]} == {None}
    assert tree["variants"][3]["general"]["perplexity"] is None
    assert faults(tree) == []


def test_shares_of_next_to_nothing_are_dashes_with_a_reason() -> None:
    """The JSON has the numbers and says that they tell nothing; table and page have dashes."""
    e = evaluation(forgets=0.0005)
    assert e.to_dict()["reliable"] == {"kept": True, "forgetting": False, "top1_kept": True}
    assert all(v["forgetting"] is not None for v in e.to_dict()["variants"])
    assert {(v["forgetting"], v["forgetting_se"]) for v in e.shown_variants()} == {(None, None)}
    assert [v["kept"] for v in e.shown_variants()] == [v["kept"] for v in e.to_dict()["variants"]]
    columns = {c.head: c.cells for c in figures(e)}
    assert set(columns["loss left"]) == {"-"}
    assert "-" not in columns["KL left"]
    assert columns["kept"][1] == "100.0% ± 0.0"
    (line,) = [line for line in e.table().splitlines() if " is not shown: " in line]
    assert line.startswith("loss left is not shown: the adapter's own change is only 0.00050 ± ")
    assert line.endswith(", and a share needs over 4.0 standard errors; more text may help")
    swapped = evaluation(learns=-0.4)
    assert swapped.to_dict()["reliable"] == {"kept": True, "forgetting": True, "top1_kept": False}
    (line,) = [line for line in swapped.table().splitlines() if " is not shown: " in line]
    assert line.startswith("top-1 kept is not shown: the adapter's own change is only -")


def test_top_1_stands_beside_the_loss() -> None:
    e = evaluation()
    right = e.task.right
    tokens = e.task.tokens.sum()
    columns = {c.head: c.cells for c in figures(e)}
    for v, name in enumerate(one.name for one in e.variants):
        tree = e[name]
        assert tree["task"]["top1"] == pytest.approx(right[v].sum() / tokens)
        kept = (right[v] - right[0]).sum() / (right[1] - right[0]).sum()
        assert tree["top1_kept"] == pytest.approx(kept)
        assert tree["against_adapter"]["task_top1"] == pytest.approx(
            (right[v] - right[1]).sum() / tokens
        )
        assert columns["top-1"][v] == f"{100 * right[v].sum() / tokens:.1f}%"
        assert columns["top-1 kept"][v].startswith(f"{100 * kept + 0.0:.1f}% ± ")
    assert columns["top-1 kept"][:2] == ["0.0% ± 0.0", "100.0% ± 0.0"]


def test_rounded_products_are_told() -> None:
    e = evaluation()
    assert "were rounded to bf16" in replace(e, facts={**e.facts, "dtype": "bf16"}).table()


def test_other_texts_are_left_or_kept_by_what_the_adapter_does_to_them() -> None:
    """They are in table and JSON, and nothing is suggested by them."""
    e = evaluation(others={"code.txt": 0.3, "near.jsonl": -0.2, "far.npy": 0.0})
    tree = e.to_dict()
    assert faults(tree) == []
    assert Evaluation.from_json(e.to_json()).to_json() == e.to_json()
    assert [(one["name"], one["effect"], one["reliable"]) for one in tree["others"]] == [
        ("code.txt", "forgets", True),
        ("near.jsonl", "improves", True),
        ("far.npy", "not told", False),
    ]
    columns = {c.head: c.cells for c in figures(e)}
    assert [head for head in columns if "." in head] == [
        "code.txt",
        "code.txt left",
        "code.txt KL",
        "near.jsonl",
        "near.jsonl kept",
        "near.jsonl KL",
        "far.npy",
        "far.npy left",
        "far.npy KL",
    ]
    assert set(columns["far.npy left"]) == {"-"}
    assert "far.npy left or kept is not shown: the adapter's own change is only " in e.table()
    for name in ("code.txt", "near.jsonl"):
        own = e.others[name].loss.sum(axis=1)
        for v, one in enumerate(tree["variants"]):
            (figure,) = [f for f in one["others"] if f["name"] == name]
            assert figure["share"] == pytest.approx((own[v] - own[0]) / (own[1] - own[0]))
            assert figure["loss"] == pytest.approx(own[v] / e.others[name].tokens.sum())
    assert tree["suggestion"] == evaluation().to_dict()["suggestion"]


def test_a_file_that_lacks_sums_is_refused() -> None:
    tree: Any = evaluation().to_dict()
    del tree["variants"][1]["task"]["sums"]["right"]
    with pytest.raises(FormatError, match=r"expected an evaluation .*right.*; evaluate again"):
        Evaluation.from_json(json.dumps(tree))


def test_without_shares_the_verdict_is_in_nats() -> None:
    """What was learned is told by three errors, which is enough to suggest and too little to divide by."""
    e = evaluation(learns=0.2, noise=0.0)
    e.task.loss[:] = e.task.loss[1] + (e.task.loss - e.task.loss[1]) * np.where(
        np.arange(64) < 8, 1, 0
    )
    change = e.task.change
    assert change.is_negative
    assert not change.divides
    found = e.best()
    if found.reason == "forgets least":
        assert " regains 0." in e.table().splitlines()[0]
    assert "kept is not shown: the adapter's own change is only -0.0" in e.table()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"schema": "streamer.findings/1"}',
        '{"schema": "streamer.evaluation/1"}',
        "null",
    ],
)
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(
        FormatError, match=r"expected an evaluation \(streamer.evaluation/1\), found"
    ):
        Evaluation.from_json(text)


def test_sums_that_do_not_fit_are_refused() -> None:
    tree = evaluation().to_dict()
    tree["tokens"]["task"].pop()
    with pytest.raises(FormatError, match="sums of task"):
        Evaluation.from_json(json.dumps(tree))


@pytest.mark.parametrize(
    ("variant", "facts", "words"),
    [
        (("project 0.5", "project", 0.5), {}, "mitigate --method project --lambda 0.5"),
        (("paper 0.5", "paper", 0.5), {}, "merge --method paper --lambda 0.5"),
        (("paper 0.5", "paper", 0.5), {"projected": True}, "mitigate --method paper --lambda 0.5"),
        (
            ("paper 0.5", "paper", 0.5),
            {"scale": "first"},
            "merge --method paper --lambda 0.5 --select first",
        ),
        (
            ("shrink 0.5", "shrink", 0.5),
            {"scale": "first"},
            "mitigate --method shrink --lambda 0.5",
        ),
        (("project 1.2", "project", 1.2), {}, "mitigate --method project --lambda 1.2 --amplify"),
        (("adapter", None, None), {}, "merge --lambda 1"),
        (
            ("project 0.5", "project", 0.5),
            {"factored": False},
            "merge --method project --lambda 0.5",
        ),
        (
            ("project 0.5", "project", 0.5),
            {"quantized": True},
            "mitigate --method project --lambda 0.5",
        ),
        (
            ("paper 0.5", "paper", 0.5),
            {"quantized": True},
            "merge --method paper --lambda 0.5 --dequantize",
        ),
        (
            ("project 0.5", "project", 0.5),
            {"detection": {"top_k": 0.1, "threshold_epsilon": 0.6}},
            "mitigate --method project --lambda 0.5 --top-k 0.1 --epsilon 0.6",
        ),
        (
            ("shrink 0.5", "shrink", 0.5),
            {
                "base": {"architecture": "GPT2LMHeadModel", "files": []},
                "adapter": {"base_is_residual": True, "modules": 1},
            },
            "mitigate --method shrink --lambda 0.5 --base-is-residual --architecture GPT2LMHeadModel",
        ),
    ],
)
def test_the_command_that_makes_a_variant(
    variant: tuple[Any, ...], facts: dict[str, Any], words: str
) -> None:
    from arguments import subparsers

    e = evaluation()
    command, *options = command_of(
        Evaluation(e.variants, e.general, e.task, {**e.facts, **facts}), EvaluatedVariant(*variant)
    )
    assert " ".join([command, *options]) == words
    subparsers()[command].parse_args(["BASE", "ADAPTER", "-o", "OUTPUT", *options])


def test_the_table_has_every_variant_and_the_suggestion_in_words() -> None:
    e = evaluation()
    lines = e.table().splitlines()
    assert lines[0].startswith("use shrink 0.75: it keeps 9")
    assert lines[0] == e.to_dict()["verdict"]
    assert lines[2].split() == COLUMNS
    assert lines[4].startswith("base *")
    assert "100.0% ± 0.0" in lines[5]
    assert len([line for line in lines if line.startswith(("paper", "project", "shrink"))]) == 15
    assert lines[-5].startswith(
        "of the variants that keep 90% of what was learned, shrink 0.75 has the least divergence from the base, "
    )
    assert (
        lines[-3]
        == "made by: streamer mitigate BASE ADAPTER -o OUTPUT --method shrink --lambda 0.75"
    )
    assert lines[-1] == "next: streamer repair BASE ADAPTER --keep 0.9 -o OUTPUT"


@pytest.mark.parametrize(
    ("options", "keep", "verdict", "words"),
    [
        (
            {"learns": 0.0},
            0.9,
            "no suggestion: there is no evidence that the adapter learned the task's text",
            "next: give --task text that the adapter was trained for, or more of it (--sequences)",
        ),
        (
            {"learns": -0.4},
            0.9,
            "no suggestion: the adapter's loss on the task's text is above the base's; are the two texts swapped?",
            "next: streamer evaluate BASE ADAPTER --general TASK --task GENERAL -o OTHER",
        ),
        (
            {"forgets": 0.0, "noise": 0.0},
            0.9,
            "use the adapter as it is: there is no evidence that it diverges from the base",
            "next: streamer merge BASE ADAPTER -o OUTPUT --lambda 1",
        ),
        (
            {"curves": {"paper": CURVES["paper"]}},
            0.95,
            "use the adapter as it is: no variant that keeps 95% of what it learned diverges measurably less from the base",
            "next: streamer repair BASE ADAPTER --keep 0.95 -o OUTPUT",
        ),
        (
            {"curves": {"project": CURVES["project"]}},
            0.9,
            "use project 0.9: it keeps ",
            "it was not compared with a shrink of the whole adapter: that needs --method shrink at two values of lambda",
        ),
        (
            {"curves": {**CURVES, "project": lambda x: (x**9, x**0.5)}},
            0.9,
            "use project 0.9: it keeps ",
            "it is better than a shrink that keeps the same share (lambda 0.77",
        ),
        (
            {"curves": {**CURVES, "project": lambda x: (x**3, x**0.5)}, "noise": 0.0},
            0.94,
            "no suggestion yet: a shrink that was not measured is better than the measured variants",
            "next: streamer evaluate BASE ADAPTER --general GENERAL --task TASK -o EVALUATION --method shrink --lambda 0.77",
        ),
        (
            {"noise": 0.0},
            0.85,
            "use shrink 0.75: it keeps ",
            "\nit is a shrink of the whole adapter\n",
        ),
    ],
)
def test_every_suggestion_in_words(
    options: dict[str, Any], keep: float, verdict: str, words: str
) -> None:
    first, *rest = evaluation(**options).table(keep).splitlines()
    assert first.startswith(verdict)
    assert words in "\n".join(rest)
    assert rest[-1].startswith("next: ")


def test_the_table_fits_a_screen_and_names_the_inputs() -> None:
    e = evaluation({**CURVES, "project": lambda x: (x**9, x**0.5)})
    for width in (40, 80, 120, None):
        text = evaluation_table(
            e,
            ShellWords("'my base' adapter", findings="f.safetensors"),
            Screen(width),
            "wrote e.json",
        )
        flat = " ".join(text.split())
        assert (
            "streamer mitigate 'my base' adapter -o OUTPUT --method project --lambda 0.9 --findings f.safetensors"
            in flat
        )
        assert flat.startswith("use project 0.9: it keeps ")
        assert flat.index("wrote e.json") < flat.index(
            "next: streamer repair 'my base' adapter --keep"
        )
        assert "KL left" in flat
        if width == 80:
            assert all(len(line) <= width for line in text.splitlines())
