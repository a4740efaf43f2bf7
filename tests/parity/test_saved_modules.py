"""Saved modules as PEFT's own files have them: with copies beside them that loading passes over."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import MODELS, assert_merged, weights
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from seeds import vary

import streamer
from streamer.errors import FormatError, MismatchError


def make(cls: Any, config: Any, home: Path, rows: int = 0, **lora: Any) -> Any:
    """A tiny model and an adapter on it with saved modules, all of them trained: PEFT's model."""
    torch.manual_seed(vary(0))
    cls(config).save_pretrained(home / "base")
    model = cls.from_pretrained(home / "base")
    if rows:
        model.resize_token_embeddings(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, **lora))
        for p in (p for p in model.parameters() if p.requires_grad):
            p.data.add_(0.1 * torch.randn(p.shape))
        model.save_pretrained(home / "adapter", save_embedding_layers=bool(rows))
    return model


def untied(name: str) -> Callable[[], tuple[Any, Any]]:
    cls, config, _ = MODELS[name]
    return lambda: (getattr(transformers, cls), config())


# Model, what PEFT's config says, rows of the grown embedding, and a copy that is in the file.
CASES: dict[str, tuple[Callable[[], tuple[Any, Any]], dict[str, Any], int, str]] = {
    "biases, a saved head": (untied("bert"), {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]}, 0,
                             "classifier.modules_to_save.bias"),
    "biases, saved layers": (untied("vit"), {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["layers.1.mlp"]}, 0,
                             "vit.layers.1.mlp.modules_to_save.default.fc1.bias"),
    "biases, a saved projector": (
        untied("llava"), {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["multi_modal_projector"]}, 0,
        "model.multi_modal_projector.modules_to_save.default.linear_1.bias",
    ),
    "a grown vocabulary": (untied("llama"), {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, 70,
                           "model.embed_tokens.modules_to_save.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_copies_beside_saved_modules_are_not_merged(case: str, tmp_path: Path) -> None:
    load, lora, rows, copy = CASES[case]
    model = make(*load(), tmp_path, rows, **lora)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    assert f"base_model.model.{copy}" in load_file(file)
    streamer.merge_with_reduced_intruder_dimensions(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "ours", mitigation_lambda=1.0
    )
    model.merge_and_unload().save_pretrained(tmp_path / "theirs")
    assert_merged(weights(tmp_path / "ours"), weights(tmp_path / "theirs"))
    tensors = load_file(file)
    tensors[f"base_model.model.{copy}"] += 1
    save_file(tensors, file)
    with pytest.raises(FormatError, match="both change"):
        streamer.detect_intruder_dimensions(tmp_path / "base", tmp_path / "adapter")


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]])
def test_embeddings_that_were_resized_but_not_saved(targets: list[str], tmp_path: Path) -> None:
    """As PEFT loads it on the base, directly and by way of a mitigated adapter; where PEFT cannot, both ways are refused."""
    cls, config = untied("llama")()
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = make(cls, config, tmp_path, 70, target_modules=targets)
    model.save_pretrained(adapter, save_embedding_layers=False)
    mitigate = partial(streamer.reduce_intruder_dimension, method="shrink", mitigation_lambda=1.0)
    merge = partial(streamer.merge_with_reduced_intruder_dimensions, method="shrink", mitigation_lambda=1.0)
    if "embed_tokens" in targets:
        with pytest.raises(RuntimeError, match=r"size mismatch for .*embed_tokens"):
            PeftModel.from_pretrained(cls.from_pretrained(base), adapter)
        for run in (mitigate, merge):
            with pytest.raises(
                MismatchError, match=r"'model.embed_tokens': expected shape \[70, 32\] in the base, found \[64, 32\]"
            ):
                run(base, adapter, tmp_path / "out")
        return
    mitigate(base, adapter, tmp_path / "mitigated")
    merge(base, adapter, tmp_path / "out")
    merge(base, tmp_path / "mitigated", tmp_path / "by way")
    PeftModel.from_pretrained(cls.from_pretrained(base), adapter).merge_and_unload().save_pretrained(
        tmp_path / "theirs"
    )
    for name in ("out", "by way"):
        assert_merged(weights(tmp_path / name), weights(tmp_path / "theirs"))


@pytest.mark.parametrize("same", [True, False])
def test_copies_that_peft_017_wrote_without_the_adapters_name(same: bool, tmp_path: Path) -> None:
    """``classifier.modules_to_save.dense.bias``, in which ``dense`` is no adapter: a copy of ``classifier.dense.bias``."""
    config = transformers.RobertaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    lora = {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]}
    model = make(transformers.RobertaForSequenceClassification, config, tmp_path, **lora)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name: t for name, t in load_file(file).items() if ".modules_to_save." not in name}
    bias = tensors["base_model.model.classifier.dense.bias"]
    tensors["base_model.model.classifier.modules_to_save.dense.bias"] = bias.clone() if same else bias + 1
    save_file(tensors, file, metadata={"format": "pt"})
    merge = partial(
        streamer.merge_with_reduced_intruder_dimensions, tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    )
    if not same:
        with pytest.raises(FormatError, match=r"both change 'classifier.dense.bias'; save one adapter at a time"):
            merge(mitigation_lambda=1)
        return
    merge(mitigation_lambda=1)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["classifier.dense.bias"], bias)
    assert torch.equal(model.base_model.model.classifier.modules_to_save["default"].dense.bias, bias)
    half = tmp_path / "half"
    streamer.reduce_intruder_dimension(
        tmp_path / "base", tmp_path / "adapter", half, method="shrink", mitigation_lambda=0.5
    )
    assert load_file(half / file.name).keys() == load_file(file).keys()
    assert streamer.verify_output(half, tmp_path / "base", tmp_path / "adapter", sample="all")["verified"]
