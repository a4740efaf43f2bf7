"""Live PEFT models for tests, and what is compared of them with files and with PEFT."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import streamer


def loaded(made: Any) -> peft.PeftModel:
    """The base of a kind (`kinds_cases.Made`) in its own dtype, with its adapter as PEFT loads it by default."""
    config = peft.PeftConfig.from_pretrained(made.adapter)
    if made.kind.residual:  # the base is the residual already
        config.init_lora_weights = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(
            made.load(made.dtype), made.adapter, config=config
        ).eval()


def adapter_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's tensors as PEFT saves them, without the base's embeddings."""
    state: dict[str, Tensor] = peft.get_peft_model_state_dict(
        model, adapter_name=name, save_embedding_layers=False
    )
    return {key: tensor.detach().clone() for key, tensor in state.items()}


def assert_same_findings(a: streamer.Findings, b: streamer.Findings) -> None:
    """The same matrices by every name, in any order, with the same decisions and factors to the last bit."""
    by_tensor = b.by_tensor
    assert {m.tensor for m in a} == by_tensor.keys()
    for m in a:
        other = by_tensor[m.tensor]
        assert (m.module, m.shape, m.rank, m.scale, m.fingerprint) == (
            other.module,
            other.shape,
            other.rank,
            other.scale,
            other.fingerprint,
        )
        assert m.detection == other.detection, m.tensor


def assert_equal(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert mine.keys() <= theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def load_state(path: Path) -> dict[str, Tensor]:
    """An adapter's tensors on disk."""
    from safetensors.torch import load_file

    return load_file(path / "adapter_model.safetensors")


def of_peft(model: nn.Module) -> list[str]:
    """Modules of PEFT that are in a model."""
    return [
        name
        for name, module in model.named_modules()
        if type(module).__module__.startswith("peft.")
    ]
