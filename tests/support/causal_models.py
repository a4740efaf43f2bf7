"""Tiny causal language models of many architectures, with values large enough that variants differ, and adapters on them."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import ATTENTION, GPT2, LINEAR, MODELS, MOE, TEXT, config, text
from peft import LoraConfig, get_peft_model
from seeds import vary

OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "word_embed_proj_dim": 32,
       "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
BLOOM = {
    "hidden_size": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPTJ = {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64, "rotary_dim": 4, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MLA = {**TEXT, "kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4,
       "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
       "n_shared_experts": 1, "num_key_value_heads": 4, "head_dim": 4}  # fmt: skip
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "alibi": True,
          "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
NEXT = {
    **MOE,
    "shared_expert_intermediate_size": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}

SHARING = {**TEXT, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8,
           "tie_word_embeddings": True, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}  # fmt: skip
"""The last two layers attend with the keys and values of the first two."""
GEMMA3N = {
    **SHARING,
    "intermediate_size": [48] * 4,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.0] * 4,
}

LANGUAGE = r".*language_model.*(q|k|v|o|up|down)_proj"

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
"""Stacks of experts' matrices, by the ends of their names."""

HASHED = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16, "q_lora_rank": 8,
    "o_lora_rank": 8, "o_groups": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "max_position_embeddings": 64, "mlp_layer_types": ["hash_moe", "moe", "hash_moe"],
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
}  # fmt: skip
"""DeepSeek-V4: each token's experts are looked up in a buffer of integers in some layers."""

# Kind → (a model, its target modules, further options of the adapter)
ADAPTERS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "DoRA": ("llama", [*LINEAR, "lm_head", "embed_tokens"], {"use_dora": True}),
    "DoRA on Conv1D": ("gpt2", ["c_attn", "c_proj"], {"use_dora": True}),
    "DoRA on Falcon": ("falcon", ["query_key_value"], {"use_dora": True}),
    "saved head and norms": ("llama", LINEAR, {"modules_to_save": ["lm_head", "norm"]}),
    "saved embedding, tied": ("llama-tied", LINEAR, {"modules_to_save": ["embed_tokens"]}),
    "LoRA on a tied head": ("llama-tied", [*LINEAR, "lm_head"], {}),
    "LoRA on a tied embedding": ("llama-tied", [*LINEAR, "embed_tokens"], {}),
    "LoRA on both as one": ("llama-tied", ["q_proj", "embed_tokens"], {"ensure_weight_tying": True, "lora_alpha": 2}),
    "biases": ("qwen2", ATTENTION, {"bias": "all"}),
    "LoRA's own biases": ("phi", ["q_proj", "fc1"], {"lora_bias": True}),
    "experts, one tensor each": ("mixtral", ["q_proj"], {"target_parameters": EXPERTS}),
    "experts, stacked": ("gpt-oss", ["q_proj"], {"target_parameters": EXPERTS}),
    "router": ("qwen3-moe", ["q_proj"], {"target_parameters": ["gate.weight"]}),
    "embeddings of positions": ("gpt2", ["wte", "wpe", "c_fc"], {}),
}  # fmt: skip


def values(kind: str, fields: dict[str, Any]) -> Callable[[], Any]:
    return lambda: config(kind, **fields)


# Name → (the model's class, its config, the adapter's target modules)
CAUSAL: dict[str, tuple[str, Callable[[], Any], list[str] | str]] = {
    **{name: model for name, model in MODELS.items() if model[0].endswith(("ForCausalLM", "LMHeadModel"))},
    "llama-tied": ("LlamaForCausalLM", lambda: config("Llama", **{**TEXT, "tie_word_embeddings": True}), LINEAR),
    "gemma": ("GemmaForCausalLM", lambda: config("Gemma", **{**TEXT, "tie_word_embeddings": True}), [*LINEAR, "embed_tokens"]),
    "gemma3n": ("Gemma3nForCausalLM", values("Gemma3nText", GEMMA3N), LINEAR),
    "gemma4": ("Gemma4ForCausalLM", values("Gemma4Text", {**SHARING, "global_head_dim": 8}), LINEAR),
    "phi": ("PhiForCausalLM", text("Phi"), ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2", "lm_head"]),
    "falcon": ("FalconForCausalLM", values("Falcon", FALCON), ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
    "falcon-new": ("FalconForCausalLM", values("Falcon", {**FALCON, "alibi": False, "new_decoder_architecture": True}),
                   ["query_key_value", "dense"]),
    "bloom": ("BloomForCausalLM", values("Bloom", BLOOM), ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
    "opt": ("OPTForCausalLM", values("OPT", OPT), ["q_proj", "v_proj", "out_proj", "fc1", "fc2", "embed_tokens"]),
    "gpt-j": ("GPTJForCausalLM", values("GPTJ", GPTJ), ["q_proj", "v_proj", "out_proj", "fc_in", "fc_out", "lm_head"]),
    "gpt-neo": ("GPTNeoForCausalLM", lambda: config("GPTNeo", hidden_size=32, num_layers=2, num_heads=4, vocab_size=64,
                                                    max_position_embeddings=64, attention_types=[[["global", "local"], 1]],
                                                    bos_token_id=1, eos_token_id=2), ["q_proj", "v_proj", "c_fc", "c_proj"]),
    "starcoder": ("GPTBigCodeForCausalLM", values("GPTBigCode", GPT2), ["c_attn", "c_proj", "c_fc"]),
    "starcoder2": ("Starcoder2ForCausalLM", text("Starcoder2"), ["q_proj", "o_proj", "c_fc", "c_proj"]),
    "mpt": ("MptForCausalLM", lambda: config("Mpt", d_model=32, n_heads=4, n_layers=2, vocab_size=64, max_seq_len=64),
            ["Wqkv", "out_proj"]),
    "stablelm": ("StableLmForCausalLM", text("StableLm"), LINEAR),
    "cohere": ("CohereForCausalLM", text("Cohere"), LINEAR),
    "granite": ("GraniteForCausalLM", text("Granite", logits_scaling=2.0, embedding_multiplier=3.0), [*LINEAR, "embed_tokens"]),
    "olmo2": ("Olmo2ForCausalLM", text("Olmo2"), LINEAR),
    "glm": ("GlmForCausalLM", text("Glm"), ["q_proj", "v_proj", "gate_up_proj", "down_proj"]),
    "nemotron": ("NemotronForCausalLM", text("Nemotron"), ["q_proj", "up_proj", "down_proj"]),
    "smollm3": ("SmolLM3ForCausalLM", text("SmolLM3"), LINEAR),
    "qwen2-moe": ("Qwen2MoeForCausalLM", text("Qwen2Moe", **MOE, shared_expert_intermediate_size=24), [*ATTENTION, "up_proj"]),
    "qwen3-next": ("Qwen3NextForCausalLM", text("Qwen3Next", **NEXT), ["q_proj", "in_proj_qkvz", "out_proj", "o_proj"]),
    "olmoe": ("OlmoeForCausalLM", text("Olmoe", **MOE), ATTENTION),
    "phimoe": ("PhimoeForCausalLM", text("Phimoe", **MOE), ATTENTION),
    "granite-moe": ("GraniteMoeForCausalLM", text("GraniteMoe", **MOE), ATTENTION),
    "deepseek-v2": ("DeepseekV2ForCausalLM", values("DeepseekV2", MLA), ["q_b_proj", "kv_b_proj", "o_proj", "down_proj"]),
    "deepseek-v3": ("DeepseekV3ForCausalLM", values("DeepseekV3", MLA), ["q_b_proj", "kv_b_proj", "o_proj", "kv_a_proj_with_mqa"]),
    "deepseek-v4": ("DeepseekV4ForCausalLM", lambda: config("DeepseekV4", **HASHED), ["q_a_proj", "q_b_proj", "o_b_proj"]),
    "llama4-text": ("Llama4ForCausalLM", text("Llama4Text", **MOE, intermediate_size_mlp=48), ATTENTION),
    "gemma3-vision": (*MODELS["gemma3"][:2], LANGUAGE),
    "llava": (*MODELS["llava"][:2], LANGUAGE),
    "qwen2.5-vl": (*MODELS["qwen2.5-vl"][:2], LANGUAGE),
    "apertus": ("ApertusForCausalLM", text("Apertus"), ["q_proj", "o_proj", "up_proj", "down_proj"]),
    "mamba": ("MambaForCausalLM", lambda: config("Mamba", hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4, expand=2),
              ["in_proj", "x_proj", "embeddings"]),
    "mamba2": ("Mamba2ForCausalLM", lambda: config("Mamba2", hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=8, expand=2,
                                                   num_heads=8, head_dim=8, n_groups=1), ["in_proj"]),
    "jamba": ("JambaForCausalLM", text("Jamba", **MOE, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
                                       expert_layer_offset=1, use_mamba_kernels=False, mamba_d_state=4),
              ["q_proj", "in_proj", "down_proj"]),
    "xglm": ("XGLMForCausalLM", lambda: config("XGLM", d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, vocab_size=64,
                                               max_position_embeddings=64), ["q_proj", "fc1", "out_proj"]),
}  # fmt: skip


def make_base(name: str, path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model whose next tokens are far from equally likely, saved; returns its class."""
    cls, make, _ = CAUSAL[name]
    torch.manual_seed(vary(0))
    model = getattr(transformers, cls)(make())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):  # the experts of each token
                buffer.random_(model.config.n_routed_experts)
    model.to(dtype).save_pretrained(path)
    return type(model)


def make_adapter(
    cls: Any, base: Path, path: Path, targets: list[str] | str | None = None, **lora: Any
) -> Path:
    """An adapter with random factors, saved by PEFT as it does."""
    torch.manual_seed(vary(1))
    options = {
        "r": 2,
        "lora_alpha": 16,
        "target_modules": targets,
        "init_lora_weights": False,
        **lora,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(cls.from_pretrained(base), LoraConfig(**options))
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.data.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(path, save_embedding_layers=False)
    return path
