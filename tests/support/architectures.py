"""Tiny models of many architectures, and adapters that PEFT saves for them."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from seeds import vary

import streamer

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip


MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


ATTENTION = LINEAR[:4]


CLIP = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 28, "patch_size": 14, "projection_dim": 32}  # fmt: skip


SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}


VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 64,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}


ROPE = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [1, 1, 2]}


def config(kind: str, **values: Any) -> Any:
    return getattr(transformers, f"{kind}Config")(**values)


def text(kind: str, **values: Any) -> Callable[[], Any]:
    return lambda: config(kind, **TEXT, **values)


def llava(**nested: Any) -> Any:
    return config(
        "Llava",
        vision_config=CLIP,
        text_config={"model_type": "llama", **TEXT},
        image_token_id=5,
        tie_word_embeddings=False,
        **nested,
    )


def qwen_vl(kind: str) -> Callable[[], Any]:
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 4,
        "patch_size": 4,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "spatial_merge_size": 2,
        "mlp_ratio": 2,
    }
    return lambda: config(
        kind,
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config=vision,
        tie_word_embeddings=False,
    )


def two(
    encoder: str, encoder_values: dict[str, Any], decoder: str, decoder_values: dict[str, Any]
) -> Callable[[], Any]:
    """The config of an encoder and a decoder that each have a type of their own."""

    def make() -> Any:
        kind = transformers.VisionEncoderDecoderConfig
        made = kind.from_encoder_decoder_configs(
            config(encoder, **encoder_values), config(decoder, **decoder_values)
        )
        made.decoder_start_token_id = made.pad_token_id = 0
        return made

    return make


def multimodal(
    kind: str, model_type: str, vision: dict[str, Any], **values: Any
) -> Callable[[], Any]:
    return lambda: config(
        kind,
        text_config={"model_type": model_type, **TEXT},
        vision_config=vision,
        tie_word_embeddings=False,
        image_token_id=5,
        **values,
    )


# Name → (the model's class, its config, the adapter's target modules)
MODELS: dict[str, tuple[str, Callable[[], Any], list[str] | str]] = {
    "llama": ("LlamaForCausalLM", text("Llama"), [*LINEAR, "lm_head"]),
    "mistral": ("MistralForCausalLM", text("Mistral"), LINEAR),
    "qwen2": ("Qwen2ForCausalLM", text("Qwen2"), LINEAR),
    "qwen3": ("Qwen3ForCausalLM", text("Qwen3"), LINEAR),
    "gemma2": ("Gemma2ForCausalLM", text("Gemma2"), LINEAR),
    "gemma3-text": ("Gemma3ForCausalLM", text("Gemma3Text"), LINEAR),
    "phi3": ("Phi3ForCausalLM", text("Phi3"), ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "gpt2": ("GPT2LMHeadModel", lambda: config("GPT2", n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64,
                                               bos_token_id=1, eos_token_id=2), ["c_attn", "c_proj", "c_fc"]),
    "gpt-neox": ("GPTNeoXForCausalLM", text("GPTNeoX"), ["query_key_value", "dense", "dense_h_to_4h", "embed_out", "lm_head"]),
    "bert": ("BertForSequenceClassification", text("Bert", num_labels=3), ["query", "key", "value", "dense"]),
    "vit": ("ViTForImageClassification", lambda: config("ViT", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                                        num_attention_heads=4, image_size=28, patch_size=14), "all-linear"),
    "vit-gpt2": ("VisionEncoderDecoderModel", two("ViT", VIT, "GPT2", GPT2),
                 ["q_proj", "v_proj", "o_proj", "fc1", "c_attn", "c_proj", "q_attn"]),
    "swin-bert": ("VisionEncoderDecoderModel", two("Swin", SWIN, "Bert", BERT), ["query", "value", "dense", "q_proj", "v_proj"]),
    "t5": ("T5ForConditionalGeneration", lambda: config("T5", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64,
                                                        decoder_start_token_id=0), ["q", "k", "v", "o", "wi", "wo"]),
    "mixtral": ("MixtralForCausalLM", text("Mixtral", **MOE), ATTENTION),
    "qwen3-moe": ("Qwen3MoeForCausalLM", text("Qwen3Moe", **MOE), ATTENTION),
    "gpt-oss": ("GptOssForCausalLM", text("GptOss", **MOE), ATTENTION),
    "llava": ("LlavaForConditionalGeneration", llava, [*LINEAR, "out_proj", "fc1", "fc2", "linear_1", "lm_head"]),
    "llava-next": ("LlavaNextForConditionalGeneration", multimodal("LlavaNext", "llama", CLIP), [*LINEAR, "fc1"]),
    "paligemma": ("PaliGemmaForConditionalGeneration", multimodal("PaliGemma", "gemma", SIGLIP), [*LINEAR, "fc1", "linear"]),
    "gemma3": ("Gemma3ForConditionalGeneration", multimodal("Gemma3", "gemma3_text", SIGLIP, mm_tokens_per_image=4), [*LINEAR, "fc1"]),
    "mistral3": ("Mistral3ForConditionalGeneration", multimodal("Mistral3", "mistral", {**CLIP, "model_type": "pixtral"}), LINEAR),
    "qwen2-vl": ("Qwen2VLForConditionalGeneration", qwen_vl("Qwen2VL"), [*LINEAR, "qkv", "attn.proj", "fc1", "lm_head"]),
    "qwen2.5-vl": ("Qwen2_5_VLForConditionalGeneration", qwen_vl("Qwen2_5_VL"), [*LINEAR, "qkv", "attn.proj", "lm_head"]),
}  # fmt: skip


# Run-time names of transformers 5 → names that transformers 4 used, where they differ
OLD = {
    "llava": [
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ],
    "gemma3": [
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ],
    "qwen2.5-vl": [("model.language_model.", "model."), ("model.visual.", "visual.")],
    "vit": [
        ("vit.layers.", "vit.encoder.layer."),
        (".attention.q_proj.", ".attention.attention.query."),
        (".attention.k_proj.", ".attention.attention.key."),
        (".attention.v_proj.", ".attention.attention.value."),
        (".attention.o_proj.", ".attention.output.dense."),
        (".mlp.fc1.", ".intermediate.dense."),
        (".mlp.fc2.", ".output.dense."),
    ],
    "gpt-neox": [("lm_head.", "embed_out.")],
}


def old_name(name: str, pairs: list[tuple[str, str]]) -> str:
    """A run-time name as transformers 4 had it: the first pair that fits the beginning, or all pairs that fit within."""
    for new, old in pairs:
        if new.startswith("."):
            name = name.replace(new, old)
        elif name.startswith(new):
            name = old + name.removeprefix(new)
            if not pairs[-1][0].startswith("."):
                break
    return name


def make_base(name: str, path: Path) -> Any:
    """A tiny random model, saved; returns its class."""
    cls, make, _ = MODELS[name]
    torch.manual_seed(vary(0))
    model = getattr(transformers, cls)(make())
    model.save_pretrained(path)
    return type(model)


def make_adapter(cls: Any, base: Path, path: Path, targets: list[str] | str) -> Any:
    """An adapter with random factors on the saved base; returns PEFT's model."""
    torch.manual_seed(vary(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out, which PEFT sets itself
        model = get_peft_model(
            cls.from_pretrained(base),
            LoraConfig(r=2, lora_alpha=8, target_modules=targets, init_lora_weights=False),
        )
        model.save_pretrained(path, save_embedding_layers=False)
    return model


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def merge(base: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    streamer.merge_with_reduced_intruder_dimensions(base, adapter, out, mitigation_lambda=1.0)
    return weights(out)


def assert_merged(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6, msg=name)
