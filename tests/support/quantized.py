"""A tiny Llama in every encoding, and an adapter that PEFT trained on it.

NF4 and int8 are saved by transformers itself, FP8 is coded by transformers' own quantizer (which wants a GPU only to load), GPTQ and AWQ
are packed here as the libraries pack them. Each comes with the values that the defining library decodes, in float32.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import peft
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from seeds import vary
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.utils import logging

logging.disable_progress_bar()

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]

Tensors = dict[str, torch.Tensor]


@dataclass
class Quantized:
    """A base on disk, and what its quantized weights are, float32."""

    base: Path
    decoded: Tensors


def llama() -> LlamaForCausalLM:
    torch.manual_seed(vary(0))
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if is_linear(name):  # a spectrum with something on top
                p.add_(
                    0.3
                    * torch.outer(torch.randn(p.shape[0]), torch.randn(p.shape[1]))
                    / p.shape[1] ** 0.5
                )
    return model.to(torch.bfloat16)


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def train_adapter(directory: Path, model: torch.nn.Module) -> Path:
    """A LoRA adapter on all linear layers, trained for a few steps at a rate that makes intruders."""
    torch.manual_seed(vary(1))
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = peft.get_peft_model(
        model.float(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules)
    )
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=2e-2)
    tokens = torch.randint(1, 64, (8, 16))
    for _ in range(8):
        loss = lora(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    lora.save_pretrained(directory)
    return directory


def write(
    directory: Path,
    plain: Path,
    tensors: Tensors,
    quantization: dict,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A base in two shards, its other files those of the plain one."""
    shutil.copytree(plain, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    stated = {"quantization_config": quantization} if quantization else {}
    config = json.loads((plain / "config.json").read_text()) | stated
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file(
            {n: tensors[n].contiguous() for n in part},
            directory / file,
            metadata=metadata or {"format": "pt"},
        )
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def by_linear(
    plain: Path, code: Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
) -> tuple[Tensors, Tensors]:
    """The tensors on disk, and the decoded values; `code` gives both for one linear layer, names as they follow the module's."""
    tensors = {}
    decoded = {}
    for name, t in load_file(plain / "model.safetensors").items():
        if is_linear(name):
            parts, decoded[name] = code(t)
            tensors |= {
                name.removesuffix(".weight") + suffix: part for suffix, part in parts.items()
            }
        else:
            tensors[name] = t
    return tensors, decoded


def fp8_blocks(directory: Path, plain: Path, **options) -> Quantized:
    quantizer = type(
        "Quantizer",
        (),
        {"quantization_config": FineGrainedFP8Config(weight_block_size=(64, 64), **options)},
    )()

    def code(t: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        made = Fp8Quantize(quantizer)._quantize_one("w.weight", t)
        codes = made["w.weight"]
        scale = made["w.weight_scale_inv"]
        return {".weight": codes, ".weight_scale_inv": scale}, Fp8Dequantize(None)._dequantize_one(
            codes, scale, torch.float32
        )

    tensors, decoded = by_linear(plain, code)
    config = {
        "quant_method": "fp8",
        "weight_block_size": [64, 64],
        "activation_scheme": "dynamic",
        **options,
    }
    return Quantized(write(directory, plain, tensors, config), decoded)


def fp8_rows(directory: Path, plain: Path, whole: bool = False) -> Quantized:
    """As compressed-tensors saves it: a bf16 scale a row, or one for the tensor, and one for activations."""

    def code(t: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        largest = t.float().abs().amax() if whole else t.float().abs().amax(1, keepdim=True)
        scale = (largest / 448).bfloat16()
        codes = (t.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors = {".weight": codes, ".weight_scale": scale, ".input_scale": torch.tensor(0.25)}
        return tensors, codes.float() * scale.float()

    tensors, decoded = by_linear(plain, code)
    config = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
    }
    return Quantized(write(directory, plain, tensors, config), decoded)


def fp8_tensor(directory: Path, plain: Path) -> Quantized:
    return fp8_rows(directory, plain, whole=True)


def by_bitsandbytes(directory: Path, plain: Path, options: BitsAndBytesConfig) -> Quantized:
    """Quantized, saved and decoded by transformers and bitsandbytes."""
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=options, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(directory, max_shard_size="150KB")
    decoded = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            if isinstance(module, bnb.nn.Linear4bit):
                module.weight.quant_state.dtype = torch.float32
            decoded[f"{name}.weight"] = dequantize_bnb_weight(
                module.weight, getattr(module, "state", None)
            ).float()
    return Quantized(directory, decoded)


def nf4(directory: Path, plain: Path) -> Quantized:
    options = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    return by_bitsandbytes(directory, plain, options)


def int8(directory: Path, plain: Path) -> Quantized:
    return by_bitsandbytes(directory, plain, BitsAndBytesConfig(load_in_8bit=True))


def stream(values: np.ndarray, bits: int) -> np.ndarray:
    """(count, c) codes as one stream of bits down each column, lowest bits first, in 32-bit words."""
    ones = (values[:, None, :] >> np.arange(bits)[:, None]) & 1
    ones = ones.reshape(-1, values.shape[1])
    ones = (
        np.pad(ones, ((0, -len(ones) % 32), (0, 0)))
        .reshape(-1, 32, values.shape[1])
        .astype(np.uint64)
    )
    return (ones << np.arange(32, dtype=np.uint64)[:, None]).sum(1).astype(np.uint32).view(np.int32)


def awq_words(values: np.ndarray) -> torch.Tensor:
    """(k, 8c) codes in 32-bit words: output 8c + order[i] stands in bits 4i of word c."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
    for i, place in enumerate(AWQ_ORDER):
        words |= values[:, place::8].astype(np.uint32) << np.uint32(4 * i)
    return torch.from_numpy(words.view(np.int32))


def grouped(
    t: torch.Tensor, size: int
) -> tuple[np.ndarray, np.ndarray, torch.Tensor, torch.Tensor]:
    """Codes (in, out), zero points and scales (groups, out) of four bits, and the values, (out, in) float32."""
    W = t.float().T.reshape(-1, size, t.shape[0])
    low = W.amin(1).clamp_max(0)
    high = W.amax(1).clamp_min(0)
    scale = ((high - low) / 15).half()
    zero = (-low / scale.float()).round().clamp(1, 15)
    codes = (W / scale.float()[:, None] + zero[:, None]).round().clamp(0, 15)
    values = (
        ((codes - zero[:, None]).double() * scale.double()[:, None])
        .reshape(-1, t.shape[0])
        .T.float()
    )
    return (
        codes.reshape(-1, t.shape[0]).numpy().astype(int),
        zero.numpy().astype(int),
        scale,
        values,
    )


def gptq(directory: Path, plain: Path) -> Quantized:
    def code(t: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        codes, zero, scale, values = grouped(t, 32)
        tensors = {
            ".qweight": torch.from_numpy(stream(codes, 4)),
            ".qzeros": torch.from_numpy(stream((zero - 1).T, 4).T.copy()),
            ".scales": scale,
            ".g_idx": torch.arange(t.shape[1], dtype=torch.int32) // 32,
        }
        return tensors, values

    tensors, decoded = by_linear(plain, code)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
    base = write(directory, plain, tensors, config)
    (base / "quantize_config.json").write_text(json.dumps(config))
    return Quantized(base, decoded)


def awq(directory: Path, plain: Path) -> Quantized:
    def code(t: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        codes, zero, scale, values = grouped(t, 32)
        return {".qweight": awq_words(codes), ".qzeros": awq_words(zero), ".scales": scale}, values

    tensors, decoded = by_linear(plain, code)
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
    }
    return Quantized(write(directory, plain, tensors, config), decoded)


def packed(directory: Path, plain: Path) -> Quantized:
    """As compressed-tensors packs four bits, by its own packer."""
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
    }
    scheme = QuantizationScheme(**group)

    def code(t: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        scale = (t.float().view(t.shape[0], -1, 32).abs().amax(2) / 7).bfloat16()
        parts = PackedQuantizationCompressor.compress(
            {"weight": t.float(), "weight_scale": scale.float()}, scheme
        )
        values = PackedQuantizationCompressor.decompress(dict(parts), scheme)["weight"]
        return {
            f".{name}": part.bfloat16() if name == "weight_scale" else part
            for name, part in parts.items()
        }, values

    tensors, decoded = by_linear(plain, code)
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
    }
    return Quantized(write(directory, plain, tensors, config), decoded)


FLOATS = {
    "nvfp4-pack-quantized": "NVFP4",
    "mxfp4-pack-quantized": "MXFP4A16",
    "mxfp8-quantized": "MXFP8A16",
}
"""Formats of small floats in compressed-tensors, and the library's name of their scheme."""


def small_floats(t: torch.Tensor, encoding: str) -> tuple[Tensors, torch.Tensor]:
    """What compressed-tensors stores of a matrix, and what it decodes, here in float32."""
    scheme = preset_name_to_scheme(FLOATS[encoding], ["Linear"])
    low, high = t.float().view(t.shape[0], -1, scheme.weights.group_size).aminmax(dim=2)
    outer = (
        {"weight_global_scale": generate_gparam(low.amin(), high.amax())}
        if encoding.startswith("nv")
        else {}
    )
    scale, _ = calculate_qparams(
        low, high, scheme.weights, global_scale=outer.get("weight_global_scale")
    )
    compressor = BaseCompressor.get_value_from_registry(encoding)
    parts = compressor.compress({"weight": t.float(), "weight_scale": scale, **outer}, scheme)
    codes = parts.get("weight")
    if codes is None:
        codes = unpack_fp4_from_uint8(parts["weight_packed"], *t.shape, dtype=torch.float32)
    values = dequantize(
        codes,
        scale,
        args=scheme.weights,
        dtype=torch.float32,
        global_scale=outer.get("weight_global_scale"),
    )
    assert torch.equal(values.bfloat16(), compressor.decompress(dict(parts), scheme)["weight"])
    return {f".{name}": part for name, part in parts.items()}, values


def floats_config(encoding: str) -> dict:
    """The quantization config of a model in this format."""
    group = json.loads(
        preset_name_to_scheme(FLOATS[encoding], ["Linear"]).model_dump_json(exclude_none=True)
    )
    return {
        "quant_method": "compressed-tensors",
        "format": encoding,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def nvfp4(directory: Path, plain: Path) -> Quantized:
    tensors, decoded = by_linear(plain, lambda t: small_floats(t, "nvfp4-pack-quantized"))
    tensors |= {
        f"{name.removesuffix('.weight')}.input_global_scale": torch.ones(1) for name in decoded
    }
    return Quantized(
        write(directory, plain, tensors, floats_config("nvfp4-pack-quantized")), decoded
    )


def mxfp8(directory: Path, plain: Path) -> Quantized:
    tensors, decoded = by_linear(plain, lambda t: small_floats(t, "mxfp8-quantized"))
    return Quantized(write(directory, plain, tensors, floats_config("mxfp8-quantized")), decoded)


def as_modelopt(parts: Tensors) -> Tensors:
    """NVFP4 of compressed-tensors under ModelOpt's names, with the inverse scale of the tensor."""
    packed, scale, outer = (
        parts[f".weight_{name}"] for name in ("packed", "scale", "global_scale")
    )
    return {".weight": packed, ".weight_scale": scale, ".weight_scale_2": 1 / outer.squeeze(0)}


def modelopt(directory: Path, plain: Path) -> Quantized:
    """NVFP4 by ModelOpt's published layout, stated in its own file alone."""

    def code(t: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        parts = as_modelopt(small_floats(t, "nvfp4-pack-quantized")[0])
        codes = unpack_fp4_from_uint8(parts[".weight"], *t.shape, dtype=torch.float32)
        scale = parts[".weight_scale"].float() * parts[".weight_scale_2"]
        return parts | {".input_scale": torch.tensor(0.25)}, codes * scale.repeat_interleave(16, 1)

    tensors, decoded = by_linear(plain, code)
    base = write(directory, plain, tensors, {})
    stated = {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": ["lm_head"],
    }
    config = {"producer": {"name": "modelopt", "version": "0.23.0"}, "quantization": stated}
    (base / "hf_quant_config.json").write_text(json.dumps(config))
    return Quantized(base, decoded)


MAKERS: dict[str, Callable[[Path, Path], Quantized]] = {
    "fp8-blocks": fp8_blocks, "fp8-rows": fp8_rows, "fp8-tensor": fp8_tensor, "nf4": nf4, "int8": int8, "gptq": gptq,
    "awq": awq, "packed": packed, "nvfp4": nvfp4, "mxfp8": mxfp8, "modelopt": modelopt,
}  # fmt: skip
