"""LoRA on experts' parameters, as PEFT makes it and transformers saves the models: merged as PEFT merges, detected expert by expert."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from test_architectures import MODELS, MOE, text, weights

import streamer

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def make(
    name: str, home: Path, targets: list[str], dtype: torch.dtype = torch.float32, **values: Any
) -> tuple[Path, Path, Any]:
    """A tiny model and an adapter on its experts, saved: their directories, and PEFT's model."""
    cls, config, _ = MODELS[name]
    torch.manual_seed(0)
    config = config() if not values else text(type(config()).__name__.removesuffix("Config"), **{**MOE, **values})()
    model = getattr(transformers, cls)(config).to(dtype)
    model.save_pretrained(home / "base")
    return home / "base", home / "adapter", adapt(type(model), home, targets)


def adapt(cls: Any, home: Path, targets: list[str], **options: Any) -> Any:
    torch.manual_seed(1)
    model = cls.from_pretrained(home / "base")
    lora = LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=targets, init_lora_weights=False, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, lora)
        for key, p in model.named_parameters():
            if ".experts." in key and "lora_" in key:
                p.data.normal_(std=0.3)
        model.save_pretrained(home / "adapter")
    return model


def assert_merged(home: Path, model: Any, rtol: float = 1e-5) -> None:
    """`merge` at λ = 1 writes what PEFT's merged model saves."""
    streamer.merge_with_reduced_intruder_dimensions(
        home / "base", home / "adapter", home / "ours", mitigation_lambda=1.0
    )
    model.merge_and_unload().save_pretrained(home / "theirs")
    ours, theirs, base = weights(home / "ours"), weights(home / "theirs"), weights(home / "base")
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=rtol, atol=rtol, msg=key)
    same = {key for key, tensor in ours.items() if torch.equal(tensor, base[key])}
    assert same == {key for key in theirs if torch.equal(theirs[key], base[key])}


@pytest.mark.parametrize(
    "targets",
    [EXPERTS, EXPERTS[:1], EXPERTS[1:], [*reversed(EXPERTS), "mlp.gate.weight"]],
    ids=["both", "gate_up", "down", "router"],
)
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_merged_as_peft_merges(name: str, targets: list[str], tmp_path: Path) -> None:
    *_, model = make(name, tmp_path, targets)
    assert_merged(tmp_path, model)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_bf16(name: str, tmp_path: Path) -> None:
    *_, model = make(name, tmp_path, EXPERTS, torch.bfloat16)
    assert_merged(tmp_path, model, rtol=2 * torch.finfo(torch.bfloat16).eps)
