"""LoRA files of other libraries are refused by the name of their format."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streamer.adapters.pipeline_adapter import open_lora
from streamer.adapters.reader import open_adapter
from streamer.errors import UnsupportedError

OTHER = {
    "LoHa": ("lora_unet_down_blocks_0_attn.hada_w1_a", "last.safetensors", "of LyCORIS (LoHa, LoKr), which is not supported here"),
    "diffusers of old": ("unet.mid_block.attn.to_q_lora.down.weight", "pytorch_lora_weights.safetensors", "of old versions of diffusers"),
    "ComfyUI": ("diffusion_model.blocks.0.attn.to_q.lora_down.weight", "flux.safetensors", "of ComfyUI"),
    "MLX": ("model.layers.0.self_attn.q_proj.lora_a", "adapters.safetensors", "the format of MLX"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER)
def test_a_lora_of_another_library_is_refused_by_its_name(tmp_path: Path, case: str) -> None:
    tensor, file, words = OTHER[case]
    save_file({tensor: torch.zeros(4, 5)}, tmp_path / file)
    if case == "MLX":
        (tmp_path / "adapter_config.json").write_text('{"fine_tune_type": "lora", "num_layers": 2}')
    for path in (tmp_path, tmp_path / file):
        with pytest.raises(UnsupportedError, match="a LoRA in the format of") as e:
            open_adapter(path)
        assert words in str(e.value)
    (tmp_path / file).rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    with pytest.raises(UnsupportedError, match="a LoRA in the format of"):
        open_adapter(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            ["lora_unet_conv_in.alpha", "lora_unet_conv_in.lora_down.weight"],
            "kohya, which is read from one file; name it",
        ),
        (["unet.conv_in.lora_A.weight"], "diffusers, which is read from one file; name it"),
        (["lora_unet_conv_in.alpha", "lora_unet_conv_in.lokr_w1"], "LyCORIS (LoHa, LoKr), which is not supported here"),
    ],
)
def test_two_files_of_a_pipelines_adapters(tmp_path: Path, tensors: list[str], words: str) -> None:
    for name in ("a", "b"):
        save_file({tensor: torch.zeros(4, 5) for tensor in tensors}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UnsupportedError, match=re.escape(f"a.safetensors: refused: a LoRA in the format of {words}")):
        open_lora(tmp_path)
