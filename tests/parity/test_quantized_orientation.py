"""Square layers of 4-bit bases under an adapter whose fan_in_fan_out is set: quantizers store every layer as (out, in)."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from bitsandbytes import functional as bnb
from peft import LoraConfig, get_peft_model
from quantized import floats_config, small_floats
from safetensors.torch import load_file, save_file
from seeds import vary

import streamer

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # which PEFT corrects itself

SIZE = 64


def nf4(W: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    codes, state = bnb.quantize_4bit(W.contiguous(), quant_type="nf4")
    parts = {f".weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {".weight": codes, **parts}, bnb.dequantize_4bit(codes, state)


ENCODINGS = {
    "nf4": (nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "nvfp4": (partial(small_floats, encoding="nvfp4-pack-quantized"), floats_config("nvfp4-pack-quantized")),
}


def quantized_base(
    home: Path, cls: str, config: transformers.PreTrainedConfig, layer: str, encoding: str
) -> dict[str, torch.Tensor]:
    """Save a model whose square layers of this name are quantized, and an adapter on them; return the decoded layers as (out, in)."""
    torch.manual_seed(vary(0))
    model = getattr(transformers, cls)(config)
    model.save_pretrained(home / "base")
    peft = get_peft_model(model, LoraConfig(r=2, lora_alpha=32, target_modules=[layer], init_lora_weights=False))
    peft.save_pretrained(home / "adapter", save_embedding_layers=False)
    path = home / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": True}))
    tensors = load_file(home / "base" / "model.safetensors")
    decoded = {}
    for name in [name for name in tensors if name.endswith(f"{layer}.weight")]:
        W = tensors.pop(name)
        W = W.T if cls.startswith("GPT2") else W
        parts, decoded[name] = ENCODINGS[encoding][0](W)
        tensors |= {name.removesuffix(".weight") + key: part for key, part in parts.items()}
    save_file(tensors, home / "base" / "model.safetensors", metadata={"format": "pt"})
    path = home / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": ENCODINGS[encoding][1]}))
    return decoded


def gpt2() -> transformers.PreTrainedConfig:
    return transformers.GPT2Config(n_embd=SIZE, n_layer=2, n_head=4, vocab_size=96, n_positions=32)


def llama() -> transformers.PreTrainedConfig:
    return transformers.LlamaConfig(
        hidden_size=SIZE, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=96
    )


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    ("cls", "config", "layer", "encoding"),
    [
        ("LlamaForCausalLM", llama, "o_proj", "nf4"),
        ("LlamaForCausalLM", llama, "o_proj", "nvfp4"),
        ("GPT2LMHeadModel", gpt2, "attn.c_proj", "nf4"),
    ],
)
def test_four_bits_are_out_by_in_whatever_the_flag_says(
    cls, config, layer: str, encoding: str, named: bool, tmp_path: Path
) -> None:
    decoded = quantized_base(tmp_path, cls, config(), layer, encoding)
    if not named:
        stated = json.loads((tmp_path / "base" / "config.json").read_text())
        (tmp_path / "base" / "config.json").write_text(
            json.dumps({"quantization_config": stated["quantization_config"]})
        )
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    findings = streamer.detect_intruder_dimensions(tmp_path / "base", tmp_path / "adapter")
    assert len(findings) == len(decoded) == 2
    for m in findings:
        A, B = (factors[f"base_model.model.{m.module}.lora_{f}.weight"].double() for f in "AB")
        W0 = decoded[m.tensor].double()
        U0 = torch.linalg.svd(W0).U
        U, S, _ = torch.linalg.svd(W0 + 16 * B @ A)
        torch.testing.assert_close(torch.tensor(m.detection.singular_values).double(), S[:10], rtol=1e-4, atol=1e-5)
        similarity = (U0.T @ U[:, :10]).abs().amax(0)
        clear = [j for j in range(10) if abs(float(similarity[j]) - 0.5) > 1e-3]
        assert [j for j in m.detection.intruders if j in clear] == [j for j in clear if similarity[j] < 0.5]
        assert m.detection.intruders
