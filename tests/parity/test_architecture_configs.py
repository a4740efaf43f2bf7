"""The table of architectures has the layers of every config of a class, and those of fine-tuned models are judged as what they are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from seeds import vary
from torch import nn

import streamer
from streamer.plan.architectures import Architecture, architecture_of, pattern_of

# Class → values of its config besides the defaults, and modules that it has under these only.
FURTHER: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "DebertaV2ForMaskedLM": (
        {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 2},
        ("deberta.encoder.rel_embeddings", "deberta.embeddings.token_type_embeddings"),
    ),
    "DebertaForMaskedLM": (
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 2},
        ("deberta.encoder.rel_embeddings", "deberta.embeddings.token_type_embeddings"),
    ),
    "XLMWithLMHeadModel": ({"n_langs": 4}, ("transformer.lang_embeddings",)),
    "FlaubertWithLMHeadModel": ({"n_langs": 4}, ("transformer.lang_embeddings",)),
    "LongT5ForConditionalGeneration": (
        {"encoder_attention_type": "transient-global"},
        ("encoder.block.0.layer.0.TransientGlobalSelfAttention.global_relative_attention_bias",),
    ),
    "T5ForConditionalGeneration": ({"feed_forward_proj": "gated-gelu"}, ("encoder.block.0.layer.1.DenseReluDense.wi_0",)),
    "DeepseekV3ForCausalLM": ({"q_lora_rank": None}, ("model.layers.1.self_attn.q_proj",)),
    "OPTForCausalLM": ({"word_embed_proj_dim": 8}, ("model.decoder.project_in",)),
}  # fmt: skip


def lacking(model: nn.Module, architecture: Architecture) -> set[str]:
    """Patterns of a model's tensors that the table does not have, and of modules that it takes for embeddings, or does not."""
    modules = dict(model.named_modules())
    weights = {
        name: name.rpartition(".")[0]
        for name, p in model.named_parameters()
        if name.endswith(".weight") and p.ndim == 2
    }
    wrong = [m for m in weights.values() if architecture.is_embedding(m) != isinstance(modules[m], nn.Embedding)]
    return {pattern_of(name) for name in model.state_dict() if not architecture.has_tensor(name)} | {
        *map(pattern_of, wrong)
    }


@pytest.mark.parametrize("cls", FURTHER)
def test_table_has_what_another_config_makes(cls: str) -> None:
    values, own = FURTHER[cls]
    config = zoo.tiny_config(getattr(transformers, cls).config_class, **values)
    with torch.device("meta"):
        model = getattr(transformers, cls)(config)
    architecture = architecture_of({**config.to_dict(), "architectures": [cls]})
    assert architecture is not None
    assert {*own} <= dict(model.named_modules()).keys()
    assert lacking(model, architecture) == set()


@pytest.mark.parametrize("cls", [cls for cls in FURTHER if cls.startswith(("Deberta", "XLM", "Flaubert", "LongT5"))])
def test_embeddings_of_a_fine_tuned_model_of_another_config_are_judged_on_the_output_side(
    cls: str, tmp_path: Path
) -> None:
    values, own = FURTHER[cls]
    torch.manual_seed(vary(0))
    model = getattr(transformers, cls)(zoo.tiny_config(getattr(transformers, cls).config_class, **values))
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    model.save_pretrained(tmp_path / "tuned")
    found = {m.module: m for m in streamer.detect_intruder_dimensions(tmp_path / "base", tmp_path / "tuned")}
    for module in own:
        weight = model.get_submodule(module).weight
        assert found[module].transposed
        assert found[module].shape == tuple(weight.shape[::-1])


def test_layer_that_the_table_does_not_have_is_an_embedding_by_its_name() -> None:
    """Earlier versions of transformers had relative positions in BERT."""
    architecture = architecture_of({"architectures": ["BertModel"], "model_type": "bert"})
    assert architecture is not None
    attention = "encoder.layer.0.attention.self"
    for module, looked_up in {"distance_embedding": True, "another": False, "query": False}.items():
        assert architecture.is_embedding(f"{attention}.{module}") == looked_up
        assert architecture.is_embedding(f"bert.{attention}.{module}") == looked_up


OF_SEVERAL_KINDS = ["BambaForCausalLM", "BltForCausalLM", "DeepseekV2ForCausalLM", "Dots1ForCausalLM", "GraniteMoeHybridForCausalLM",
                    "KimiLinearForCausalLM", "Mistral4ForCausalLM", "ReformerForMaskedLM"]  # fmt: skip


def tensors_lacking(names: Iterable[str]) -> tuple[dict[str, set[str]], int]:
    """Class → what the table lacks of a tiny model of it, and the number of classes that were built."""
    found, count = {}, 0
    for name in names:
        try:
            config = zoo.config_of(name)
            with torch.device("meta"):
                model = getattr(transformers, name)(config)
        except Exception:  # other libraries are not installed, or small sizes do not suit it
            continue
        count += 1
        architecture = architecture_of({**config.to_dict(), "architectures": [name]})
        if missing := {"class"} if architecture is None else lacking(model, architecture):
            found[name] = missing
    return found, count


def test_table_has_the_tensors_of_models_of_several_kinds_of_layers() -> None:
    assert tensors_lacking(OF_SEVERAL_KINDS) == ({}, len(OF_SEVERAL_KINDS))


@pytest.mark.slow
def test_table_has_every_tensor_of_every_class() -> None:
    missing, count = tensors_lacking(zoo.classes())
    assert missing == {}
    assert count > 450
