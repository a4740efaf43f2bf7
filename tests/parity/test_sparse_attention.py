"""Models whose attention chooses some of the keys: a tie is decided by how many there are, padding included, so that nothing is padded."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenized_texts
import torch
import transformers
import zoo
from causal_models import make_adapter
from evaluated import answer, assert_sums, precisions
from seeds import vary

import streamer

CHOOSING = {
    "AXK2ForCausalLM": ["q_b_proj", "o_proj"],
    "DeepseekV32ForCausalLM": ["q_b_proj", "o_proj"],
    "DogeForCausalLM": ["q_proj", "down_proj"],
    "GlmMoeDsaForCausalLM": ["q_b_proj", "o_proj"],
    "HYV4ForCausalLM": ["q_b_proj", "o_proj"],
}
"""Class → modules of its adapter."""

QUICK = {"DogeForCausalLM", "GlmMoeDsaForCausalLM"}
"""One that chooses by values, and one by an indexer, as the others do."""

EACH = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.long) for name in CHOOSING]

CHOSEN = 4
"""Keys that attention chooses."""


def make_choosing(name: str, path: Path) -> Any:
    """A tiny model of one head of the indexer, where most scores are 0 and tie, and a tokenizer of words; returns its class."""
    config = zoo.config_of(name)
    values = {"index_topk": CHOSEN, "keep_window_size": CHOSEN, "index_n_heads": 1, "index_head_dim": 16}
    for key in values.keys() & vars(config).keys():
        setattr(config, key, values[key])
    torch.manual_seed(vary(0))
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    tokenized_texts.save(path, "words", start=False)
    return type(model)


def make_text(path: Path, lengths: list[int], seed: int) -> Path:
    """Sequences in which no word repeats if there are enough: Doge's scores of equal words tie but for rounding, which then chooses."""
    rng, words = random.Random(vary(seed)), tokenized_texts.WORDS
    drawn = (rng.sample(words, n) if n <= len(words) else rng.choices(words, k=n) for n in lengths)
    path.write_text("".join(json.dumps({"text": " ".join(some)}) + "\n" for some in drawn))
    return path


def make_inputs(name: str, path: Path, factor: int = 1) -> tuple[Any, Path, Path, dict[str, Path]]:
    """The model's class, base, adapter and texts, whose sequences have several lengths, `factor` times as long."""
    cls, base = make_choosing(name, path / "base"), path / "base"
    adapter = make_adapter(cls, base, path / "adapter", CHOOSING[name], lora_alpha=4)
    lengths = {"general": [21, 17, 17, 12, 7, 3], "task": [19, 11, 15, 11]}
    texts = {
        text: make_text(path / f"{text}.jsonl", [factor * n for n in own], len(own)) for text, own in lengths.items()
    }
    return cls, base, adapter, texts


def assert_alone(found: streamer.Evaluation, cls: Any, base: Path, adapter: Path, texts: dict[str, Path]) -> None:
    """The losses of the base, the adapter, and half of it are those of transformers with each sequence alone."""
    models = [precisions(cls, base)]
    for scale in (1.0, 0.5):
        merged = base.parent / f"merged-{scale}"
        streamer.merge_with_reduced_intruder_dimensions(base, adapter, merged, method="shrink", mitigation_lambda=scale)
        models.append(precisions(cls, merged))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    rows = [0, 1, [v.name for v in found.variants].index("shrink 0.5")]
    for text, path in texts.items():
        ours = getattr(found, text)
        for i, line in enumerate(map(json.loads, path.read_text().splitlines())):
            ids = torch.tensor([tokenizer(line["text"]).input_ids])
            answers = [answer(model, ids) for model in models]
            for v, own in zip(rows, answers, strict=True):
                assert_sums(ours.loss[v, i], ours.kl[v, i], own, answers[0], ids, (text, i, v))


@pytest.mark.parametrize("name", EACH)
def test_losses_are_those_of_each_sequence_alone(name: str, tmp_path: Path) -> None:
    cls, base, adapter, texts = make_inputs(name, tmp_path)
    found = streamer.evaluate_variants(base, adapter, methods=["shrink"], lambdas=(0.5,), on_event=str, **texts)
    assert_alone(found, cls, base, adapter, texts)


@pytest.mark.parametrize("name", ["DeepseekV32ForCausalLM", "DogeForCausalLM"])
def test_the_check_of_logits_finds_a_class_whose_config_does_not_say_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, base, adapter, texts = make_inputs(name, tmp_path, factor=2)
    options: dict[str, Any] = {"methods": ["shrink"], "lambdas": (0.5,), "on_event": str}
    stated = streamer.evaluate_variants(base, adapter, **options, **texts)
    monkeypatch.setattr("streamer.streaming.model.CHOSEN_KEYS", ())
    found = streamer.evaluate_variants(base, adapter, **options, **texts)
    for text in texts:
        assert np.array_equal(getattr(found, text).loss, getattr(stated, text).loss)


def make_learned_text(cls: Any, base: Path, adapter: Path, path: Path) -> Path:
    """Sequences of several lengths that the adapted model gives with its own probabilities."""
    merged = path.parent / "merged"
    streamer.merge_with_reduced_intruder_dimensions(base, adapter, merged, method="shrink", mitigation_lambda=1)
    model, tokenizer = cls.from_pretrained(merged).eval(), transformers.AutoTokenizer.from_pretrained(base)
    words = torch.tensor(sorted(i for word, i in tokenizer.get_vocab().items() if word in tokenized_texts.WORDS))
    ids, generator = words[torch.randint(len(words), (30, 1))], torch.Generator().manual_seed(vary(4))
    for _ in range(23):
        with torch.no_grad():
            p = model(input_ids=ids, use_cache=False).logits[:, -1, words].softmax(-1)
        ids = torch.cat([ids, words[torch.multinomial(p, 1, generator=generator)]], 1)
    lines = [{"text": tokenizer.decode(row[: 24 - i % 6])} for i, row in enumerate(ids)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.long
def test_a_fit_divides_its_sequences_by_length_if_the_check_of_logits_finds_that_it_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls, base, adapter, texts = make_inputs("GlmMoeDsaForCausalLM", tmp_path, factor=2)
    options: dict[str, Any] = {"holdout": 0.5, "on_event": str}
    texts["task"] = make_learned_text(cls, base, adapter, tmp_path / "learned.jsonl")
    stated = streamer.fit_coefficients(base, adapter, **texts, **options)
    monkeypatch.setattr("streamer.streaming.model.CHOSEN_KEYS", ())
    found = streamer.fit_coefficients(base, adapter, **texts, **options)
    assert found.facts["sets"] == stated.facts["sets"]
