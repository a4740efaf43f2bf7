"""Fitted adapters, loaded by PEFT: of the adapter's own rank and config, and with the logits of the merged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fitted
import peft
import pytest
import torch
from safetensors.torch import load_file
from seeds import vary
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import streamer

CASES: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "down_proj"], "alpha_pattern": {r".*layers.1.self_attn.q_proj": 3},
             "rank_pattern": {"layers.1.self_attn.q_proj": 2}},
    "rslora": {"use_rslora": True, "target_modules": "all-linear"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(vary(0))
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4
    )
    path = tmp_path_factory.mktemp("fitted") / "base"
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def trained(base: Path, path: Path, options: dict[str, Any]) -> Path:
    torch.manual_seed(vary(1))
    model = peft.get_peft_model(
        LlamaForCausalLM.from_pretrained(base), peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path, save_embedding_layers=False)
    return path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.double().eval()(torch.arange(40)[None]).logits[0]


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_a_fitted_adapter_and_its_logits_are_the_merged_models(
    base: Path, tmp_path: Path, case: str
) -> None:
    adapter = trained(base, tmp_path / "adapter", CASES[case])
    coefficients = fitted.random_coefficients(base, adapter)
    coefficients.save(tmp_path / "c.safetensors")
    streamer.reduce_intruder_dimension(base, adapter, tmp_path / "a", coefficients=coefficients)
    streamer.merge_with_reduced_intruder_dimensions(base, adapter, tmp_path / "m", coefficients=coefficients)
    loaded = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "a")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m"))
    # float32 weights: W0 + Δ' was rounded once, B' and A as well.
    torch.testing.assert_close(logits(loaded), merged, rtol=0, atol=2e-6 * float(merged.abs().max()))
    assert float((merged - logits(LlamaForCausalLM.from_pretrained(base))).abs().max()) > 1e-2
    for output in ("a", "m"):
        verified = streamer.verify_output(
            tmp_path / output, base, adapter, sample="all", coefficients=tmp_path / "c.safetensors"
        )["totals"]
        assert verified["recomputed"] == verified["matrices"]
    config = "adapter_config.json"
    assert json.loads((tmp_path / "a" / config).read_text()) == json.loads((adapter / config).read_text())
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "a"))
    assert {name: t.shape for name, t in after.items()} == {name: t.shape for name, t in before.items()}
