"""A base's logical weights, under the names of a plain checkpoint, whatever tensors store them.

`FORMATS` says which tensors form one weight. For GPTQ, ``q_proj.qweight``, ``q_proj.qzeros`` and ``q_proj.scales`` form ``q_proj.weight``.
A tensor that no format claims is a weight by itself.

The model's ``quantization_config`` must name a method of some format. Looking up a tensor of quantized values that no format claims is
refused by name, so raw quantized values never reach a computation.

torchao stores a weight as ``<module>._weight_qdata``, ``<module>._weight_scale`` and others. The file's metadata states, under the weight's
name, the library's class of tensor, its block and the tensors that it consists of. FP8 and integers in bytes: ``W = (q − zero) · scale`` in
float32, by blocks as in `codes`. Packed int4 (plain layout): two values from −8 to 7 in a byte, the first in the low bits;
``W = q · scale + zero``, with scales and zero points as (groups of inputs, outputs).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from streamer.errors import FormatError, UnsupportedError
from streamer.storage.checkpoint import Checkpoint
from streamer.storage.files import strict_json
from streamer.weights import codes
from streamer.weights.base import FLOATS, Plain, QuantizedWeight, StoredTensor, Tensors, Weight
from streamer.weights.codes import Config, Parts
from streamer.weights.model_config import ConfigValues, ModelConfig

_TORCHAO_PARTS = (
    "scale_and_zero",
    "per_tensor_scale",
    "act_pre_scale",
    "act_quant_scale",
    "act_quant_zero_point",
)

_TORCHAO_OPTIONAL = {"zero_points": ("._weight_zero_point",)} | {
    part: (f"._weight_{part}",) for part in _TORCHAO_PARTS
}
"""Roles of the tensors that some classes have, and their endings."""

_PARTS = {
    "qdata": "weight",
    "scale": "quant_scale",
    "zero_point": "zero_points",
    # Only activations need these.
    "act_quant_scale": "act_quant_scale",
    "act_quant_zero_point": "act_quant_zero_point",
}


def torchao_weight(name: str, parts: Parts, config: Config) -> QuantizedWeight:
    """Make the weight that these tensors store, by the class that the file's metadata states.

    Raises
    ------
    UnsupportedError
        If the class, or a tensor that it consists of, is not supported.
    FormatError
        If the metadata is missing or does not fit the tensors.
    """
    kind, data, stated = _stated(name, parts)
    unknown = next((part for part in stated if part not in _PARTS), None)
    if kind not in _TORCHAO_CLASSES or unknown is not None:
        raise parts.unsupported(
            f"torchao's {kind}" + (f" with {unknown}" if unknown is not None else "")
        )
    parts.check({_PARTS[part] for part in stated} == parts.keys())
    return _TORCHAO_CLASSES[kind](name, parts, data)


def _stated(name: str, parts: Parts) -> tuple[str, ConfigValues, list[str]]:
    """Read what the metadata states of a weight: its class, its attributes, and the tensors that it consists of."""
    try:
        match strict_json(parts["weight"].file.header.metadata[name].encode()):
            case {"_type": str(kind), "_data": dict(data), "_tensor_data_names": list(stated)} if (
                all(isinstance(part, str) for part in stated)
            ):
                return kind, data, stated
    except (KeyError, ValueError):
        pass
    fault = f"the file's metadata does not describe {name!r} as torchao does"
    raise FormatError(f"{parts.where}: {fault}; get the file again")


def _blocks(cls: type[codes.Scaled], name: str, parts: Parts, data: ConfigValues) -> codes.Scaled:
    """Make a weight with scales of blocks that divide its rows and columns, as the metadata states them."""
    values, scale = parts.infos("weight", "quant_scale")
    parts.check(len(values.shape) == 2 == len(scale.shape) and 0 not in scale.shape)
    block = [m // k for m, k in zip(values.shape, scale.shape, strict=True)]
    fits = [k * b for k, b in zip(scale.shape, block, strict=True)] == [*values.shape]
    fits &= data.get("block_size") == block
    parts.check(fits and scale.dtype in codes.SCALE_DTYPES)
    return cls.of(name, parts, {"weight_block_size": block})


def _fp8(name: str, parts: Parts, data: ConfigValues) -> codes.Scaled:
    parts.check(parts["weight"].info.dtype == "F8_E4M3" and "zero_points" not in parts)
    return _blocks(codes.FP8, name, parts, data)


def _integers(name: str, parts: Parts, data: ConfigValues) -> codes.Scaled:
    zeros = parts.get("zero_points", parts["weight"]).info.dtype
    if zeros in codes.SCALE_DTYPES:
        raise parts.unsupported(f"torchao's zero point in {zeros}")
    fits = parts["weight"].info.dtype == "I8"
    parts.check(fits and parts.may_have("zero_points", "I8", parts["quant_scale"].info.shape))
    stated = data.get("target_dtype", {"_data": "int8"})
    dtype = stated.get("_data") if isinstance(stated, dict) else None
    parts.check(isinstance(dtype, str), "its metadata")
    label = f"{str(dtype).upper()} (torchao)"
    return replace(_blocks(codes.Scaled, name, parts, data), label=label)


@dataclass(frozen=True)
class PackedInt4(QuantizedWeight):
    """Four-bit integers along the inputs, two in a byte."""

    @classmethod
    def of(cls, name: str, parts: Parts, data: ConfigValues) -> Self:
        """Check that the tensors fit together and to the metadata, and make the weight that they store."""
        packed = parts["weight"].info
        fits = {"quant_scale", "zero_points"} <= parts.keys()
        parts.check(fits and packed.dtype == "I8" and len(packed.shape) == 2)
        m, half = packed.shape
        n = 2 * half
        scale = parts["quant_scale"].info
        parts.check(
            len(scale.shape) == 2 and scale.shape[1] == m and scale.shape[0] > 0 and half > 0
        )
        groups = scale.shape[0]
        size = n // groups
        fits = data.get("shape") == [m, n] and data.get("block_size") == [1, size]
        fits &= parts.may_have("zero_points", scale.dtype, scale.shape)
        parts.check(fits and scale.dtype in codes.SCALE_DTYPES and size * groups == n)
        return cls(name, (m, n), parts, "INT4 (torchao)")

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``q · scale + zero``."""
        parts = (self.tensors[role].whole()[:, i:j].T for role in ("quant_scale", "zero_points"))
        scale, zero = (part.to(torch.float32)[..., None] for part in parts)
        packed = self.tensors["weight"].rows(i, j)
        values = torch.stack([packed << 4 >> 4, packed >> 4], -1).to(torch.float32)
        return values.view(j - i, scale.shape[1], -1).mul_(scale).add_(zero).flatten(1)


_TORCHAO_CLASSES = {
    "Float8Tensor": _fp8,
    "Int8Tensor": _integers,
    "IntxUnpackedToInt8Tensor": _integers,
    "Int4Tensor": PackedInt4.of,
}


@dataclass(frozen=True)
class QuantizationFormat:
    """One way in which libraries store quantized weights.

    Attributes
    ----------
    title, stored
        Readable name, and the tensors on disk.
    quant_methods
        Values of ``quant_method`` that use this format; None is one of them if it needs no config.
    values
        Suffix of the quantized tensor's name, its dtypes (empty for any), and the suffix that replaces it in the weight's name.
    companion_suffixes
        For each other role, the suffixes that may follow the stem; the first that exists is used.
    optional
        Like `companion_suffixes`, for tensors that may be missing.
    make
        Makes the weight that these tensors store.
    requantizes
        Whether `merge` writes merged weights back in this encoding.
    """

    title: str
    stored: str
    quant_methods: Sequence[str | None]
    values: tuple[str, tuple[str, ...], str]
    companion_suffixes: Mapping[str, tuple[str, ...]]
    make: Callable[[str, Parts, Config], QuantizedWeight]
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    requantizes: bool = False

    def claim(self, tensor: str, tensors: Tensors) -> tuple[str, dict[str, str]] | None:
        """Recognise a weight's tensor of quantized values by name and dtype, and collect its companions.

        For GPTQ: ``layers.0.q_proj.qweight`` → ``layers.0.q_proj.weight`` and ``{"weight": "layers.0.q_proj.qweight",
        "zeros": "layers.0.q_proj.qzeros", "scales": "layers.0.q_proj.scales"}``.

        Returns
        -------
        tuple or None
            The weight's name and its tensors' names by role; None for any other tensor.
        """
        ending, dtypes, instead = self.values
        if not tensor.endswith(ending) or (dtypes and tensors[tensor].info.dtype not in dtypes):
            return None
        stem = tensor.removesuffix(ending)
        roles = {"weight": tensor}
        for role, endings in {**self.companion_suffixes, **self.optional}.items():
            companion = next((stem + e for e in endings if stem + e in tensors), None)
            if companion is not None:
                roles[role] = companion
            elif role in self.companion_suffixes:
                return None
        return stem + instead, roles


FORMATS: tuple[QuantizationFormat, ...] = (
    QuantizationFormat(
        "FP8 e4m3: scale of a block, a row or the tensor; MXFP8",
        "`weight`, `weight_scale_inv` or `weight_scale`",
        (None, "fp8", "mxfp8", "fbgemm_fp8", "compressed-tensors", "modelopt"),
        ("", ("F8_E4M3",), ""),
        {"quant_scale": ("_scale_inv", "_scale")},
        codes.FP8.of,
        {"zeros": ("_zero_point",)},
        requantizes=True,
    ),
    QuantizationFormat(
        "bitsandbytes NF4 and FP4, double quantization too",
        "`weight`, `.absmax`, `.quant_map`, `.quant_state.*`",
        (None, "bitsandbytes"),
        ("", (), ""),
        {
            "absmax": (".absmax",),
            "map": (".quant_map",),
            "state": (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"),
        },
        codes.FourBit.of,
        {"nested_absmax": (".nested_absmax",), "nested_map": (".nested_quant_map",)},
    ),
    QuantizationFormat(
        "bitsandbytes int8",
        "`weight`, `SCB`",
        (None, "bitsandbytes"),
        (".weight", ("I8",), ".weight"),
        {"SCB": (".SCB",)},
        codes.EightBit.of,
        {"format": (".weight_format",)},
    ),
    QuantizationFormat(
        "GPTQ, 2, 3, 4 and 8 bits, both formats",
        "`qweight`, `qzeros`, `scales`, `g_idx`",
        ("gptq",),
        (".qweight", (), ".weight"),
        {"zeros": (".qzeros",), "scales": (".scales",)},
        codes.GPTQ.of,
        {"groups": (".g_idx",)},
    ),
    QuantizationFormat(
        "AWQ, 4 bits (gemm)",
        "`qweight`, `qzeros`, `scales`",
        ("awq",),
        (".qweight", (), ".weight"),
        {"zeros": (".qzeros",), "scales": (".scales",)},
        codes.AWQ.of,
    ),
    QuantizationFormat(
        "compressed-tensors int8",
        "`weight`, `weight_scale`",
        ("compressed-tensors",),
        (".weight", ("I8",), ".weight"),
        {"quant_scale": (".weight_scale",)},
        codes.Scaled.of,
        {"zeros": (".weight_zero_point",)},
    ),
    QuantizationFormat(
        "compressed-tensors packed integers",
        "`weight_packed`, `weight_scale`, `weight_shape`",
        ("compressed-tensors",),
        (".weight_packed", (), ".weight"),
        {"scales": (".weight_scale",), "shape": (".weight_shape",)},
        codes.PackedIntegers.of,
        {"zeros": (".weight_zero_point",), "groups": (".weight_g_idx",)},
    ),
    QuantizationFormat(
        "compressed-tensors NVFP4 and MXFP4",
        "`weight_packed`, `weight_scale`, `weight_global_scale` (NVFP4)",
        ("compressed-tensors",),
        (".weight_packed", ("U8",), ".weight"),
        {"scales": (".weight_scale",)},
        codes.PackedFP4.of,
        {"divisor": (".weight_global_scale",), "extra": (".weight_zero_point", ".weight_g_idx")},
    ),
    QuantizationFormat(
        "ModelOpt NVFP4, stated in `config.json` or `hf_quant_config.json`",
        "`weight`, `weight_scale`, `weight_scale_2`",
        ("modelopt",),
        (".weight", ("U8",), ".weight"),
        {"scales": (".weight_scale",), "factor": (".weight_scale_2",)},
        codes.PackedFP4.of,
        {"extra": (".pre_quant_scale",)},
    ),
    QuantizationFormat(
        "torchao FP8 e4m3: scale of a block, a row or the tensor",
        "`_weight_qdata`, `_weight_scale`",
        ("torchao",),
        ("._weight_qdata", ("F8_E4M3",), ".weight"),
        {"quant_scale": ("._weight_scale",)},
        torchao_weight,
        _TORCHAO_OPTIONAL,
        requantizes=True,
    ),
    QuantizationFormat(
        "torchao int8 and fewer bits in bytes, int4 (plain)",
        "`_weight_qdata`, `_weight_scale`, `_weight_zero_point`",
        ("torchao",),
        ("._weight_qdata", (), ".weight"),
        {},
        torchao_weight,
        {"quant_scale": ("._weight_scale",), **_TORCHAO_OPTIONAL},
    ),
    QuantizationFormat(
        "HQQ, 1 to 8 bits, both axes",
        "`W_q`, `scale`, `zero`, `shape` and settings",
        (None, "hqq"),
        (".W_q", (), ".weight"),
        {},
        codes.HQQ.of,
        {
            role: (f".{role}",)
            for role in ("scale", "zero", "shape", *codes.SETTINGS, *codes.NOT_DECODED)
        },
    ),
    QuantizationFormat(
        "MXFP4 expert stacks",
        "`*_blocks`, `*_scales`",
        (None, "mxfp4"),
        ("_blocks", ("U8",), ""),
        {"scales": ("_scales",)},
        codes.MXFP4.of,
    ),
)
"""Formats of quantized weights. To add one, add an entry here and its class in `codes` (torchao's are above)."""


def supported_method(quantization: Mapping[str, Any], where: str) -> str | None:
    """Read the ``quant_method`` of a quantization config; None for {}.

    Raises
    ------
    UnsupportedError
        If no format supports it, or another key changes what the quantized values mean.
    """
    if not quantization:
        return None
    method = quantization.get("quant_method")
    if method is None and (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        method = "bitsandbytes"  # older versions of transformers left it out
    kind = repr(method)
    known = sorted({m for format_ in FORMATS for m in format_.quant_methods if m is not None})
    if method in known:
        for key, good in _SETTINGS.get(str(method), {}).items():
            value = quantization.get(key)
            value = value.get("format", value) if isinstance(value, dict) else value
            if value and value not in good:
                kind += f" with {key}={value!r}" if isinstance(value, str | int) else f" with {key}"
                break
        else:
            return str(method)
    what = f"bases quantized by {kind} are not supported (supported: {', '.join(known)})"
    raise UnsupportedError(f"{where}: config.json: {what}; use the 16-bit model")


_SETTINGS: dict[str, dict[str, tuple[str, ...]]] = {
    # Keys that can change what the quantized values mean, with the settings that do not.
    "compressed-tensors": {
        "format": (
            "float-quantized",
            "int-quantized",
            "naive-quantized",
            "pack-quantized",
            "dense",
            "nvfp4-pack-quantized",
            "mxfp4-pack-quantized",
            "mxfp8-quantized",
        ),
        "sparsity_config": ("dense",),
        "transform_config": (),
    },
    "modelopt": {"quant_algo": ("FP8", "FP8_PB_WO", "NVFP4")},
    "gptq": {"is_marlin_format": (), "rotation": ()},
}


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """Tensors and format in which a base stores one logical weight.

    Attributes
    ----------
    index
        Its position in file order.
    tensors
        The tensors on disk, by role.
    format
        The quantization format; None for a plain tensor.
    """

    index: int
    tensors: Tensors
    format: QuantizationFormat | None


@dataclass(frozen=True, eq=False)
class WeightView(Mapping[str, Weight]):
    """Logical weights by name: the base's in file order, then those added to them.

    Views made of others share the base's table, so several adapters on one base need only one.
    Looking up a weight raises `UnsupportedError` if its tensors have a dtype that cannot be computed with.

    Attributes
    ----------
    checkpoint
        The base's files.
    quantization
        The model's quantization config; {} for a plain base.
    stored
        The base's weights by name, in file order.
    owners
        For each tensor that is part of a quantized weight: the weight's name, and the tensor's role in it.
    replacements
        Tensors that replace the base's weights of the same names, written in the replaced weight's dtype, or add new ones.
    derived
        Weights under new names that are computed from others, such as one expert's matrix from the tensors that hold its rows.
    written
        The dtype in which quantized weights are written back; None if they stay quantized.
    casts
        The dtype in which a plain weight is written, if not its own, by name.
    """

    checkpoint: Checkpoint
    quantization: Mapping[str, Any]
    stored: Mapping[str, StoredWeight]
    owners: Mapping[str, tuple[str, str]]
    replacements: Tensors = field(default_factory=dict)
    derived: Mapping[str, Callable[[WeightView], Weight]] = field(default_factory=dict)
    written: torch.dtype | None = None
    casts: Mapping[str, torch.dtype] = field(default_factory=dict)

    def replaced(self, sources: Tensors) -> WeightView:
        """Replace some weights by tensors, or add tensors."""
        return replace(self, replacements={**self.replacements, **sources})

    def extended(self, derived: Mapping[str, Callable[[WeightView], Weight]]) -> WeightView:
        """Add weights that are computed from others."""
        return replace(self, derived={**self.derived, **derived})

    def __getitem__(self, name: str) -> Weight:
        if name in self.derived:
            return self.derived[name](self)
        if name not in self.replacements:
            return self._of_base(name)
        weight = Plain.of(self.replacements[name])
        replaced = self._of_base(name) if name in self.stored else weight
        return replace(weight, name=name, written=self.casts.get(name, replaced.written))

    def _of_base(self, name: str) -> Weight:
        stored = self.stored[name]
        if stored.format is None:
            plain = Plain.of(stored.tensors["weight"])
            return replace(plain, written=self.casts.get(name, plain.written))
        weight = stored.format.make(name, Parts(stored.tensors), self.quantization)
        return replace(weight, written=self.written)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a stored tensor, also of one of integers, which have no `Weight`."""
        is_own = name not in self.replacements and name not in self.derived
        if is_own and self.stored[name].format is None:
            return self.stored[name].tensors["weight"].info.shape
        return self[name].shape

    def __contains__(self, name: object) -> bool:
        return name in self.stored or name in self.replacements or name in self.derived

    def __iter__(self) -> Iterator[str]:
        return iter({**self.stored, **self.replacements, **self.derived})

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def quantized_names(self) -> frozenset[str]:
        """Return the names of the base's weights that are stored quantized."""
        return frozenset(name for name, _ in self.owners.values())

    def file_index(self, name: str) -> int:
        """Return a weight's position in file order; weights that the base does not hold come last."""
        if name in self.stored:
            return self.stored[name].index
        return len(self.stored) + list(self.replacements).index(name)

    def requantizes(self, name: str) -> bool:
        """Test whether merged values of this quantized weight are written back quantized."""
        stored = self.stored[name]
        if stored.format is None or name in self.replacements:
            return False
        return stored.format.requantizes and len(stored.tensors["weight"].info.shape) == 2


def open_weights(checkpoint: Checkpoint, config: ModelConfig) -> WeightView:
    """Group the tensors of a base into logical weights, using only names and dtypes.

    Parameters
    ----------
    config
        The model's config.

    Raises
    ------
    UnsupportedError
        If no format supports the quantization method that the config names.
    FormatError
        If two sets of tensors form the same weight.
    """
    quantization = config.quantization
    method = supported_method(quantization, f"{checkpoint.path}")
    formats = [format_ for format_ in FORMATS if method in format_.quant_methods]
    tensors = {
        t.name: StoredTensor(f, t) for f in checkpoint.files.values() for t in f.header.tensors
    }
    claimed = {}
    owners: dict[str, tuple[str, str]] = {}
    for name in tensors:
        for format_ in formats:
            claim = format_.claim(name, tensors)
            if claim is not None:
                claimed[name] = format_, *claim
                owners |= {tensor: (claim[0], role) for role, tensor in claim[1].items()}
                break
    stored: dict[str, StoredWeight] = {}
    for name, tensor in tensors.items():
        if name in claimed:
            format_, logical, roles = claimed[name]
            if logical in tensors and logical != name:
                raise FormatError(
                    f"{tensor.file.path}: tensors {name!r} and {logical!r} are the same weight; get the file again"
                )
            stored[logical] = StoredWeight(
                len(stored), {role: tensors[t] for role, t in roles.items()}, format_
            )
        elif name not in owners:
            stored[name] = StoredWeight(len(stored), {"weight": tensor}, None)
    return WeightView(checkpoint, quantization, stored, owners)


STALE = {"quantize_config.json", "quant_config.json", "hf_quant_config.json"}
"""Files that make some loaders treat a model as quantized."""

# Scales of activations and caches.
_ACTIVATION_SCALE = re.compile(
    r"(^|[._])(input|output|activation|[qkv]|kv)_(global_scale|scale|zero_point)(_ub)?$"
)

# Dtypes of quantized values. Integers count only with two or more dimensions; with one they are indices.
_QUANTIZED = re.compile(r"^(F8_|F6_|F4)")
_INTEGERS = {"I8", "U8", "I16", "U16", "I32", "U32"}

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def cast_weights(weights: WeightView, dtype: torch.dtype) -> WeightView:
    """Make plain weights be written in a dtype.

    A weight that is stored wider than most of the base's values keeps its dtype: models store in float32 what they need in float32.
    """
    infos = {
        name: stored.tensors["weight"].info
        for name, stored in weights.stored.items()
        if stored.format is None
    }
    floats = {
        name: info
        for name, info in infos.items()
        if info.dtype in FLOATS and not is_activation_scale(name, weights)
    }
    counts = Counter[str]()
    for info in floats.values():
        counts[info.dtype] += math.prod(info.shape)
    widest = max((FLOATS[usual].itemsize for usual, _ in counts.most_common(1)), default=0)
    dtypes = {name: FLOATS[info.dtype] for name, info in floats.items()}
    names = {name for name, own in dtypes.items() if own != dtype and own.itemsize <= widest}
    names |= {
        name
        for name, new in weights.replacements.items()
        if name not in weights.stored and new.info.dtype in FLOATS
    }
    return replace(weights, casts=dict.fromkeys(names, dtype), written=weights.written and dtype)


def plain_weights(weights: WeightView, config: ModelConfig) -> WeightView:
    """Make quantized weights be written as plain ones, in the dtype of the model's config or in bfloat16.

    Raises
    ------
    UnsupportedError
        If some quantized values have no known format.
    """
    infos = (info for file in weights.checkpoint.files.values() for info in file.header.tensors)
    for info in infos:
        name = info.name
        is_integers = info.dtype in _INTEGERS and len(info.shape) > 1
        if name in weights.owners or not (is_integers or _QUANTIZED.match(info.dtype)):
            continue
        if not is_activation_scale(name, weights):
            what = (
                f"tensor {name!r}: dtype {info.dtype} with no scale or table that could decode it"
            )
            raise UnsupportedError(f"{weights.checkpoint.path}: {what}; use the 16-bit model")
    # The config states a dtype as ``torch.float16`` or ``float16``.
    names = (str(value).removeprefix("torch.") for value in config.stated("dtype", "torch_dtype"))
    stated = next((_DTYPES[name] for name in names if name in _DTYPES), torch.bfloat16)
    return replace(weights, written=stated)


def plain_metadata(metadata: Mapping[str, str], weights: WeightView) -> dict[str, str]:
    """Remove what torchao states of each tensor from a file's metadata."""
    return {
        key: text for key, text in metadata.items() if key != "tensor_names" and key not in weights
    }


def is_activation_scale(name: str, weights: WeightView) -> bool:
    """Test whether a tensor scales a quantized model's activations or caches, and so has no use in a plain model."""
    return bool(weights.owners) and bool(_ACTIVATION_SCALE.search(name))
