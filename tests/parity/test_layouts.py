"""Layouts that other trainers write: each is right, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from causal_models import EXPERTS, NEXT, TEXT, make_adapter, make_base
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

import streamer
from streamer.errors import StreamerError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

SPLIT = ["in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b"]
FUSED = ["in_proj_qkvz", "in_proj_ba"]


def split_base(path: Path) -> Path:
    linear = {
        key: value for key, value in NEXT.items() if key.startswith(("linear_", "layer_types"))
    }
    Qwen3_5ForCausalLM(Qwen3_5TextConfig(**TEXT, **linear)).save_pretrained(path)
    return path


def merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    return dict(streamer.iter_merged(base, adapter, mitigation_lambda=1.0))


def test_projections_of_linear_attention_fit_their_own_layout_alone(tmp_path: Path) -> None:
    """Qwen3-Next stores two fused projections, Qwen3.5 four."""
    split = split_base(tmp_path / "split")
    model = get_peft_model(
        Qwen3_5ForCausalLM.from_pretrained(split),
        LoraConfig(target_modules=SPLIT, init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "on-split")
    cls = make_base("qwen3-next", tmp_path / "fused")
    make_adapter(cls, tmp_path / "fused", tmp_path / "on-fused", FUSED)
    wanted = model.merge_and_unload().state_dict()
    for name, tensor in merged(split, tmp_path / "on-split").items():
        torch.testing.assert_close(tensor, wanted[name], msg=name)
    assert merged(tmp_path / "fused", tmp_path / "on-fused")
    for base, adapter, module in (
        ("fused", "on-split", "in_proj_a"),
        ("split", "on-fused", "in_proj_ba"),
    ):
        with pytest.raises(
            StreamerError, match=rf"linear_attn\.{module}' has no tensor in the base"
        ):
            merged(tmp_path / base, tmp_path / adapter)


@pytest.mark.parametrize(
    "layout", ["one lora_A for all experts", "stacks of factors", "a lora_A of one expert"]
)
def test_experts_that_share_a_factor_are_refused(tmp_path: Path, layout: str) -> None:
    cls = make_base("mixtral", tmp_path / "base")
    adapter = make_adapter(
        cls, tmp_path / "base", tmp_path / "adapter", ["q_proj"], r=2, target_parameters=EXPERTS
    )
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    shared = [name for name in tensors if ".experts." in name and ".lora_A." in name]
    assert shared
    for name in shared:
        A = tensors[name]
        B = tensors[name.replace("lora_A", "lora_B")]
        if layout == "stacks of factors":
            tensors[name] = A[:2].unsqueeze(0).contiguous()
            tensors[name.replace("lora_A", "lora_B")] = (
                B.reshape(len(B), 2, -1).permute(2, 0, 1).contiguous()
            )
        else:
            tensors[name] = A[:2].clone()
        if layout == "a lora_A of one expert":
            tensors[name.replace("lora_A", "lora_B")] = B[:, :2].clone()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(StreamerError, match="experts"):
        merged(tmp_path / "base", adapter)
