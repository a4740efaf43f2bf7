"""Small pipelines of diffusers with random weights, what they compute, and adapters of their components."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from seeds import vary

LAYERS = [
    "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "conv_in", "time_embedding.linear_1",
    "proj_mlp",
]  # fmt: skip
RANKS = {
    "UNet2DConditionModel": {"conv1": 2, "conv_in": 3},
    "FluxTransformer2DModel": {"proj_mlp": 2},
}


def clip(projects: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=36,
        num_hidden_layers=1,
        num_attention_heads=4,
        projection_dim=24,
    )
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config)


def unet(**more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=2,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **more,
    )


def sd() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=None,
        unet=unet(cross_attention_dim=32),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    net = unet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        use_linear_projection=True,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=clip(projects=True),
        tokenizer=None,
        tokenizer_2=None,
        unet=net,
        scheduler=DDIMScheduler(),
    )


def flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    net = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=clip(),
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=net,
    )


def vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)


def sd3() -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    net = SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=48,
    )
    return StableDiffusion3Pipeline(
        transformer=net,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=clip(True),
        text_encoder_2=clip(True),
        tokenizer=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def wan() -> Any:
    """A model of videos."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    net = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    return WanPipeline(
        transformer=net,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
    )


PIPELINES = {"sd": sd, "sdxl": sdxl, "sd3": sd3, "flux": flux, "wan": wan}


def opened(base: Path) -> Any:
    import diffusers

    index = json.loads((base / "model_index.json").read_text())
    absent = {
        name: None for name, value in index.items() if isinstance(value, list) and value[0] is None
    }
    return getattr(diffusers, index["_class_name"]).from_pretrained(base, **absent)


@torch.no_grad()
def answers(pipe: Any) -> list[torch.Tensor]:
    """What the components that adapters change compute from one input."""
    torch.manual_seed(vary(1))
    ids = torch.randint(0, 64, (1, 7))
    noise = torch.randn(1, 4, 8, 8)
    if pipe.text_encoder is None:
        return [
            pipe.transformer(
                hidden_states=torch.randn(1, 4, 2, 4, 4),
                timestep=torch.tensor([5]),
                encoder_hidden_states=torch.randn(1, 5, 16),
            ).sample
        ]
    text = pipe.text_encoder(ids)
    if getattr(pipe, "text_encoder_3", text) is None:
        embeds = [text.text_embeds, pipe.text_encoder_2(ids).text_embeds]
        return [
            pipe.transformer(
                hidden_states=noise,
                encoder_hidden_states=torch.randn(1, 5, 32),
                timestep=torch.tensor([5]),
                pooled_projections=torch.cat(embeds, 1),
            ).sample,
            *embeds,
        ]
    if hasattr(pipe, "transformer"):
        places = torch.arange(48).reshape(16, 3).float()
        image = pipe.transformer(
            hidden_states=torch.randn(1, 16, 4),
            encoder_hidden_states=torch.randn(1, 5, 32),
            pooled_projections=text.pooler_output,
            timestep=torch.tensor([0.5]),
            img_ids=places,
            txt_ids=torch.zeros(5, 3),
        ).sample
        return [image, text.last_hidden_state]
    if not hasattr(pipe, "text_encoder_2"):
        return [pipe.unet(noise, 7, text.last_hidden_state).sample, text.last_hidden_state]
    embeds = pipe.text_encoder_2(ids).text_embeds
    added = {"text_embeds": embeds, "time_ids": torch.arange(6.0)[None]}
    return [
        pipe.unet(noise, 7, text.last_hidden_state, added_cond_kwargs=added).sample,
        text.last_hidden_state,
        embeds,
    ]


def trained(pipe: Any, **more: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Adapt every component, with random factors; `more` are settings of the UNet's or the transformer's adapter."""
    net = "transformer" if hasattr(pipe, "transformer") else "unet"
    ranks = RANKS.get(type(getattr(pipe, net)).__name__, {})
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        rank_pattern=ranks,
        init_lora_weights=False,
        target_modules=LAYERS,
        **more,
    )
    getattr(pipe, net).add_adapter(config)
    found = {f"{net}_lora_layers": get_peft_model_state_dict(getattr(pipe, net))}
    layers = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    for name in ("text_encoder", "text_encoder_2"):
        if name in pipe._lora_loadable_modules and getattr(pipe, name, None) is not None:
            config = LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, target_modules=layers)
            getattr(pipe, name).add_adapter(config)
            found[f"{name}_lora_layers"] = get_peft_model_state_dict(getattr(pipe, name))
    return found
