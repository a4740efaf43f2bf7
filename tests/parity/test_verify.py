"""Outputs of adapters that PEFT trained, verified."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
from seeds import vary
from transformers import LlamaConfig, LlamaForCausalLM

import streamer


def test_adapters_that_peft_trained(tmp_path: Path) -> None:
    """RsLoRA, patterns of rank and alpha, DoRA, an embedding, on a Llama that transformers saved."""
    torch.manual_seed(vary(0))
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4
    )
    base = tmp_path / "base"
    LlamaForCausalLM(config).bfloat16().save_pretrained(base)
    patterns = {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {r".*layers.1.self_attn.q_proj": 3}}
    cases = {
        "rslora": {"use_rslora": True, "target_modules": ["q_proj", "down_proj"], **patterns},
        "dora": {"use_dora": True, "target_modules": ["q_proj", "v_proj"], **patterns},
        "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    }
    for name, options in cases.items():
        model = peft.get_peft_model(
            LlamaForCausalLM.from_pretrained(base), peft.LoraConfig(r=4, lora_alpha=8, **options)
        )
        for parameter in (p for p in model.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
        streamer.merge_with_reduced_intruder_dimensions(
            base, tmp_path / name, tmp_path / f"{name}-m", mitigation_lambda=0.25
        )
        found = streamer.verify_output(tmp_path / f"{name}-m", base, tmp_path / name, sample="all")
        assert found["totals"]["recomputed"] == found["totals"]["matrices"] - len(found["not_recomputed"]) >= 2, found
