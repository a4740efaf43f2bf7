"""A tiny Llama as hqq stores it; tests are skipped where the library is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import quantized
import torch
from quantized import Quantized, Tensors, by_linear, write


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
    config = library.BaseQuantizeConfig(nbits=bits, group_size=size, axis=axis, view_as_float=floats)
    layer = library.HQQLinear.from_weights(weight, None, config, compute_dtype=dtype, device="cpu")
    parts = {key: t.detach() for key, t in layer.state_dict().items()}
    loaded = library.HQQLinear(None, None, compute_dtype=dtype, device="cpu", initialize=False)
    loaded.load_state_dict({key: t.clone() for key, t in parts.items()})
    return {f".{key}": t for key, t in parts.items()}, loaded.dequantize().float()


def hqq(directory: Path, plain: Path) -> Quantized:
    tensors, decoded = by_linear(plain, lambda t: hqq_layer(t, 4, 1))
    weights = {"nbits": 4, "channel_wise": True, "group_size": 64, "optimize": True, "round_zero": True, "axis": 1}
    config = {"quant_method": "hqq", "quant_config": {"weight_quant_params": weights}, "skip_modules": ["lm_head"]}
    return Quantized(write(directory, plain, tensors, config), decoded)


MAKERS = quantized.MAKERS | {"hqq": hqq}
