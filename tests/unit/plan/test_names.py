"""The index of a checkpoint's names: with and without the base's prefix, on disk and in the loaded model, and of tied tensors."""

from __future__ import annotations

import pytest

from streamer.plan.architectures import Architecture, architecture_for
from streamer.plan.names import NameIndex
from streamer.weights.model_config import ModelConfig

LLAMA = ModelConfig({"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
TIED = ModelConfig({**LLAMA.values, "tie_word_embeddings": True})
LLAVA = ModelConfig(
    {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {"model_type": "llama", "tie_word_embeddings": True},
        "vision_config": {"model_type": "clip_vision_model"},
    }
)


def facts(config: ModelConfig) -> Architecture:
    found = architecture_for(config)
    assert found is not None
    return found


@pytest.mark.parametrize("stored", ["model.norm.weight", "norm.weight"])
@pytest.mark.parametrize("run_time", ["model.norm.weight", "norm.weight"])
def test_a_tensor_is_found_with_and_without_the_prefix(stored: str, run_time: str) -> None:
    assert NameIndex.of([stored], LLAMA).find(run_time, facts(LLAMA)) == stored


def test_a_renamed_tensor_is_known_by_both_names() -> None:
    disk = "language_model.model.norm.weight"
    run_time = "model.language_model.norm.weight"
    names = NameIndex.of([disk], LLAVA)
    assert names.at_run_time == {disk: run_time}
    assert names.on_disk == {run_time: disk}


def test_the_tensors_of_a_stack_are_listed_by_the_stack() -> None:
    experts = [f"model.layers.0.mlp.experts.{e}.down_proj.weight" for e in range(3)]
    names = NameIndex.of(experts, ModelConfig({"model_type": "qwen3_moe"}))
    (parts,) = names.by_run_time.values()
    assert [part.tensor for part in parts] == experts
    assert [part.number for part in parts] == [0, 1, 2]
    assert names.on_disk == {}, "none is loaded unchanged"


@pytest.mark.parametrize(
    ("config", "stored", "head"),
    [
        (TIED, "model.embed_tokens.weight", "lm_head.weight"),
        (LLAVA, "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
    ],
)
def test_a_head_that_is_not_stored_has_the_name_that_loaders_would_find(
    config: ModelConfig, stored: str, head: str
) -> None:
    (tie,) = NameIndex.of([stored], config).ties(facts(config))
    assert tie.stored == stored
    assert tie.others == (head,)


def test_a_model_of_unknown_class_or_an_untied_one_has_no_ties() -> None:
    names = NameIndex.of(["model.embed_tokens.weight"], LLAMA)
    assert names.ties(None) == ()
    assert names.ties(facts(LLAMA)) == ()
