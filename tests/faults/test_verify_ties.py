"""Embeddings and heads that are tied, or no more, and were changed on purpose with every digest made right: `verify` finds each change."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from attacks import config, found, tensor
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from verified import Job, make_all_outputs

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def trained_embedding(home: Path, copied: bool, **options: Any) -> Job:
    """A base whose head is its embedding, with a copy of it if so asked, and an adapter of the modules that options name."""
    shape = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=True, **shape)).save_pretrained(home / "base")
    if copied:
        tensors = load_file(home / "base" / "model.safetensors")
        save_file(tensors | {HEAD: tensors[EMBEDDING].clone()}, home / "base" / "model.safetensors", {"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of the tie
        model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(home / "base"), peft.LoraConfig(r=4, **options))
        for parameter in (p for p in model.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(home / "trained", save_embedding_layers=False)
    return make_all_outputs(home / "base", home / "trained", home)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A base whose head is its embedding, and an adapter that trains the head alone: the merged model has both."""
    return trained_embedding(tmp_path_factory.mktemp("untied"), False, target_modules=["lm_head"])


UNTIED = {
    "the head": (tensor(HEAD, lambda t: t[3].mul_(1.01)), "within one rounding"),
    "the embedding": (tensor(EMBEDDING, lambda t: t.mul_(1.01)), f"tensor {EMBEDDING!r}: expected the base's bytes"),
    "tied again": (config("config.json", tie_word_embeddings=True), "config.json: expected tie_word_embeddings false"),
    "vocab_size": (config("config.json", vocab_size=48), "config.json: expected vocab_size 64"),
    "the class": (
        config("config.json", architectures=["LlamaForSequenceClassification"]),
        "config.json: expected architectures ",
    ),
}


@pytest.mark.parametrize("name", UNTIED)
def test_a_changed_head_that_was_tied(untied: Job, tmp_path: Path, name: str) -> None:
    attack, said = UNTIED[name]
    told = found(untied.copy("model", tmp_path), untied, attack)
    assert any(said in line for line in told), told


def test_a_head_that_stays_tied_and_is_said_to_be_none(tmp_path: Path) -> None:
    """A loader would make one of random values."""
    job = trained_embedding(tmp_path, False, target_modules=["embed_tokens"], ensure_weight_tying=True)
    told = found(job.home / "model", job, config("config.json", tie_word_embeddings=False))
    assert any("config.json: expected tie_word_embeddings true" in line for line in told), told


def test_a_copy_of_the_embedding_that_is_no_more_one(tmp_path: Path) -> None:
    """A loader that ties them would lose the delta of one of the two."""
    job = trained_embedding(tmp_path, True, target_modules=["lm_head"])
    told = found(job.home / "model", job, config("config.json", tie_word_embeddings=True))
    assert any("config.json: expected tie_word_embeddings false" in line for line in told), told


@pytest.mark.parametrize("name", ["lm_head.lora_A.weight", "lm_head.lora_B.weight"])
def test_the_factors_of_a_tied_head(tmp_path: Path, name: str) -> None:
    job = trained_embedding(tmp_path, False, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    told = found(job.home / "adapter", job, tensor(name, lambda t: t.mul_(1.01)))
    assert any("tensor 'lm_head': expected the factors of the embedding that it is tied to" in line for line in told), (
        told
    )
