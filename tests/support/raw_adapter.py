"""An adapter of one module, and one of tensors that are named as they are."""

import json
from pathlib import Path

import helpers
import torch
from safetensors.torch import save_file
from seeds import vary

from streamer.adapters.adapter import open_adapter
from streamer.adapters.modules import LoraModule

MODULE = "model.layers.0.self_attn.q_proj"


def factors(
    rank: int = 4, m: int = 6, n: int = 5, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(vary(seed))
    return torch.randn(rank, n, generator=g), torch.randn(m, rank, generator=g)


def one_module(home: Path, name: str = MODULE, rank: int = 4, **config: object) -> LoraModule:
    """The module of an adapter of one module, as it is read."""
    config = {"r": 4, "alpha": 8, **config}
    adapter = open_adapter(helpers.write_adapter(home, {name: factors(rank)}, **config))  # type: ignore[arg-type]
    return adapter.modules[name]


def write_raw(home: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    """A folder with these tensors, named as they are."""
    home.mkdir(exist_ok=True)
    save_file(tensors, home / "adapter_model.safetensors")
    (home / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config})
    )
    return home
