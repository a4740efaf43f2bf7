"""Tiny random models of every class that transformers registers, from its own configs."""

import inspect
from typing import Any

import torch
import transformers
from seeds import vary
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

VOCABULARY = 72

LARGEST = 10_000_000
"""Parameters of a model that is still tiny enough to make cases of."""

# Small sizes under every name that configs have for them.
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "projection_dim"), 32),
    **dict.fromkeys(("embed_dim", "word_embed_proj_dim", "encoder_hidden_size", "hidden_dim", "decoder_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "dff", "d_inner", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim"), 48),
    **dict.fromkeys(("intermediate_size_mlp", "ffn_hidden_size", "n_inner", "decoder_intermediate_size", "mlp_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth"), 2),
    **dict.fromkeys(("num_decoder_layers", "encoder_num_hidden_layers", "decoder_num_hidden_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_num_attention_heads", "decoder_num_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "encoder_num_key_value_heads", "decoder_num_key_value_heads"), 2),
    **dict.fromkeys(("num_experts_per_tok", "patch_size", "temporal_patch_size", "num_experts_per_token", "moe_topk"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions", "max_source_positions"), 64),
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "encoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "attention_head_size"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_conv_pos_embedding_groups", "n_shared_experts"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    "image_size": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_mel_bins": 8, "state_size": 4, "time_step_rank": 4, "rotary_dim": 8,
    "num_conv_pos_embeddings": 8, "num_query_tokens": 4, "cross_attention_hidden_size": 32, "cls_token_id": 1, "sep_token_id": 2,
    "decoder_start_token_id": 0, "mask_token_id": 3, "num_filters": 2,
}  # fmt: skip

# What a config needs beyond small sizes, by its class.
MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_expand": 2,
}
ROTARY = {"rope_type": "default", "rope_theta": 1e4}
SECTIONS = {"rope_parameters": {**ROTARY, "mrope_section": [2, 1, 1]}}
ZAMBA = {"num_hidden_layers": 3, "attention_head_dim": 16, "mamba_dt_rank": 4, "n_mamba_heads": 2}

VALUES: dict[str, dict[str, Any]] = {
    "BambaConfig": {**MAMBA2, "hidden_size": 32, "num_hidden_layers": 2, "attn_layer_indices": [1]},
    "BltConfig": {"num_hidden_layers": 2},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 4}},
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": ROTARY}},
    "DbrxConfig": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "DeepseekOcr2TextConfig": {"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"]},
    "DiffusionGemmaTextConfig": {"num_experts": 4, "moe_intermediate_size": 24, "top_k_experts": 2},
    "Emu3Config": {"vocabulary_map": {"<image>": 4}},
    "Emu3VQVAEConfig": {"base_channels": 32, "num_res_blocks": 1, "codebook_size": 64, "channel_multiplier": [1, 1]},
    "ChameleonVQVAEConfig": {"base_channels": 32, "num_res_blocks": 1, "num_embeddings": 64, "channel_multiplier": [1, 1]},
    "JanusVQVAEConfig": {"base_channels": 32, "num_res_blocks": 1, "num_embeddings": 64, "channel_multiplier": [1, 1]},
    "EsmcConfig": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "Florence2VisionConfig": {
        "depths": [1], "patch_size": [3], "patch_stride": [2], "patch_padding": [1], "patch_prenorm": [False],
        "embed_dim": [32], "num_heads": [4], "num_groups": [4], "window_size": 4, "projection_dim": 32,
    },
    "GlmOcrTextConfig": {"rope_parameters": {**ROTARY, "mrope_section": [1, 1, 0]}},
    "Glm4vMoeTextConfig": {"rope_parameters": {**ROTARY, "mrope_section": [1, 1, 0]}},
    "FunnelConfig": {"pad_token_id": None},  # its row is made zero on loading
    "YoutuConfig": {"pad_token_id": None},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "Granite4VisionConfig": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "4/8"},
    "GraniteMoeHybridConfig": {**MAMBA2, "hidden_size": 32, "layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "GraniteSpeech5EncoderConfig": {"context_size": 32},
    "JambaConfig": {"num_hidden_layers": 2, "attn_layer_offset": 1, "attn_layer_period": 2, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "LayoutLMv3Config": {"coordinate_size": 6, "shape_size": 4, "input_size": 8, "patch_size": 4},
    "Lfm2MoeConfig": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "LiltConfig": {"channel_shrink_ratio": 4, "hidden_size": 48},
    "Mamba2Config": {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1, "state_size": 8, "chunk_size": 16},
    "MobileBertConfig": {"embedding_size": 16},
    "MoonshineConfig": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "MoonshineStreamingConfig": {"num_key_value_heads": 4},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "RecurrentGemmaConfig": {"num_hidden_layers": 3, "lru_width": 32},
    "ReformerConfig": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "attn_layers": ["local", "lsh"], "num_hidden_layers": 2},
    "Speech2TextConfig": {"input_feat_per_channel": 8, "conv_channels": 16},
    "Wav2Vec2BertConfig": {"vocab_size": VOCABULARY, "feature_projection_input_dim": 8},
    "Wav2Vec2ConformerConfig": {"vocab_size": VOCABULARY},
    "SeamlessM4TConfig": {"feature_projection_input_dim": 8},
    "SeamlessM4Tv2Config": {"feature_projection_input_dim": 8},
    "XmodConfig": {"languages": ["en_XX"], "default_language": "en_XX"},
    "ZambaConfig": ZAMBA,
    "ZayaConfig": {"num_experts_per_tok": 1},
    "PerceiverConfig": {
        "d_latents": 32, "num_latents": 8, "num_blocks": 1, "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4, "num_cross_attention_heads": 4,
    },
    "RoCBertConfig": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    **dict.fromkeys(
        (
            "Qwen2VLTextConfig", "Qwen2_5_VLTextConfig", "Glm4vTextConfig", "Glm46VTextConfig", "PaddleOCRTextConfig",
            "Qwen2_5OmniTextConfig",
        ),
        SECTIONS,
    ),
}  # fmt: skip
"""What makes a small model of configs whose defaults make none: sizes that they leave open, and layers of the kinds that they name."""

DECODERS = {"ReformerModelWithLMHead": {"is_decoder": True}}

PAIRS = {
    "EncoderDecoderModel": ("EncoderDecoder", "Bert", "Bert"),
    "VisionEncoderDecoderModel": ("VisionEncoderDecoder", "ViT", "GPT2"),
    "SpeechEncoderDecoderModel": ("SpeechEncoderDecoder", "Wav2Vec2", "Bart"),
}

TASKS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "vision-language": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "ctc": "MODEL_FOR_CTC_MAPPING_NAMES",
    "classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}


def classes() -> dict[str, tuple[str, str]]:
    """Name of each class → its model type and its task."""
    found: dict[str, tuple[str, str]] = {}
    for task, table in TASKS.items():
        for model_type, names in getattr(modeling_auto, table).items():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault(name, (model_type, task))
    return found


def shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """The values of a config that make it small."""
    values: dict[str, Any] = {}
    names = {config.attribute_map.get(key, key): size for key, size in SIZES.items()}
    next_id = 60
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            values[key] = {"model_type": value.model_type, **shrunk(value)}
        elif isinstance(value, float) and "drop" in key:
            values[key] = 0.0
        elif key in names and (value is None or type(value) is int):
            values[key] = names[key]
        elif (
            ("vocab" in key or key == "num_embeddings")
            and type(value) is int
            and value > VOCABULARY
        ):
            values[key] = VOCABULARY
        elif key == "conv_dim" and isinstance(value, (list, tuple)):
            values[key] = [16] * len(value)
        elif key in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            values[key] = {k: [2, 1, 1] if k == "mrope_section" else v for k, v in value.items()}
        elif (
            key.endswith(("_token_id", "_token_index"))
            and type(value) is int
            and value >= VOCABULARY
        ):
            values[key] = next_id = next_id + 1
        elif key == "layer_types" and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            values[key] = (kinds * 2)[: max(2, len(kinds))]
    if "layer_types" in values and "num_hidden_layers" not in VALUES.get(type(config).__name__, {}):
        for key in ("num_hidden_layers", "num_layers", "n_layer"):
            if key in values:
                values[key] = len(values["layer_types"])
    if isinstance(getattr(config, "per_layer_config", None), dict):
        values["per_layer_config"] = {}
    if (
        "kv_lora_rank" in values and "num_key_value_heads" in values
    ):  # latent attention has no groups
        values["num_key_value_heads"] = values["num_attention_heads"]
    return {**values, **VALUES.get(type(config).__name__, {})}


def tiny_config(kind: type[PreTrainedConfig], **values: Any) -> PreTrainedConfig:
    return kind(**{**shrunk(kind(**VALUES.get(kind.__name__, {}))), **values})


def config_of(name: str) -> PreTrainedConfig:
    """A config of small sizes for a model class."""
    cls = getattr(transformers, name)
    if name in PAIRS:
        pair, *kinds = PAIRS[name]
        encoder, decoder = (
            tiny_config(getattr(transformers, f"{kind}Config")).to_dict() for kind in kinds
        )
        decoder |= {"is_decoder": True, "add_cross_attention": True}
        return getattr(transformers, f"{pair}Config")(
            encoder=encoder, decoder=decoder, decoder_start_token_id=0, pad_token_id=0
        )
    return tiny_config(cls.config_class, **DECODERS.get(name, {}))


def build(name: str) -> PreTrainedModel:
    """A random model of small sizes.

    Raises
    ------
    ValueError
        If small sizes leave it large.
    """
    config = config_of(name)
    torch.manual_seed(vary(0))
    model: PreTrainedModel = getattr(transformers, name)(config)
    if (size := model.num_parameters()) > LARGEST:
        raise ValueError(f"{size} parameters under the sizes known here")
    return model.eval()


def example(model: PreTrainedModel) -> dict[str, Any]:
    """Inputs that a model takes."""
    g = torch.Generator().manual_seed(vary(1))
    taken = inspect.signature(model.forward).parameters
    config = model.config
    ids = torch.randint(3, 60, (2, 9), generator=g)
    if type(model).__name__.endswith("SequenceClassification"):
        ids[:, -1] = 2  # the end of a sequence, which some classes look for
    inputs: dict[str, Any] = {}
    if "input_ids" in taken:
        inputs["input_ids"] = ids
    if "decoder_input_ids" in taken and not type(model).__name__.endswith("Classification"):
        inputs["decoder_input_ids"] = ids[:, :5]
    needed = [
        n
        for n, p in taken.items()
        if p.default is inspect.Parameter.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    if "pixel_values" in taken and ("input_ids" not in taken or "pixel_values" in needed):
        vision = getattr(config, "encoder", getattr(config, "vision_config", config))
        size = getattr(vision, "image_size", 8)
        inputs["pixel_values"] = torch.randn(
            2, getattr(vision, "num_channels", 3), *_pair(size), generator=g
        )
    if "input_features" in taken and "input_ids" not in taken:
        inputs["input_features"] = _features(config, g)
    elif "input_values" in taken and "input_ids" not in taken:
        inputs["input_values"] = torch.randn(2, 4000, generator=g)
    return inputs


def _pair(size: Any) -> tuple[int, int]:
    return tuple(size) if isinstance(size, list | tuple) else (size, size)


def _features(config: Any, g: torch.Generator) -> torch.Tensor:
    """Mel frames: (batch, bins, frames), or (batch, frames, bins) for encoders that subsample them."""
    encoder = getattr(config, "encoder_config", getattr(config, "audio_config", config))
    widths = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
    bins = next((n for n in (getattr(encoder, w, None) for w in widths) if n), 8)
    return torch.randn(
        2,
        *(
            (bins, 128)
            if hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins")
            else (128, bins)
        ),
        generator=g,
    )


def answer(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(vary(3))
    with torch.no_grad():
        out = model.eval()(**inputs)
    if getattr(out, "logits", None) is not None:
        return out.logits
    return next(
        v
        for v in out.values()
        if isinstance(v, torch.Tensor) and v.is_floating_point() and v.ndim > 1
    )
