"""A plain model in the place of a quantized one: what is written, what is left out, and what its config no longer says."""

from __future__ import annotations

import re

from streamer.errors import UnsupportedError
from streamer.weights.dtypes import ENCODINGS
from streamer.weights.logical import Weights
from streamer.weights.model_config import ModelConfig

STALE = {"quantize_config.json", "quant_config.json", "hf_quant_config.json"}
"""Files by which some loaders take a model for a quantized one."""

# Scales of activations and caches.
_BESIDE = re.compile(r"(^|[._])(input|output|activation|[qkv]|kv)_(scale|zero_point)(_ub)?$")

# Dtypes in which values do not stand as they are; integers may be indices, but not as matrices.
_CODES = re.compile(r"^(F8_|F6_|F4)")
_INTEGERS = {"I8", "U8", "I16", "U16", "I32", "U32"}

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def plain_weights(weights: Weights, config: ModelConfig) -> Weights:
    """The weights, all to be written plain: what stands as codes in the dtype of the model's config, or in bfloat16.

    Raises
    ------
    UnsupportedError
        If a tensor of codes has no entry, or the codes stand in another orientation than the plain model's.
    """
    for name, info in ((t.name, t) for f in weights.checkpoint.files.values() for t in f.header.tensors):
        codes = _CODES.match(info.dtype) or (info.dtype in _INTEGERS and len(info.shape) > 1)
        if codes and name not in weights.owners and not belongs_to_codes(name, weights):
            raise UnsupportedError(
                f"{weights.checkpoint.path}: tensor {name!r}: dtype {info.dtype} with no scale or table that could decode it; "
                "use the 16-bit model"
            )
    return weights.dequantized(ENCODINGS[plain_dtype(config)])


def plain_dtype(config: ModelConfig) -> str:
    """Return the model's dtype in the format's spelling: the one that the config states, or bfloat16."""
    stated = (str(value).removeprefix("torch.") for value in config.stated("dtype", "torch_dtype"))
    return next((_DTYPES[name] for name in stated if name in _DTYPES), "BF16")


def belongs_to_codes(name: str, weights: Weights) -> bool:
    """Whether a tensor is of no use once nothing is quantized: a scale of activations or caches."""
    return bool(weights.coded) and bool(_BESIDE.search(name))
