"""Write a quantized model as plain weights of one dtype, and remove every sign of quantization from its config and files."""

from __future__ import annotations

import re
from collections.abc import Mapping

from streamer.errors import UnsupportedError
from streamer.weights.dtypes import ENCODINGS
from streamer.weights.logical import WeightView
from streamer.weights.model_config import ModelConfig

STALE = {"quantize_config.json", "quant_config.json", "hf_quant_config.json"}
"""Files that make some loaders treat a model as quantized."""

# Scales of activations and caches.
_ACTIVATION_SCALE = re.compile(r"(^|[._])(input|output|activation|[qkv]|kv)_(global_scale|scale|zero_point)(_ub)?$")

# Dtypes of quantized values. Integers count only with two or more dimensions; with one they are indices.
_QUANTIZED = re.compile(r"^(F8_|F6_|F4)")
_INTEGERS = {"I8", "U8", "I16", "U16", "I32", "U32"}

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def plain_weights(weights: WeightView, config: ModelConfig) -> WeightView:
    """Make quantized weights be written as plain ones, in the dtype of the model's config or in bfloat16.

    Raises
    ------
    UnsupportedError
        If some quantized values have no known format.
    """
    for name, info in ((t.name, t) for f in weights.checkpoint.files.values() for t in f.header.tensors):
        quantized = _QUANTIZED.match(info.dtype) or (info.dtype in _INTEGERS and len(info.shape) > 1)
        if quantized and name not in weights.owners and not is_activation_scale(name, weights):
            raise UnsupportedError(
                f"{weights.checkpoint.path}: tensor {name!r}: dtype {info.dtype} with no scale or table that could decode it; "
                "use the 16-bit model"
            )
    return weights.dequantized(ENCODINGS[plain_dtype(config)])


def plain_metadata(metadata: Mapping[str, str], weights: WeightView) -> dict[str, str]:
    """Remove what torchao states of each tensor from a file's metadata."""
    return {key: text for key, text in metadata.items() if key != "tensor_names" and key not in weights}


def plain_dtype(config: ModelConfig) -> str:
    """Read the model's dtype from its config in safetensors' spelling, ``torch.float16`` → ``F16``; default BF16."""
    stated = (str(value).removeprefix("torch.") for value in config.stated("dtype", "torch_dtype"))
    return next((_DTYPES[name] for name in stated if name in _DTYPES), "BF16")


def is_activation_scale(name: str, weights: WeightView) -> bool:
    """Test whether a tensor scales a quantized model's activations or caches, and so has no use in a plain model."""
    return bool(weights.owners) and bool(_ACTIVATION_SCALE.search(name))
