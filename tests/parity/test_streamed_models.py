"""Streamed models: errors of their own code, attention that chooses keys, the cost of a sweep, llama.cpp's figures."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenized_texts
import torch
import transformers
import zoo
from architectures import config
from causal_models import CAUSAL, make_adapter, make_base
from evaluated import (
    answer,
    assert_sums,
    loaded,
    merged_variants,
    nothing,
    precisions,
    sequences,
    streamed,
    token_ids,
)
from evaluations import FACTS
from numpy.typing import NDArray
from pairs import make_pair, merge
from seeds import vary
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import LlamaMLP

import streamer
from streamer.errors import UnsupportedError, UsageError
from streamer.evaluation.evaluation import Evaluation
from streamer.linalg import operators
from streamer.measuring.batches import CALL, batches, sweep_cost
from streamer.measuring.losses import batch_sums
from streamer.measuring.statistics import EvaluatedVariant
from streamer.methods import UNCHANGED
from streamer.plan.plan import make_plan
from streamer.streaming.skeleton import refused_errors
from streamer.streaming.sweep import SweepModel
from streamer.streaming.variants import ADAPTER, BASE, Variant, VariantSet, make_variants


def make_inputs(
    name: str, target: str, path: Path, length: int = 12, **values: Any
) -> dict[str, Path]:
    """A tiny model of a class, an adapter, and texts of so many tokens."""
    made = zoo.config_of(name)
    for key, value in {"is_decoder": True, **values}.items():
        setattr(made, key, value)
    torch.manual_seed(vary(0))
    model = getattr(transformers, name)(made)
    model.save_pretrained(path / "base")
    adapter = make_adapter(type(model), path / "base", path / "adapter", [target])
    for text, ids in (
        ("general", token_ids(60, 4, length) + 2),
        ("task", token_ids(50, 4, length) + 2),
    ):
        np.save(path / f"{text}.npy", ids)
    return {
        "base": path / "base",
        "adapter": adapter,
        **{t: path / f"{t}.npy" for t in ("general", "task")},
    }


def test_an_error_of_the_models_own_code_names_the_module(tmp_path: Path) -> None:
    given = make_inputs("XmodForCausalLM", "query", tmp_path, default_language=None)
    for run in (streamer.evaluate_variants, streamer.repair_adapter):
        with pytest.raises(
            UnsupportedError,
            match=r"base: module 'roberta' of XmodForCausalLM raises ValueError: Input language unknown",
        ) as e:
            run(**given, output=tmp_path / run.__name__, on_event=str)
        assert len(str(e.value).replace(str(tmp_path), "")) <= 300


RAISED = {
    "the model's": (
        UnsupportedError,
        r"module 'model.layers.0.mlp' of Llama\w+ raises KeyError: 'absent'",
    ),
    "memory": (MemoryError, "allocate"),
}


@pytest.mark.parametrize("kind", RAISED)
def test_what_ends_a_pass_is_one_of_our_errors_unless_memory_is_short(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = make_inputs("LlamaForCausalLM", "q_proj", tmp_path)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.empty(1 << 60) if kind == "memory" else {}["absent"]

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    error, message = RAISED[kind]
    with pytest.raises(error, match=message):
        streamed(
            given["base"],
            given["adapter"],
            make_variants(("shrink",), (0.5,), "all"),
            None,
            token_ids(60),
        )


def test_a_fault_of_this_package_keeps_its_traceback() -> None:
    names: dict[str, Any] = {"__name__": "streamer.part"}
    exec("def fault():\n    raise KeyError('absent')", names)  # a function of a module of ours
    with (
        pytest.raises(KeyError, match="absent"),
        refused_errors(Path("base"), torch.nn.Linear(1, 1)),
    ):
        names["fault"]()


def test_a_config_of_which_transformers_makes_no_model(tmp_path: Path) -> None:
    given = make_inputs("LlamaForCausalLM", "q_proj", tmp_path)
    file = given["base"] / "config.json"
    file.write_text(re.sub(r'"hidden_act": "\w+"', '"hidden_act": "none such"', file.read_text()))
    with pytest.raises(
        UnsupportedError,
        match=r"config.json: transformers cannot build LlamaForCausalLM from it: .*none such",
    ):
        streamer.evaluate_variants(**given)


POSITIONS = {
    "RobertaForCausalLM": ("query", 63),
    "XLNetLMHeadModel": ("layer_1", None),
    "OPTForCausalLM": ("q_proj", 64),
}
"""Class → module of an adapter, tokens that a sequence may have: in RoBERTa's table of 64 rows the first is of padding."""


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_are_those_that_the_model_takes(name: str, tmp_path: Path) -> None:
    target, positions = POSITIONS[name]
    given = make_inputs(name, target, tmp_path, length=positions or 12)
    model = SweepModel(
        VariantSet(make_plan(given["base"], given["adapter"]), (Variant(BASE, None),), None)
    )
    assert model.positions == positions
    if positions is None:
        with pytest.raises(UnsupportedError, match="a token sees those that follow it"):
            streamer.evaluate_variants(**given, methods=["shrink"], lambdas=(0.5,))
        return
    streamer.evaluate_variants(**given, methods=["shrink"], lambdas=(0.5,))
    np.save(given["task"], token_ids(50, 4, positions + 1))
    with pytest.raises(
        UsageError,
        match=rf"has {positions + 1} tokens, and the model {positions} positions; give --length {positions}$",
    ):
        streamer.evaluate_variants(**given, methods=["shrink"], lambdas=(0.5,))


def test_a_row_that_a_table_does_not_have_is_not_read_from_the_bytes_behind_it(
    tmp_path: Path,
) -> None:
    torch.manual_seed(vary(0))
    model = transformers.GPT2LMHeadModel(
        config("GPT2", n_embd=32, n_layer=1, n_head=4, vocab_size=64, n_positions=16)
    )
    model.save_pretrained(tmp_path / "base")
    adapter = make_adapter(type(model), tmp_path / "base", tmp_path / "adapter", ["c_attn"])
    variants = make_variants(("shrink",), (0.5,), "all")
    with pytest.raises(
        UnsupportedError,
        match=r"'transformer.wpe.weight': expected rows 0 to 15, found 0 to 17 looked up",
    ):
        streamed(tmp_path / "base", adapter, variants, None, token_ids(64, 2, 18))


CHOOSING = {
    "AXK2ForCausalLM": ["q_b_proj", "o_proj"],
    "DeepseekV32ForCausalLM": ["q_b_proj", "o_proj"],
    "DogeForCausalLM": ["q_proj", "down_proj"],
    "GlmMoeDsaForCausalLM": ["q_b_proj", "o_proj"],
    "HYV4ForCausalLM": ["q_b_proj", "o_proj"],
}
"""Class → modules of its adapter."""

QUICK = {"GlmMoeDsaForCausalLM"}
"""One that chooses by an indexer, as the others do but Doge, which chooses by values."""

EACH = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.long) for name in CHOOSING]

CHOSEN = 4
"""Keys that attention chooses."""


def make_choosing(name: str, path: Path) -> Any:
    """A tiny model of one head of the indexer, where most scores are 0 and tie, and a tokenizer of words; returns its class."""
    config = zoo.config_of(name)
    values = {
        "index_topk": CHOSEN,
        "keep_window_size": CHOSEN,
        "index_n_heads": 1,
        "index_head_dim": 16,
    }
    for key in values.keys() & vars(config).keys():
        setattr(config, key, values[key])
    torch.manual_seed(vary(0))
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5) if parameter.ndim > 1 else parameter.add_(
                0.1 * torch.randn_like(parameter)
            )
    model.save_pretrained(path)
    tokenized_texts.save(path, "words", start=False)
    return type(model)


def make_text(path: Path, lengths: list[int], seed: int) -> Path:
    """Sequences in which no word repeats if there are enough: Doge's scores of equal words tie but for rounding, which then chooses."""
    rng = random.Random(vary(seed))
    words = tokenized_texts.WORDS
    drawn = (rng.sample(words, n) if n <= len(words) else rng.choices(words, k=n) for n in lengths)
    path.write_text("".join(json.dumps({"text": " ".join(some)}) + "\n" for some in drawn))
    return path


def make_choosing_inputs(
    name: str, path: Path, factor: int = 1
) -> tuple[Any, Path, Path, dict[str, Path]]:
    """The model's class, base, adapter and texts, whose sequences have several lengths, `factor` times as long."""
    cls = make_choosing(name, path / "base")
    base = path / "base"
    adapter = make_adapter(cls, base, path / "adapter", CHOOSING[name], lora_alpha=4)
    lengths = {"general": [21, 17, 17, 12, 7, 3], "task": [19, 11, 15, 11]}
    texts = {
        text: make_text(path / f"{text}.jsonl", [factor * n for n in own], len(own))
        for text, own in lengths.items()
    }
    return cls, base, adapter, texts


def assert_alone(
    found: streamer.Evaluation, cls: Any, base: Path, adapter: Path, texts: dict[str, Path]
) -> None:
    """The losses of the base, the adapter, and half of it are those of transformers with each sequence alone."""
    models = [precisions(cls, base)]
    for scale in (1.0, 0.5):
        merged = base.parent / f"merged-{scale}"
        merge(base, adapter, merged, scale, method="shrink")
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
    cls, base, adapter, texts = make_choosing_inputs(name, tmp_path)
    found = streamer.evaluate_variants(
        base, adapter, methods=["shrink"], lambdas=(0.5,), on_event=str, **texts
    )
    assert_alone(found, cls, base, adapter, texts)


@pytest.mark.parametrize(
    "name", ["DeepseekV32ForCausalLM", pytest.param("DogeForCausalLM", marks=pytest.mark.long)]
)
def test_the_check_of_logits_finds_a_class_whose_config_does_not_say_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, base, adapter, texts = make_choosing_inputs(name, tmp_path, factor=2)
    options: dict[str, Any] = {"methods": ["shrink"], "lambdas": (0.5,), "on_event": str}
    stated = streamer.evaluate_variants(base, adapter, **options, **texts)
    monkeypatch.setattr("streamer.streaming.size.CHOSEN_KEYS", ())
    found = streamer.evaluate_variants(base, adapter, **options, **texts)
    for text in texts:
        assert np.array_equal(getattr(found, text).loss, getattr(stated, text).loss)


def make_learned_text(cls: Any, base: Path, adapter: Path, path: Path) -> Path:
    """Sequences of several lengths that the adapted model gives with its own probabilities."""
    merged = path.parent / "merged"
    merge(base, adapter, merged, 1, method="shrink")
    model = cls.from_pretrained(merged).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    words = torch.tensor(
        sorted(i for word, i in tokenizer.get_vocab().items() if word in tokenized_texts.WORDS)
    )
    ids = words[torch.randint(len(words), (30, 1))]
    generator = torch.Generator().manual_seed(vary(4))
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
    cls, base, adapter, texts = make_choosing_inputs("GlmMoeDsaForCausalLM", tmp_path, factor=2)
    options: dict[str, Any] = {"holdout": 0.5, "on_event": str}
    texts["task"] = make_learned_text(cls, base, adapter, tmp_path / "learned.jsonl")
    stated = streamer.repair_adapter(base, adapter, tmp_path / "stated", **texts, **options)
    monkeypatch.setattr("streamer.streaming.size.CHOSEN_KEYS", ())
    found = streamer.repair_adapter(base, adapter, tmp_path / "found", **texts, **options)
    assert found["rows"] == stated["rows"]


def test_a_sweep_costs_what_torch_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        operators, "_has_fast_onednn", lambda: False
    )  # whose products torch does not count
    _, base, adapter = make_pair("llama", tmp_path, CAUSAL["llama"][2])
    variants = Variant(BASE, None), Variant(ADAPTER, UNCHANGED)
    model = SweepModel(VariantSet(make_plan(base, adapter), variants, None))
    held_out = batches({"text": sequences(token_ids(64)[:1])}, len(variants), model.size, 12, False)
    with FlopCounterMode(display=False) as counter:
        model.run(held_out[0].groups, nothing)
        batch_sums(model, held_out, model.vocabulary, nothing)
    cost = sweep_cost(model.size, 24, 2) - 2 * CALL * len(model.size.products)
    assert 1 <= counter.get_total_flops() / 2 / cost < 1.1, "attention and the deltas come on top"


Floats = NDArray[np.float64]


def log_softmax(logits: Floats) -> Floats:
    z = logits - logits.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def printed(own: Floats, base: Floats, labels: NDArray[np.int64]) -> dict[str, float]:
    """Of logits (tokens, vocabulary). llama.cpp rounds the base's to 16 bits, which is left out."""
    q = log_softmax(own)
    p = log_softmax(base)
    rows = np.arange(len(labels))
    kl = (np.exp(p) * (p - q)).sum(-1)
    nll = -q[rows, labels]
    nll_base = -p[rows, labels]
    return {
        "loss": nll.mean(),
        "perplexity": np.exp(nll.mean()),
        "kl": kl.mean(),
        "agreement": (own.argmax(-1) == base.argmax(-1)).mean(),
        "forgetting": nll.mean() - nll_base.mean(),
    }


def test_they_are_those_of_its_formulas(tmp_path: Path) -> None:
    """Equal to 1e-6."""
    cls = make_base("llama", tmp_path / "base")
    base = tmp_path / "base"
    adapter = make_adapter(cls, base, tmp_path / "adapter", ["q_proj", "down_proj"])
    ids = token_ids(64, 6, 60)
    variants = make_variants(("shrink",), (0.5, 0.1), "all")
    sums = streamed(base, adapter, variants, None, ids)
    evaluation = Evaluation.of(
        [EvaluatedVariant.of(v) for v in variants],
        dict.fromkeys(("general", "task"), sums),
        FACTS,
        0.9,
    )
    tree = Evaluation.from_json(evaluation.to_json()).to_dict()
    labels = ids[:, 1:].numpy().ravel()
    logits = []
    for merged in merged_variants(base, adapter, variants, None, tmp_path):
        with torch.no_grad():
            z = loaded(cls, merged, torch.float32)(input_ids=ids).logits[:, :-1]
        logits.append(z.double().numpy().reshape(len(labels), -1))
    for v, own in zip(tree["variants"], logits, strict=True):
        exact = printed(own, logits[0], labels)
        found = {**v["general"], "forgetting": v["against_base"]["general_loss"]}
        assert {name: found[name] for name in exact} == pytest.approx(exact, rel=1e-6, abs=1e-6), v[
            "name"
        ]
