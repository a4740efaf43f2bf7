"""A tiny Llama as hqq and torchao store it; tests are skipped where the library is not installed."""

from functools import partial
from pathlib import Path

import pytest
import quantized
import torch
from quantized import Quantized, Tensors, by_linear, is_linear, write
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TorchAoConfig


def hqq_layer(
    weight: torch.Tensor,
    bits: int,
    axis: int,
    dtype: torch.dtype = torch.bfloat16,
    size: int = 64,
    floats: bool = False,
) -> tuple[Tensors, torch.Tensor]:
    """What hqq stores of a layer, and what it decodes once it has loaded that."""
    library = pytest.importorskip("hqq.core.quantize")
    config = library.BaseQuantizeConfig(
        nbits=bits, group_size=size, axis=axis, view_as_float=floats
    )
    layer = library.HQQLinear.from_weights(weight, None, config, compute_dtype=dtype, device="cpu")
    parts = {key: t.detach() for key, t in layer.state_dict().items()}
    loaded = library.HQQLinear(None, None, compute_dtype=dtype, device="cpu", initialize=False)
    loaded.load_state_dict({key: t.clone() for key, t in parts.items()})
    return {f".{key}": t for key, t in parts.items()}, loaded.dequantize().float()


def hqq(directory: Path, plain: Path) -> Quantized:
    tensors, decoded = by_linear(plain, lambda t: hqq_layer(t, 4, 1))
    weights = {
        "nbits": 4,
        "channel_wise": True,
        "group_size": 64,
        "optimize": True,
        "round_zero": True,
        "axis": 1,
    }
    config = {
        "quant_method": "hqq",
        "quant_config": {"weight_quant_params": weights},
        "skip_modules": ["lm_head"],
    }
    return Quantized(write(directory, plain, tensors, config), decoded)


TORCHAO = (
    "fp8-row", "fp8-tensor", "fp8-block", "int8-row", "int8-group", "int8-skewed", "int4-bytes", "int3-bytes", "int4",
)  # fmt: skip
"""Ways in which torchao stores a weight."""


def torchao_weight(t: torch.Tensor, way: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The library's tensor, and what it decodes in float32."""
    library = pytest.importorskip("torchao.quantization")
    kind, _, rest = way.partition("-")
    sizes = {
        "row": library.PerRow(),
        "tensor": library.PerTensor(),
        "block": library.PerBlock([32, 16]),
    }
    size = sizes.get(rest, library.PerGroup(32))
    mapping = getattr(
        library.MappingType, "ASYMMETRIC" if rest in ("skewed", "bytes") else "SYMMETRIC"
    )
    if kind == "fp8":
        made = library.Float8Tensor.from_hp(t, granularity=size)
        return made, made.dequantize(torch.float32)
    if kind == "int8":
        made = library.Int8Tensor.from_hp(t, granularity=size, mapping_type=mapping)
        return made, made.dequantize(torch.float32)
    if rest == "bytes":
        made = library.IntxUnpackedToInt8Tensor.from_hp(
            t.float(), [1, 32], getattr(torch, kind), mapping_type=mapping
        )
        return made, made.dequantize()
    return packed_int4(t.float(), 32)


def packed_int4(t: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain int4, whose quantizer needs a GPU's library: packed here as that library's source does, decoded by torchao's fake quantizer."""
    qat = pytest.importorskip("torchao.quantization.qat")
    from torchao.quantization import Int4Tensor
    from torchao.quantization.qat.fake_quantizer import Int4WeightFakeQuantizer

    config = qat.fake_quantize_config.Int4WeightFakeQuantizeConfig(
        group_size=size, activation_dtype=torch.bfloat16
    )
    low, high = t.view(len(t), -1, size).aminmax(dim=2, keepdim=True)
    scale = (high - low).clamp(min=1e-6) / 15
    codes = (
        (((t.view(len(t), -1, size) - low) / scale).round().clamp(0, 15) - 8)
        .to(torch.int8)
        .flatten(1)
    )
    packed = codes[:, 1::2] << 4 | codes[:, ::2] & 15
    scales, zeros = (x.squeeze(2).T.contiguous() for x in (scale, low + 8 * scale))
    return Int4Tensor(packed, scales, zeros, [1, size], t.shape), Int4WeightFakeQuantizer(config)(t)


def flattened(state: Tensors) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of a file, as transformers writes them with the library's function."""
    pytest.importorskip("torchao")
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    tensors, metadata = flatten_tensor_state_dict(state)
    return tensors, {"format": "pt", **metadata}


def by_torchao(directory: Path, plain: Path, way: str) -> Quantized:
    state = load_file(plain / "model.safetensors")
    decoded = {}
    for name in filter(is_linear, state):
        state[name], decoded[name] = torchao_weight(state[name], way)
    tensors, metadata = flattened(state)
    return Quantized(
        write(directory, plain, tensors, {"quant_method": "torchao"}, metadata), decoded
    )


def by_transformers(directory: Path, plain: Path) -> Quantized:
    """FP8 with a scale for each row, quantized and saved by transformers and torchao."""
    library = pytest.importorskip("torchao.quantization")
    options = TorchAoConfig(library.Float8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.bfloat16, quantization_config=options
    )
    model.save_pretrained(directory, max_shard_size="150KB")
    state = model.state_dict()
    return Quantized(
        directory,
        {name: state[name].dequantize(torch.float32) for name in filter(is_linear, state)},
    )


MAKERS = quantized.MAKERS | {
    "hqq": hqq,
    "torchao-fp8": by_transformers,
    "torchao-int8": partial(by_torchao, way="int8-skewed"),
    "torchao-int4": partial(by_torchao, way="int4"),
}
