"""Decode what torchao stores in safetensors: FP8 e4m3, integers of 1 to 8 bits in bytes, and packed int4.

A weight is stored as ``<module>._weight_qdata``, ``<module>._weight_scale`` and others. The file's metadata states, under the weight's
name, the library's class of tensor, its block and the tensors that it consists of.

FP8 and integers in bytes: ``W = (q − zero) · scale`` in float32, by blocks as in `scaled_codes`. Packed int4 (plain layout): two values
from −8 to 7 in a byte, the first in the low bits; ``W = q · scale + zero``, with scales and zero points as (groups of inputs, outputs).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from streamer.errors import FormatError, UnsupportedError
from streamer.storage.strict_json import strict_json
from streamer.weights.base import QuantizedWeight, StoredTensor
from streamer.weights.quantization.fp8 import FP8
from streamer.weights.quantization.packing import SCALE_DTYPES, check_fit
from streamer.weights.quantization.scaled_codes import Scaled

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
    fits = [k * b for k, b in zip(scale.shape, block, strict=True)] == [*codes.shape] and data.get(
        "block_size"
    ) == block
    check_fit(fits and scale.dtype in SCALE_DTYPES, tensors, where)
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
        check_fit(
            {"quant_scale", "zeros"} <= tensors.keys() and packed.dtype == "I8" and len(packed.shape) == 2,
            tensors,
            where,
        )
        (m, half), scale = packed.shape, tensors["quant_scale"].info
        check_fit(len(scale.shape) == 2 and scale.shape[1] == m and scale.shape[0] > 0 and half > 0, tensors, where)
        size = 2 * half // scale.shape[0]
        fits = (
            data.get("shape") == [m, 2 * half] and data.get("block_size") == [1, size] and scale.dtype in SCALE_DTYPES
        )
        fits &= (tensors["zeros"].info.dtype, tensors["zeros"].info.shape) == (scale.dtype, scale.shape)
        check_fit(fits and size * scale.shape[0] == 2 * half, tensors, where)
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
