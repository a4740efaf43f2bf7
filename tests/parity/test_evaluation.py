"""Losses of all variants in one streaming pass: those of transformers with each merged model, over architectures and kinds of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import quantized
from architectures import ATTENTION, LINEAR
from causal_models import CAUSAL, make_adapter, make_base
from evaluated import assert_as_transformers
from quantized_cases import decoded_base
from transformers import LlamaForCausalLM

from streamer.errors import NumericError, UnsupportedError

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize("name", CAUSAL)
def test_architectures(name: str, tmp_path: Path) -> None:
    cls = make_base(name, tmp_path / "base")
    adapter = make_adapter(cls, tmp_path / "base", tmp_path / "adapter", CAUSAL[name][2])
    assert_as_transformers(cls, tmp_path / "base", adapter, tmp_path)


# Kind → (a model, its target modules, further options of the adapter)
KINDS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "DoRA": ("llama", [*LINEAR, "lm_head", "embed_tokens"], {"use_dora": True}),
    "DoRA on Conv1D": ("gpt2", ["c_attn", "c_proj"], {"use_dora": True}),
    "DoRA on Falcon": ("falcon", ["query_key_value"], {"use_dora": True}),
    "saved head and norms": ("llama", LINEAR, {"modules_to_save": ["lm_head", "norm"]}),
    "saved embedding, tied": ("llama-tied", LINEAR, {"modules_to_save": ["embed_tokens"]}),
    "LoRA on a tied head": ("llama-tied", [*LINEAR, "lm_head"], {}),
    "LoRA on a tied embedding": ("llama-tied", [*LINEAR, "embed_tokens"], {}),
    "LoRA on both as one": ("llama-tied", ["q_proj", "embed_tokens"], {"ensure_weight_tying": True, "lora_alpha": 2}),
    "trained tokens": ("llama", LINEAR, {"trainable_token_indices": [5, 7, 9]}),
    "trained tokens, tied": ("llama-tied", LINEAR, {"trainable_token_indices": [5, 7, 9]}),
    "biases": ("qwen2", ATTENTION, {"bias": "all"}),
    "LoRA's own biases": ("phi", ["q_proj", "fc1"], {"lora_bias": True}),
    "experts, one tensor each": ("mixtral", ["q_proj"], {"target_parameters": EXPERTS}),
    "experts, stacked": ("gpt-oss", ["q_proj"], {"target_parameters": EXPERTS}),
    "router": ("qwen3-moe", ["q_proj"], {"target_parameters": ["gate.weight"]}),
    "saved router": ("mixtral", ["q_proj"], {"modules_to_save": ["gate"]}),
    "embeddings of positions": ("gpt2", ["wte", "wpe", "c_fc"], {}),
    "saved positions": ("gpt2", ["c_fc"], {"modules_to_save": ["wpe", "ln_1"]}),
    "saved positions, counted by the module": ("opt", ["q_proj"], {"modules_to_save": ["embed_positions"]}),
    "saved embedding, scaled": ("gemma2", LINEAR, {"modules_to_save": ["embed_tokens", "input_layernorm"]}),
    "saved norms of heads": ("qwen3", ["q_proj"], {"modules_to_save": ["q_norm", "k_norm"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str, tmp_path: Path) -> None:
    name, targets, options = KINDS[kind]
    cls = make_base(name, tmp_path / "base")
    adapter = make_adapter(cls, tmp_path / "base", tmp_path / "adapter", targets, **options)
    assert_as_transformers(cls, tmp_path / "base", adapter, tmp_path)


def test_all_methods_and_lambdas(tmp_path: Path) -> None:
    cls = make_base("llama", tmp_path / "base")
    adapter = make_adapter(cls, tmp_path / "base", tmp_path / "adapter", [*LINEAR, "lm_head"])
    assert_as_transformers(
        cls, tmp_path / "base", adapter, tmp_path, methods=("paper", "project", "shrink"), lambdas=(0.75, -0.5, 2.0)
    )


@pytest.mark.parametrize("form", quantized.MAKERS)
def test_quantized_bases(form: str, plain: tuple[Path, Path], tmp_path: Path) -> None:
    """Those of the decoded base."""
    made = quantized.MAKERS[form](tmp_path / "base", plain[0])
    decoded = decoded_base(tmp_path / "decoded", plain[0], made)
    assert_as_transformers(LlamaForCausalLM, made.base, plain[1], tmp_path, decoded=decoded)


REFUSED: dict[str, tuple[str, Any, dict[str, Any], type[Exception], str]] = {
    "experts that all tokens run through": ("llama4-text", ["q_proj"], {"target_parameters": EXPERTS}, UnsupportedError,
                                            "feed_forward.experts' runs on"),
    "a weight read by another module": ("mamba", ["in_proj"], {"modules_to_save": ["conv1d"]}, UnsupportedError,
                                        "read outside of its module"),
    "a vision tower, which no text reaches": ("llava", LINEAR, {}, NumericError, "were not used in a pass over the text"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused_rather_than_wrong(what: str, tmp_path: Path) -> None:
    name, targets, options, error, message = REFUSED[what]
    cls = make_base(name, tmp_path / "base")
    adapter = make_adapter(cls, tmp_path / "base", tmp_path / "adapter", targets, **options)
    with pytest.raises(error, match=message):
        assert_as_transformers(cls, tmp_path / "base", adapter, tmp_path)
