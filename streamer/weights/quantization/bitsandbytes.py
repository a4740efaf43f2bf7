"""Decode bitsandbytes: 4-bit values with a scale for each block (NF4, FP4), and 8-bit values with a scale for each row.

Four bits: ``W = quant_map[q] · absmax[block]`` over the flattened matrix, two values in a byte, the first in the high bits. With double
quantization the scales are quantized too: ``absmax = nested_quant_map[q] · nested_absmax[block] + offset``. Eight bits:
``W = q · SCB[row] / 127``. Values are decoded in float32; the library itself then rounds to the dtype that the model had.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from streamer.errors import FormatError, UnsupportedError
from streamer.storage.strict_json import strict_json
from streamer.weights.base import QuantizedWeight, StoredTensor


@dataclass(frozen=True)
class FourBit(QuantizedWeight):
    """NF4 or FP4 values.

    Attributes
    ----------
    blocksize, nested_blocksize, offset
        Values from the quant_state; the last two apply only with double quantization.
    """

    blocksize: int
    nested_blocksize: int
    offset: float

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Self:
        """Check that the tensors fit together, and make the weight that they store."""
        where = f"{tensors['weight'].file.path}: tensor {name!r}"
        state = _state(tensors["state"], where)
        shape = state.get("shape")
        if not (isinstance(shape, list) and len(shape) == 2 and all(map(_is_count, shape))):
            raise UnsupportedError(f"{where}: bitsandbytes weights of shape {shape!r} are not supported")
        nested = "nested_absmax" in tensors
        blocksize, inner = _count(state, "blocksize", where), _count(state, "nested_blocksize", where) if nested else 1
        offset = state.get("nested_offset", 0.0)
        if isinstance(offset, bool) or not isinstance(offset, int | float):
            raise FormatError(f"{where}: its quant_state has offset {offset!r}; get the file again")
        count = math.prod(shape)
        blocks = -(-count // blocksize)
        wanted = {"weight": -(-count // 2), "absmax": blocks * (1 if nested else 4), "map": 64}
        if nested:
            wanted |= {"nested_absmax": -(-blocks // inner) * 4, "nested_map": 1024}
        for role, size in wanted.items():
            if role not in tensors:
                raise FormatError(f"{where}: its nested_quant_map is missing; get the file again")
            info, dtype = tensors[role].info, "U8" if nested and role == "absmax" else "F32"
            if info.nbytes != size or (role != "weight" and info.dtype != dtype):
                raise FormatError(
                    f"{where}: expected {size} bytes in {info.name!r}, found {info.nbytes} of {info.dtype}; get the file again"
                )
        kind = str(state.get("quant_type")).upper()
        return cls(name, tuple(shape), dict(tensors), kind, torch.float32, None, blocksize, inner, float(offset))

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``quant_map[q] · absmax``."""
        n = self.shape[1]
        a, b = i * n, j * n
        packed = self.tensors["weight"].bytes(a // 2, -(-b // 2))
        quantized = torch.stack([packed >> 4, packed & 15], 1).flatten()[a % 2 :][: b - a]
        values = self.tensors["map"].flat(0, 16)[quantized.int()]
        size, first = self.blocksize, a // self.blocksize
        scales = self._absmax(first, -(-b // size))
        head = min(-a % size, b - a)  # number of values before the first whole block
        values[:head] *= scales[0]
        whole = (b - a - head) // size
        at = 1 if a % size else 0
        values[head : head + whole * size].view(whole, size).mul_(scales[at : at + whole, None])
        if head + whole * size < b - a:
            values[head + whole * size :] *= scales[-1]
        return values.view(j - i, n)

    def _absmax(self, i: int, j: int) -> Tensor:
        """Decode the scales of blocks i to j, (j − i,) float32."""
        stored = self.tensors["absmax"]
        if "nested_absmax" not in self.tensors:
            return stored.flat(i, j)
        size = self.nested_blocksize
        values = self.tensors["nested_map"].flat(0, 256)[stored.flat(i, j).int()]
        outer = self.tensors["nested_absmax"].flat(i // size, -(-j // size))[torch.arange(i, j) // size - i // size]
        return values.mul_(outer).add_(self.offset)


@dataclass(frozen=True)
class EightBit(QuantizedWeight):
    """Int8 values with the largest magnitude of each row."""

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Self:
        """Check that the tensors fit together, and make the weight that they store."""
        weight, quant_scale = tensors["weight"].info, tensors["SCB"].info
        where = f"{tensors['weight'].file.path}: tensor {name!r}"
        if len(weight.shape) != 2 or quant_scale.dtype != "F32" or math.prod(quant_scale.shape) != weight.shape[0]:
            raise FormatError(
                f"{where}: expected a matrix and one F32 scale for each row, found {list(weight.shape)} and {quant_scale.dtype} "
                f"{list(quant_scale.shape)}; get the file again"
            )
        if "format" in tensors and bool(tensors["format"].bytes().any()):
            raise UnsupportedError(
                f"{where}: its weight_format is not 0 (rows); save the model again with bitsandbytes 0.45 or later"
            )
        return cls(name, weight.shape, dict(tensors), "INT8 (bitsandbytes)", torch.float32, None)

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``q · SCB / 127``, multiplying as the library does."""
        quant_scale = self.tensors["SCB"].flat(i, j)
        return self.tensors["weight"].rows(i, j).to(torch.float32).mul_(quant_scale[:, None]).mul_(7.874015718698502e-3)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 2**62


def _count(state: Mapping[str, Any], key: str, where: str) -> int:
    value = state.get(key)
    if not isinstance(value, int) or not _is_count(value):
        raise FormatError(f"{where}: its quant_state has {key} {value!r}; get the file again")
    return value


def _state(stored: StoredTensor, where: str) -> dict[str, Any]:
    """Parse the JSON, a few hundred bytes, that bitsandbytes keeps in a tensor."""
    if stored.info.nbytes > 1 << 16:
        raise FormatError(f"{where}: its quant_state has {stored.info.nbytes} bytes; get the file again")
    try:
        state = strict_json(stored.bytes().numpy().tobytes())
    except ValueError as e:
        raise FormatError(f"{where}: its quant_state is not JSON: {e}; get the file again") from None
    return state if isinstance(state, dict) else {}
