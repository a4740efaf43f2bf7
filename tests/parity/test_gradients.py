"""Gradients of streaming passes: those of transformers and PEFT with the whole matrices, over architectures and kinds of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import quantized
import torch
from architectures import ATTENTION, LINEAR
from causal_models import CAUSAL, make_adapter, make_base
from evaluated import token_ids
from fitted_models import assert_gradients
from peft import LoHaConfig, LoKrConfig, get_peft_model
from quantized_cases import decoded_base
from transformers import LlamaForCausalLM

from streamer.streaming import products, values

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]

ARCHITECTURES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3-text", "gemma3-vision", "phi3", "gpt2", "gpt-neox", "gpt-j",
    "falcon", "bloom", "opt", "mpt", "cohere", "granite", "olmo2", "mixtral", "qwen3-moe", "gpt-oss", "olmoe", "deepseek-v3",
    "llama4-text", "qwen3-next", "jamba", "qwen2.5-vl",
]  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str, tmp_path: Path) -> None:
    cls = make_base(name, tmp_path / "base")
    adapter = make_adapter(cls, tmp_path / "base", tmp_path / "adapter", CAUSAL[name][2], lora_alpha=4)
    assert_gradients(cls, tmp_path / "base", adapter, token_ids(64))


# Kind → (a model, its target modules, further options of the adapter)
KINDS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "rsLoRA and patterns": ("llama", LINEAR, {"use_rslora": True, "rank_pattern": {"q_proj": 3, "down_proj": 1}}),
    "DoRA": ("llama", [*LINEAR, "lm_head", "embed_tokens"], {"use_dora": True}),
    "DoRA on Conv1D": ("gpt2", ["c_attn", "c_proj"], {"use_dora": True}),
    "DoRA on Falcon": ("falcon", ["query_key_value"], {"use_dora": True}),
    "saved head and norms": ("llama", LINEAR, {"modules_to_save": ["lm_head", "norm"]}),
    "saved embedding, tied": ("llama-tied", LINEAR, {"modules_to_save": ["embed_tokens"]}),
    "LoRA on a tied head": ("llama-tied", [*LINEAR, "lm_head"], {}),
    "LoRA on a tied embedding": ("llama-tied", [*LINEAR, "embed_tokens"], {}),
    "LoRA on both as one": ("llama-tied", ["q_proj", "embed_tokens"], {"ensure_weight_tying": True, "lora_alpha": 2}),
    "LoRA on the head alone": ("llama", ["lm_head"], {}),
    "biases": ("qwen2", ATTENTION, {"bias": "all"}),
    "LoRA's own biases": ("phi", ["q_proj", "fc1"], {"lora_bias": True}),
    "experts, one tensor each": ("mixtral", ["q_proj"], {"target_parameters": EXPERTS}),
    "experts, stacked": ("gpt-oss", ["q_proj"], {"target_parameters": EXPERTS}),
    "experts that all tokens run through": ("llama4-text", ["q_proj"], {"target_parameters": EXPERTS}),
    "router": ("qwen3-moe", ["q_proj"], {"target_parameters": ["gate.weight"]}),
    "embeddings of positions": ("gpt2", ["wte", "wpe", "c_fc"], {}),
    "saved positions": ("opt", ["q_proj"], {"modules_to_save": ["embed_positions"]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str, tmp_path: Path) -> None:
    name, targets, options = KINDS[kind]
    cls = make_base(name, tmp_path / "base")
    adapter = make_adapter(cls, tmp_path / "base", tmp_path / "adapter", targets, **{"lora_alpha": 4, **options})
    assert_gradients(cls, tmp_path / "base", adapter, token_ids(64))


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])
def test_a_method_with_a_dense_delta(config: Any, tmp_path: Path) -> None:
    cls = make_base("llama", tmp_path / "base")
    torch.manual_seed(1)
    model = get_peft_model(cls.from_pretrained(tmp_path / "base"), config(r=2, target_modules=["q_proj", "up_proj"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    assert_gradients(cls, tmp_path / "base", tmp_path / "adapter", token_ids(64))


@pytest.mark.parametrize("form", ["fp8-blocks", "nf4", "gptq"])
def test_quantized_bases(form: str, plain: tuple[Path, Path], tmp_path: Path) -> None:
    """Those of the decoded base."""
    made = quantized.MAKERS[form](tmp_path / "base", plain[0])
    decoded = decoded_base(tmp_path / "decoded", plain[0], made)
    assert_gradients(LlamaForCausalLM, made.base, plain[1], token_ids(64), decoded=decoded)


def test_matrices_are_read_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "BLOCK_BYTES", 1000)
    cls = make_base("mixtral", tmp_path / "base")
    options: dict[str, Any] = {"target_parameters": EXPERTS, "lora_alpha": 4}
    adapter = make_adapter(cls, tmp_path / "base", tmp_path / "adapter", [*ATTENTION, "lm_head"], **options)
    most = 0
    multiply = products.StreamedMatrix.multiply

    def measured(self: products.StreamedMatrix, X: torch.Tensor, transposed: bool) -> torch.Tensor:
        nonlocal most
        for _, _, rows in self.blocks():
            most = max(most, rows.nbytes)
        return multiply(self, X, transposed)

    monkeypatch.setattr(products.StreamedMatrix, "multiply", measured)
    assert_gradients(cls, tmp_path / "base", adapter, token_ids(64))
    assert 0 < most <= 1000
