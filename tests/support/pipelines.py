"""Small diffusers pipelines as they lie on disk, and adapters of them, written with the safetensors library."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

TO_Q = "mid_block.attentions.0.to_q"
CONV = "conv_in"
FC1 = "encoder.layers.0.mlp.fc1"
KOHYA = {
    f"unet.{TO_Q}": "lora_unet_mid_block_attentions_0_to_q",
    f"unet.{CONV}": "lora_unet_conv_in",
    f"text_encoder.text_model.{FC1}": "lora_te_text_model_encoder_layers_0_mlp_fc1",
}
"""Modules of an adapter by diffusers' names → by kohya's."""

SHAPES = dict(zip(KOHYA, ((6, 5), (4, 3, 3, 3), (8, 6)), strict=True))
ALPHAS = dict(zip(KOHYA, (3.0, 1.0, 3.0), strict=True))
LORA = "pytorch_lora_weights.safetensors"


def write_pipeline(path: Path) -> Path:
    """A pipeline of a UNet, a text encoder without CLIP's usual prefix, and a decoder that no adapter changes; stale copies beside them."""
    for component, kind, tensors in (
        (
            "unet",
            "UNet2DConditionModel",
            {f"{TO_Q}.weight": (6, 5), f"{CONV}.weight": (4, 3, 3, 3), f"{CONV}.bias": (4,)},
        ),
        ("text_encoder", "", {f"{FC1}.weight": (8, 6)}),
        ("vae", "AutoencoderKL", {"decoder.conv_in.weight": (2, 2)}),
    ):
        (path / component).mkdir(parents=True)
        (path / component / "config.json").write_text(
            json.dumps({"_class_name": kind} if kind else {"model_type": "clip_text_model"})
        )
        name = "model" if component == "text_encoder" else "diffusion_pytorch_model"
        save_file(
            {t: torch.randn(shape) for t, shape in tensors.items()},
            path / component / f"{name}.safetensors",
        )
        (path / component / f"{name}.bin").write_bytes(b"of old")
        save_file({"of.old": torch.zeros(1)}, path / component / f"{name}.fp16.safetensors")
    (path / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}'
    )
    return path


def lora(form: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """An adapter of that pipeline of rank 2, and its metadata: in one of several forms; ``plain`` has no alphas."""
    tensors = {}
    for module, shape in SHAPES.items():
        A = torch.randn(2, *shape[1:])
        B = torch.randn(shape[0], 2, *(1 for _ in shape[2:]))
        if form == "kohya":
            name = KOHYA[module]
            tensors |= {
                f"{name}.lora_down.weight": A,
                f"{name}.lora_up.weight": B,
                f"{name}.alpha": torch.tensor(ALPHAS[module]),
            }
        else:
            tensors |= {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
    config = {
        "unet.r": 2,
        "unet.lora_alpha": 3,
        "unet.alpha_pattern": {"conv_in": 1},
        "text_encoder.r": 2,
        "text_encoder.lora_alpha": 3,
    }
    whole = {"r": 2, "lora_alpha": 3, "init_lora_weights": True, "target_modules": "(to_q|conv)"}
    metadata = {
        "metadata": {"lora_adapter_metadata": json.dumps(config)},
        "finetrainers": {"lora_config": json.dumps(whole, indent=4)},
    }
    return tensors, metadata.get(form, {})


def scaling(form: str, module: str) -> float:
    return {"plain": 1.0, "finetrainers": 1.5}.get(form, ALPHAS[module] / 2)


def factors(
    form: str, tensors: dict[str, torch.Tensor], module: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors A and B of a module of `lora`."""
    names = (
        [f"{KOHYA[module]}.lora_down", f"{KOHYA[module]}.lora_up"]
        if form == "kohya"
        else [f"{module}.lora_A", f"{module}.lora_B"]
    )
    a, b = (tensors[f"{name}.weight"] for name in names)
    return a, b
