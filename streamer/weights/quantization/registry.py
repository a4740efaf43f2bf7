"""Register the formats of quantized weights: which tensors on disk form one weight, by name and dtype, and which class decodes them.

The model's ``quantization_config`` must name a method of some format. Looking up a tensor of quantized values that no format claims is
refused by name, so raw quantized values never reach a computation.

Decode what torchao stores in safetensors: FP8 e4m3, integers of 1 to 8 bits in bytes, and packed int4.

A weight is stored as ``<module>._weight_qdata``, ``<module>._weight_scale`` and others. The file's metadata states, under the weight's
name, the library's class of tensor, its block and the tensors that it consists of.

FP8 and integers in bytes: ``W = (q − zero) · scale`` in float32, by blocks as in `codes`. Packed int4 (plain layout): two values
from −8 to 7 in a byte, the first in the low bits; ``W = q · scale + zero``, with scales and zero points as (groups of inputs, outputs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from streamer.errors import FormatError, UnsupportedError
from streamer.storage.files import strict_json
from streamer.weights.base import QuantizedWeight, StoredTensor
from streamer.weights.quantization.codes import FP8, MXFP4, SCALE_DTYPES, PackedFP4, Scaled, check_fit
from streamer.weights.quantization.integers import (
    AWQ,
    GPTQ,
    HQQ,
    SETTINGS,
    UNSUPPORTED,
    EightBit,
    FourBit,
    PackedIntegers,
)

OPTIONAL = {"zeros": ("._weight_zero_point",)} | {
    part: (f"._weight_{part}",)
    for part in ("scale_and_zero", "per_tensor_scale", "act_pre_scale", "act_quant_scale", "act_quant_zero_point")
}
"""Roles of the tensors that some classes have, and their endings."""

_PARTS = {"qdata": "weight", "scale": "quant_scale", "zero_point": "zeros"} | {
    part: part
    for part in ("act_quant_scale", "act_quant_zero_point")  # only activations need them
}


def torchao_weight(name: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> QuantizedWeight:
    """Make the weight that these tensors store, by the class that the file's metadata states.

    Raises
    ------
    UnsupportedError
        If the class, or a tensor that it consists of, is not supported.
    FormatError
        If the metadata is missing or does not fit the tensors.
    """
    where = f"{tensors['weight'].file.path}: tensor {tensors['weight'].info.name!r}"
    kind, data, parts = _stated(name, tensors["weight"], where)
    unknown = [part for part in parts if part not in _PARTS]
    if kind not in _CLASSES or unknown:
        found = f"{kind} with {unknown[0]}" if unknown else kind
        raise UnsupportedError(f"{where}: torchao's {found} is not supported; use the 16-bit model")
    check_fit({_PARTS[part] for part in parts} == tensors.keys(), tensors, where)
    return _CLASSES[kind](name, tensors, data, where)


def _stated(name: str, stored: StoredTensor, where: str) -> tuple[str, dict[str, Any], list[str]]:
    """Read what the metadata states of a weight: its class, its attributes, and the tensors that it consists of."""
    try:
        match strict_json(stored.file.header.metadata[name].encode()):
            case {"_type": str(kind), "_data": dict(data), "_tensor_data_names": list(parts)} if all(
                isinstance(part, str) for part in parts
            ):
                return kind, data, parts
    except (KeyError, ValueError):
        pass
    raise FormatError(f"{where}: the file's metadata does not describe {name!r} as torchao does; get the file again")


def _blocks(
    cls: type[Scaled], name: str, tensors: Mapping[str, StoredTensor], data: dict[str, Any], where: str
) -> Scaled:
    """Make a weight with scales of blocks that divide its rows and columns, as the metadata states them."""
    codes, scale = (tensors[role].info for role in ("weight", "quant_scale"))
    check_fit(len(codes.shape) == 2 == len(scale.shape) and 0 not in scale.shape, tensors, where)
    block = [m // k for m, k in zip(codes.shape, scale.shape, strict=True)]
    fits = [k * b for k, b in zip(scale.shape, block, strict=True)] == [*codes.shape]
    check_fit(fits and data.get("block_size") == block and scale.dtype in SCALE_DTYPES, tensors, where)
    pair = {role: tensors[role] for role in ("weight", "quant_scale")}
    return replace(cls.of(name, pair, {"weight_block_size": block}), tensors=dict(tensors))


def _fp8(name: str, tensors: Mapping[str, StoredTensor], data: dict[str, Any], where: str) -> Scaled:
    check_fit(tensors["weight"].info.dtype == "F8_E4M3", tensors, where)
    return _blocks(FP8, name, tensors, data, where)


def _integers(name: str, tensors: Mapping[str, StoredTensor], data: dict[str, Any], where: str) -> Scaled:
    zeros = tensors.get("zeros", tensors["weight"]).info
    if zeros.dtype in SCALE_DTYPES:
        raise UnsupportedError(
            f"{where}: torchao's zero points in {zeros.dtype} are not supported; use the 16-bit model"
        )
    fits = tensors["weight"].info.dtype == zeros.dtype == "I8"
    check_fit(fits and ("zeros" not in tensors or zeros.shape == tensors["quant_scale"].info.shape), tensors, where)
    match data.get("target_dtype", {"_data": "int8"}):
        case {"_data": str(stated)}:
            return replace(_blocks(ShiftedIntegers, name, tensors, data, where), label=f"{stated.upper()} (torchao)")
    raise FormatError(f"{where}: the file's metadata does not state the integers' type; get the file again")


@dataclass(frozen=True)
class ShiftedIntegers(Scaled):
    """Integers in bytes, with a scale and a zero point for each block."""

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``(q − zero) · scale``."""
        values, grid = self.tensors["weight"].rows(i, j).to(torch.float32), self.grid()
        if "zeros" in self.tensors:
            zeros = self.tensors["zeros"].whole().to(torch.float32)
            self.by_block(values, zeros, i, torch.Tensor.sub_)
        return self.by_block(values, grid, i, torch.Tensor.mul_)


@dataclass(frozen=True)
class PackedInt4(QuantizedWeight):
    """Four-bit integers along the inputs, two in a byte."""

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, StoredTensor], data: dict[str, Any], where: str) -> Self:
        """Check that the tensors fit together and to the metadata, and make the weight that they store."""
        packed = tensors["weight"].info
        fits = {"quant_scale", "zeros"} <= tensors.keys() and packed.dtype == "I8" and len(packed.shape) == 2
        check_fit(fits, tensors, where)
        (m, half), scale = packed.shape, tensors["quant_scale"].info
        check_fit(len(scale.shape) == 2 and scale.shape[1] == m and scale.shape[0] > 0 and half > 0, tensors, where)
        size = 2 * half // scale.shape[0]
        fits = data.get("shape") == [m, 2 * half] and data.get("block_size") == [1, size]
        fits &= (tensors["zeros"].info.dtype, tensors["zeros"].info.shape) == (scale.dtype, scale.shape)
        check_fit(fits and scale.dtype in SCALE_DTYPES and size * scale.shape[0] == 2 * half, tensors, where)
        return cls(name, (m, 2 * half), dict(tensors), "INT4 (torchao)", torch.float32, None)

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``q · scale + zero``."""
        scale, zero = (
            self.tensors[role].whole()[:, i:j].T.to(torch.float32)[..., None] for role in ("quant_scale", "zeros")
        )
        packed = self.tensors["weight"].rows(i, j)
        values = torch.stack([packed << 4 >> 4, packed >> 4], -1).to(torch.float32)
        return values.view(j - i, scale.shape[1], -1).mul_(scale).add_(zero).flatten(1)


_CLASSES = {
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
    quant_methods: frozenset[str | None]
    values: tuple[str, tuple[str, ...], str]
    companion_suffixes: Mapping[str, tuple[str, ...]]
    make: Callable[[str, Mapping[str, StoredTensor], Mapping[str, Any]], QuantizedWeight]
    optional: Mapping[str, tuple[str, ...]] | None = None
    requantizes: bool = False

    def claim(self, tensor: str, tensors: Mapping[str, StoredTensor]) -> tuple[str, dict[str, str]] | None:
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
        for role, endings in {**self.companion_suffixes, **(self.optional or {})}.items():
            found = next((stem + e for e in endings if stem + e in tensors), None)
            if found is not None:
                roles[role] = found
            elif role in self.companion_suffixes:
                return None
        return stem + instead, roles


FORMATS: tuple[QuantizationFormat, ...] = (
    QuantizationFormat("FP8 e4m3: scale of a block, a row or the tensor; MXFP8", "`weight`, `weight_scale_inv` or `weight_scale`",
          frozenset({None, "fp8", "mxfp8", "fbgemm_fp8", "compressed-tensors", "modelopt"}), ("", ("F8_E4M3",), ""),
          {"quant_scale": ("_scale_inv", "_scale")}, FP8.of, {"zeros": ("_zero_point",)}, requantizes=True),
    QuantizationFormat("bitsandbytes NF4 and FP4, double quantization too", "`weight`, `.absmax`, `.quant_map`, `.quant_state.*`",
          frozenset({None, "bitsandbytes"}), ("", (), ""),
          {"absmax": (".absmax",), "map": (".quant_map",),
           "state": (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")}, FourBit.of,
          {"nested_absmax": (".nested_absmax",), "nested_map": (".nested_quant_map",)}),
    QuantizationFormat("bitsandbytes int8", "`weight`, `SCB`",
          frozenset({None, "bitsandbytes"}), (".weight", ("I8",), ".weight"),
          {"SCB": (".SCB",)}, EightBit.of, {"format": (".weight_format",)}),
    QuantizationFormat("GPTQ, 2, 3, 4 and 8 bits, both formats", "`qweight`, `qzeros`, `scales`, `g_idx`",
          frozenset({"gptq"}), (".qweight", (), ".weight"),
          {"zeros": (".qzeros",), "scales": (".scales",)}, GPTQ.of, {"groups": (".g_idx",)}),
    QuantizationFormat("AWQ, 4 bits (gemm)", "`qweight`, `qzeros`, `scales`",
          frozenset({"awq"}), (".qweight", (), ".weight"),
          {"zeros": (".qzeros",), "scales": (".scales",)}, AWQ.of),
    QuantizationFormat("compressed-tensors int8", "`weight`, `weight_scale`",
          frozenset({"compressed-tensors"}), (".weight", ("I8",), ".weight"),
          {"quant_scale": (".weight_scale",)}, Scaled.of, {"zeros": (".weight_zero_point",)}),
    QuantizationFormat("compressed-tensors packed integers", "`weight_packed`, `weight_scale`, `weight_shape`",
          frozenset({"compressed-tensors"}), (".weight_packed", (), ".weight"),
          {"scales": (".weight_scale",), "shape": (".weight_shape",)}, PackedIntegers.of,
          {"zeros": (".weight_zero_point",), "groups": (".weight_g_idx",)}),
    QuantizationFormat("compressed-tensors NVFP4 and MXFP4", "`weight_packed`, `weight_scale`, `weight_global_scale` (NVFP4)",
          frozenset({"compressed-tensors"}), (".weight_packed", ("U8",), ".weight"),
          {"scales": (".weight_scale",)}, PackedFP4.of,
          {"divisor": (".weight_global_scale",), "extra": (".weight_zero_point", ".weight_g_idx")}),
    QuantizationFormat("ModelOpt NVFP4, stated in `config.json` or `hf_quant_config.json`", "`weight`, `weight_scale`, `weight_scale_2`",
          frozenset({"modelopt"}), (".weight", ("U8",), ".weight"),
          {"scales": (".weight_scale",), "factor": (".weight_scale_2",)}, PackedFP4.of, {"extra": (".pre_quant_scale",)}),
    QuantizationFormat("torchao FP8 e4m3: scale of a block, a row or the tensor", "`_weight_qdata`, `_weight_scale`",
          frozenset({"torchao"}), ("._weight_qdata", ("F8_E4M3",), ".weight"),
          {"quant_scale": ("._weight_scale",)}, torchao_weight, OPTIONAL, requantizes=True),
    QuantizationFormat("torchao int8 and fewer bits in bytes, int4 (plain)", "`_weight_qdata`, `_weight_scale`, `_weight_zero_point`",
          frozenset({"torchao"}), ("._weight_qdata", (), ".weight"),
          {}, torchao_weight, {"quant_scale": ("._weight_scale",), **OPTIONAL}),
    QuantizationFormat("HQQ, 1 to 8 bits, both axes", "`W_q`, `scale`, `zero`, `shape` and settings",
          frozenset({None, "hqq"}), (".W_q", (), ".weight"),
          {}, HQQ.of, {role: (f".{role}",) for role in ("scale", "zero", "shape", *SETTINGS, *UNSUPPORTED)}),
    QuantizationFormat("MXFP4 expert stacks", "`*_blocks`, `*_scales`",
          frozenset({None, "mxfp4"}), ("_blocks", ("U8",), ""),
          {"scales": ("_scales",)}, MXFP4.of),
)  # fmt: skip
"""Formats of quantized weights. To add one, add an entry here and its class in a module of this folder."""


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
    known = sorted({m for one in FORMATS for m in one.quant_methods if m is not None})
    if method in known:
        for key, good in _VARIANTS.get(str(method), {}).items():
            value = quantization.get(key)
            value = value.get("format", value) if isinstance(value, dict) else value
            if value and value not in good:
                kind += f" with {key}={value!r}" if isinstance(value, str | int) else f" with {key}"
                break
        else:
            return str(method)
    raise UnsupportedError(
        f"{where}: config.json: bases quantized by {kind} are not supported (supported: {', '.join(known)}); use the 16-bit model"
    )


_VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    # Keys that can change what the quantized values mean, with the settings that do not.
    "compressed-tensors": {
        "format": ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "dense", "nvfp4-pack-quantized",
                   "mxfp4-pack-quantized", "mxfp8-quantized"),
        "sparsity_config": ("dense",),
        "transform_config": (),
    },
    "modelopt": {"quant_algo": ("FP8", "FP8_PB_WO", "NVFP4")},
    "gptq": {"is_marlin_format": (), "rotation": ()},
}  # fmt: skip
