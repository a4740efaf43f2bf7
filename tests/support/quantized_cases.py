"""Quantized bases with adapters: the decoded base in float32 on disk, and PEFT's merge."""

import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from quantized import Quantized
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

FP8 = ("fp8-blocks", "fp8-rows", "fp8-tensor", "mxfp8", "torchao-fp8")


class Case(NamedTuple):
    """A quantized base, an adapter, and the decoded base in float32, plain on disk."""

    name: str
    made: Quantized
    adapter: Path
    decoded: Path


def decoded_base(directory: Path, plain: Path, made: Quantized) -> Path:
    """The plain base with the decoded values in float32."""
    shutil.copytree(plain, directory)
    tensors = {
        k: made.decoded.get(k, t).contiguous()
        for k, t in load_file(plain / "model.safetensors").items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return usual_names(
        {k: t for f in sorted(directory.glob("*.safetensors")) for k, t in load_file(f).items()}
    )


def usual_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give torchao's tensors the names of the other libraries."""
    return {
        k.replace("._weight_qdata", ".weight").replace("._weight_", ".weight_"): t
        for k, t in tensors.items()
    }


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """PEFT's merge in float64: the exact sum."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    return PeftModel.from_pretrained(model, adapter).double().merge_and_unload().state_dict()


def decode(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    stem = name.removesuffix(".weight")
    if f"{name}_scale_inv" in tensors:
        return Fp8Dequantize(None)._dequantize_one(
            tensors[name], tensors[f"{name}_scale_inv"], torch.float32
        )
    scale = tensors[f"{stem}.weight_scale"]
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu).float().repeat_interleave(32, 1)
    return tensors[name].float() * scale.float()
