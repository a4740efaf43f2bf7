"""Tiny models with experts, and adapters of PEFT on the experts' parameters."""

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import MODELS, weights
from peft import LoraConfig, get_peft_model
from seeds import vary

import streamer

EXPERT = "model.layers.1.mlp.experts"


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def make(name: str, home: Path, targets: list[str], dtype: torch.dtype = torch.float32) -> tuple[Path, Path, Any]:
    """A tiny model and an adapter on its experts, saved: their directories, and PEFT's model."""
    cls, config, _ = MODELS[name]
    torch.manual_seed(vary(0))
    model = getattr(transformers, cls)(config()).to(dtype)
    model.save_pretrained(home / "base")
    return home / "base", home / "adapter", adapt(type(model), home, targets)


def adapt(cls: Any, home: Path, targets: list[str], **options: Any) -> Any:
    torch.manual_seed(vary(1))
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
        if tensor.shape != theirs[key].shape:  # transformers does not always turn a stack back when it saves
            theirs[key] = theirs[key].transpose(1, 2)
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=rtol, atol=rtol, msg=key)
    same = {key for key, tensor in ours.items() if torch.equal(tensor, base[key])}
    assert same == {key for key in theirs if torch.equal(theirs[key], base[key])}
