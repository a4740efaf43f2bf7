"""Questions with choices are read and scored as lm-evaluation-harness does: its rules, on transformers' tokenizers and merged models."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from causal_models import CAUSAL, make_adapter, make_base
from evaluated import loaded, logits_of
from evaluations import faults
from seeds import vary
from tokenized_texts import WORDS, lines, read, save

import streamer
from streamer.errors import FormatError
from streamer.evaluation.evaluation import Evaluation

FOUR = {"question": "the quick brown", "choices": ["fox", "dog naps", "wizards", "lazy jugs of"], "answer": 1}


def harness_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """`TemplateLM.loglikelihood` and `_encode_pair` of lm-evaluation-harness 0.4.13, for causal models."""
    if context == "":
        own = tokenizer.encode(continuation, add_special_tokens=False)
        prefix = tokenizer.bos_token_id
        return ([prefix], own) if prefix != own[0] else (own[:1], own[1:])
    spaces = len(context) - len(context.rstrip())
    if spaces > 0:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    before = tokenizer.encode(context)
    return before, tokenizer.encode(context + continuation)[len(before) :]


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("kind", ["bytes", "pieces", "words"])
@pytest.mark.parametrize("context", ["the quick brown", "the quick \n ", "東京 🦊 is ", ""])
def test_a_choice_is_the_tokens_that_the_harness_takes(kind: str, start: bool, context: str, tmp_path: Path) -> None:
    tokenizer = save(tmp_path, kind, start=start)
    choices = ["fox", " dog naps", "straße, naïve", "\n"]
    choices = choices[:3] if kind == "words" else choices  # white space is no word
    found = read(lines(tmp_path / "t.jsonl", *[{"question": context, "choices": choices, "answer": 2}] * 2))
    expected = [harness_pair(tokenizer, context, f" {choice}") for choice in choices] * 2
    for (before, own), ids, counted in zip(expected, found.ids, found.counted, strict=True):
        assert ids.tolist() == [*before, *own]
        assert counted.tolist() == [False] * len(before) + [True] * len(own)
    assert found.tokens == 2 * len(expected[2][1])
    assert (found.facts()["sequences"], found.facts()["choices"]) == (2, len(found.ids))


def test_the_answer_is_a_number_a_text_or_a_letter(tmp_path: Path) -> None:
    save(tmp_path, "words")
    digests = {
        read(lines(tmp_path / "t.jsonl", *[{**FOUR, "answer": answer}] * 2)).digest() for answer in (1, "B", "dog naps")
    }
    assert len(digests) == 1
    assert read(lines(tmp_path / "t.jsonl", *[{**FOUR, "answer": 2}] * 2)).digest() not in digests
    letters = {"prompt": "a", "choices": ["A", "B"], "answer": "B"}
    assert read(lines(tmp_path / "t.jsonl", letters, letters)).questions.right.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer": 4}, "expected 'answer' to be the number of a choice, from 0, its text, or its letter, found 4"),
        ({"answer": -1}, "found -1"),
        ({"answer": True}, "found True"),
        ({"answer": "E"}, "found 'E'"),
        ({"answer": None}, "found None"),
        ({"answer": "1"}, "its letter, found '1'; write a number without quotes, counted from 0"),
        ({"choices": ["B", "A"], "answer": "A"}, "found two choices by letter and by text"),
        ({"choices": ["fox"]}, "expected 'choices' to be a list of two different strings or more, found "),
        ({"choices": ["fox", "fox"]}, "two different strings"),
        ({"choices": ["fox", ""]}, "two different strings"),
        ({"choices": {"text": ["fox"]}}, "two different strings"),
        ({"prompt": "the"}, "expected 'choices' beside 'question' or 'prompt', found "),
        ({"question": 3}, "expected 'question' to be a string, found 3"),
        ({"text": "the"}, "one kind alone"),
        ({"question": "the " * 14}, "the question with the choice 'lazy jugs of' has 18 tokens; give --length 18"),
    ],
)  # fmt: skip
def test_questions_that_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    save(tmp_path, "words")
    path = lines(tmp_path / "t.jsonl", FOUR, {**FOUR, **change})
    with pytest.raises(FormatError) as e:
        read(path, length=16)
    assert str(e.value).startswith(f"{path}: line 2: ")
    assert words in str(e.value)


def test_files_that_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "words", start=False)
    for given, words in (
        ((FOUR,), "at least 2 sequences"),
        ((FOUR, {"text": "the fox"}), "expected 'choices' on every line or on none, found them on 1 of 2"),
        (
            (FOUR, {k: v for k, v in FOUR.items() if k != "answer"}),
            "line 2: 'answer' is missing: the number of the right",
        ),
        (({**FOUR, "question": " "}, FOUR), "line 1: expected tokens before the choice 'fox', found none"),
    ):
        with pytest.raises(FormatError, match=words):
            read(lines(tmp_path / "t.jsonl", *given))


def questions(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(vary(seed))

    def words(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    return [
        {"question": words(1, 5), "choices": sorted({words(1, 4) for _ in range(5)})[: rng.randint(2, 4)], "answer": 0}
        for _ in range(count)
    ]


def picks(model: Any, tokenizer: Any, line: dict[str, Any]) -> tuple[int, int, list[float]]:
    """The choices that a loaded model takes, by log-likelihood and for each character, and these."""
    scores = []
    for choice in line["choices"]:
        before, own = harness_pair(tokenizer, line["question"], f" {choice}")
        log_p = logits_of(model, torch.tensor([before + own])).log_softmax(-1)[0, len(before) - 1 : -1]
        scores.append(float(log_p.gather(-1, torch.tensor(own)[:, None]).sum()))
    return (
        int(np.argmax(scores)),
        int(np.argmax(np.array(scores) / [float(len(c)) for c in line["choices"]])),
        scores,
    )


def test_accuracies_are_those_of_merged_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every variant, in passes that part the choices of questions; errors are paired by question."""
    base = tmp_path / "base"
    cls = make_base("llama", base)
    tokenizer = save(base, "words")
    adapter = make_adapter(cls, base, tmp_path / "adapter", CAUSAL["llama"][2])
    streamer.merge_with_reduced_intruder_dimensions(base, adapter, tmp_path / "a", method="shrink", mitigation_lambda=1)
    streamer.merge_with_reduced_intruder_dimensions(
        base, adapter, tmp_path / "s", method="shrink", mitigation_lambda=0.5
    )
    models = [loaded(cls, path, torch.float64) for path in (base, tmp_path / "a", tmp_path / "s")]
    general, task, other = questions(20, 1), questions(20, 2), questions(9, 3)
    with torch.no_grad():
        for line in task[:16]:  # so that the adapter has learned something
            line["answer"] = picks(models[1], tokenizer, line)[0]
        for line in general[:16]:
            line["answer"] = picks(models[0], tokenizer, line)[0]
        known = {
            name: [[picks(model, tokenizer, line) for line in text] for model in models]
            for name, text in (("general", general), ("task", task), ("other.jsonl", other))
        }
    texts = {
        "general": lines(tmp_path / "general.jsonl", *general),
        "task": lines(tmp_path / "task.jsonl", *task),
        "other": lines(tmp_path / "other.jsonl", *other),
    }
    monkeypatch.setattr("streamer.measuring.pass_memory.ROWS", 300)
    e = streamer.evaluate_variants(base, adapter, tmp_path / "e.json", methods=["shrink"], lambdas=[0.5], keep=1.0,
                                   sequences=100, on_event=lambda event: None, **texts)  # fmt: skip
    tree = json.loads((tmp_path / "e.json").read_text())
    assert faults(tree) == []
    assert [v.name for v in e.variants] == ["base", "adapter", "shrink 0.5"]
    for name, lines_of in (("general", general), ("task", task), ("other.jsonl", other)):
        right = [line["answer"] for line in lines_of]
        for v, own in enumerate(known[name]):
            loss = [-scores[a] for (*_, scores), a in zip(own, right, strict=True)]
            np.testing.assert_allclose(e.sums[name].loss[v], loss, atol=1e-4)
            for measure, at in (("acc", 0), ("acc_norm", 1)):
                answered = np.array([pick[at] == a for pick, a in zip(own, right, strict=True)], float)
                assert getattr(e.sums[name], measure)[v].tolist() == answered.tolist()
                adapter_s = np.array([pick[at] == a for pick, a in zip(known[name][1], right, strict=True)], float)
                figures = tree["variants"][v]
                figures = figures[name] if name in figures else figures["others"][0]
                found, n = figures[measure], len(right)
                assert found["value"] == pytest.approx(answered.mean())
                assert found["value_se"] == pytest.approx(answered.std(ddof=1) / np.sqrt(n))
                against = answered - adapter_s
                assert found["against_adapter"] == pytest.approx(against.mean())
                assert found["against_adapter_se"] == pytest.approx(against.std(ddof=1) / np.sqrt(n))
    assert tree["variants"][1]["task"]["acc"]["share"] in (1.0, None)
    assert Evaluation.from_json(e.to_json()).to_json() == e.to_json()
    head = e.table().splitlines()[2]
    assert [word in head for word in ("general acc", "general acc left", "task acc kept", "other.jsonl acc")] == [
        True
    ] * 4
