"""Layers in memory that are more than a weight of their own: quantized by bitsandbytes, or shared by two places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from kinds import llama_config
from kinds_cases import quiet
from live import assert_same_findings
from seeds import vary
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import streamer
import streamer.peft as live
from streamer.errors import UnsupportedError


@pytest.mark.parametrize("coding", ["nf4", "int8"])
def test_layers_of_bitsandbytes(coding: str, tmp_path: Path) -> None:
    """They are decoded as their files are; merged values do not fit their codes."""
    options: dict[str, Any] = (
        {"load_in_8bit": True}
        if coding == "int8"
        else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    )
    torch.manual_seed(vary(0))
    LlamaForCausalLM(llama_config()).save_pretrained(tmp_path / "plain")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=BitsAndBytesConfig(**options))
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(vary(1))
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "adapter")
    with quiet():  # it was trained on these codes, and names the model that they were made of
        on_files = streamer.detect_intruder_dimensions(tmp_path / "base", tmp_path / "adapter")
        assert_same_findings(live.detect_intruder_dimensions(model), on_files)
        live.reduce_intruder_dimension(model, findings=on_files)
    with pytest.raises(UnsupportedError, match="4 of the weights to merge into are quantized"):
        live.merge_and_unload_with_reduced_intruder_dimensions(model)


def test_layers_that_bitsandbytes_packed_anew_when_they_ran(tmp_path: Path) -> None:
    """It does so on some processors."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=four, dtype=torch.bfloat16)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    with quiet():
        before = live.detect_intruder_dimensions(model)
        with torch.no_grad():
            model(torch.ones(1, 4, dtype=torch.long))
        states = (getattr(p, "quant_state", None) for p in model.parameters())
        if any(getattr(state, "packing_format_for_cpu", False) for state in states):
            with pytest.raises(
                UnsupportedError, match="load the model again, and call streamer before you run the model"
            ):
                live.detect_intruder_dimensions(model)
        else:
            assert_same_findings(live.detect_intruder_dimensions(model), before)


@pytest.mark.parametrize("part", ["module", "weight", "memory", "head"])
def test_a_parameter_of_two_places_of_which_the_adapter_changes_one_is_not_merged(part: str) -> None:
    """PEFT's own merge changes both places."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4
    )
    base = LlamaForCausalLM(config)
    first, second = (layer.self_attn for layer in base.model.layers)
    if part == "module":
        second.q_proj = first.q_proj
    elif part == "head":  # the config says that they are separate
        base.lm_head.weight = base.model.embed_tokens.weight
    else:
        second.q_proj.weight = first.q_proj.weight if part == "weight" else nn.Parameter(first.q_proj.weight.data)
    target = "embed_tokens" if part == "head" else "layers.0.self_attn.q_proj"
    lora = peft.LoraConfig(target_modules=[target], init_lora_weights=False)
    model = peft.get_peft_model(base, lora)
    with pytest.raises(
        UnsupportedError, match=r"'.*' and '.*' are one parameter, but the adapter changes only the former"
    ):
        live.merge_and_unload_with_reduced_intruder_dimensions(model, mitigation_lambda=1.0)
