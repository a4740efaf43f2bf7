"""Decode the integers of AWQ, GPTQ, compressed-tensors, HQQ and bitsandbytes.

Decode AWQ (gemm): 4-bit integers in 32-bit words, with a scale and a zero point for each group of inputs and each output.

``W[out, in] = (q[in, out] − zero[g, out]) · scale[g, out]``, where g is the group of the input; stored transposed, inputs first. Values and
zero points are packed along the outputs, eight to a word, in the order of `AWQ_ORDER`.

Decode GPTQ: integers of 2, 3, 4 or 8 bits in 32-bit words, with a scale and a zero point for each group of inputs and each output.

``W[out, in] = (q[in, out] − zero[g, out]) · scale[g, out]``, where g is the group of the input; stored transposed, inputs first. Values are
packed along the inputs and zero points along the outputs, as in `codes`. The first version of the format stores zero points less one.
GPTQModel subtracts a one from each by a subtraction of whole words: a zero point of 0 borrows from the next, which only the addition of
the same words undoes. Zero points of 3 bits, some of which lie in two words, wrap around instead.

The config's ``dynamic`` holds rules for single modules, which GPTQModel, vLLM and SGLang read in the same way: the first regular expression
that matches a module's name from its start applies. They take the format from the config alone, whatever a rule says.

Decode compressed-tensors' packed integers: 1 to 8 bits in 32-bit words, with a scale for each output and each group of inputs.

``W[out, in] = (q[out, in] − zero[out, g]) · scale[out, g]``, where g is the group of the input. Values are packed along the inputs and zero
points along the outputs, as in `codes`; without stored zero points, the zero point is half of the range. `codes` decodes the
library's int8 and FP8 formats.

Decode HQQ: integers of 1 to 8 bits, with a scale and a zero point for each group of the flattened matrix.

``W = (q − zero) · scale``, in the dtype of the scales and rounded after each operation, as the library does. The values form a table: with
axis 1 each row is a group, with axis 0 each column. A packed row holds as many rows of the table as fit its words: of k packed rows, the
first holds rows 0, k, 2k, …, with row 0 in the highest bits. The shapes tell the axis, the group size and the packing, so that only
``shape`` is read when a layer is opened. The library's decoder follows the settings instead: a layer is refused if these contradict its
shapes.

Decode bitsandbytes: 4-bit values with a scale for each block (NF4, FP4), and 8-bit values with a scale for each row.

Four bits: ``W = quant_map[q] · absmax[block]`` over the flattened matrix, two values in a byte, the first in the high bits. With double
quantization the scales are quantized too: ``absmax = nested_quant_map[q] · nested_absmax[block] + offset``. Eight bits:
``W = q · SCB[row] / 127``. Values are decoded in float32; the library itself then rounds to the dtype that the model had.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Self, TypeGuard

import torch
from torch import Tensor

from streamer.errors import FormatError, UnsupportedError
from streamer.storage.files import strict_json
from streamer.storage.header import TensorInfo
from streamer.units import listed
from streamer.weights.base import TORCH_DTYPES, QuantizedWeight, StoredTensor
from streamer.weights.quantization import codes
from streamer.weights.quantization.codes import SCALE_DTYPES, check_fit, stated_weights

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Index of the four bits that hold each of a word's eight outputs: output 1 is in bits 16 to 19."""


@dataclass(frozen=True)
class AWQ(QuantizedWeight):
    """Four-bit values, packed along the outputs.

    Attributes
    ----------
    group_size
        Inputs in a group.
    """

    group_size: int

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Self:
        """Check that the tensors fit together, and make the weight that they store."""
        where = f"{tensors['weight'].file.path}: tensor {tensors['weight'].info.name!r}"
        stated = config.get("version") or config.get("format") or "gemm"
        if str(stated).lower() != "gemm" or config.get("bits", 4) != 4 or config.get("zero_point", True) is not True:
            raise UnsupportedError(
                f"{where}: AWQ is supported with 4 bits, zero points and version gemm, found bits={config.get('bits')!r}, "
                f"zero_point={config.get('zero_point')!r}, version={stated!r}"
            )
        weight, scales, zeros = (tensors[role].info.shape for role in ("weight", "scales", "zeros"))
        inputs = weight[0] if weight else 0
        size = codes.group_size(config, inputs)
        groups = -(-inputs // size)
        fits = len(weight) == 2 and scales == (groups, 8 * weight[1]) and zeros == (groups, weight[1])
        codes.check_fit(fits and codes.has_packed_dtypes(tensors), tensors, where)
        return cls(name, (8 * weight[1], inputs), dict(tensors), "AWQ 4 bits", torch.float32, None, size)

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``(q − zero) · scale``, transposed."""
        first, last = i // 8, -(-j // 8)
        shifts = torch.tensor(AWQ_ORDER, dtype=torch.int32) * 4

        def unpacked(role: str) -> Tensor:
            words = self.tensors[role].whole()[:, first:last]
            return ((words[..., None] >> shifts) & 15).flatten(1)[:, i - 8 * first : j - 8 * first]

        group = torch.arange(self.shape[1]) // self.group_size
        scales = self.tensors["scales"].whole()[:, i:j]
        return codes.dequantize_groups(unpacked("weight"), unpacked("zeros"), scales, group)


@dataclass(frozen=True)
class GPTQ(QuantizedWeight):
    """Quantized values packed along the inputs.

    Attributes
    ----------
    bits
        2, 3, 4 or 8.
    group_size
        Inputs in a group, if no ``g_idx`` assigns each input to a group.
    less_one
        Whether zero points are said to be stored less one.
    symmetric
        Whether all of them are said to be half of the range.
    """

    bits: int
    group_size: int
    less_one: bool
    symmetric: bool

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Self:
        """Check that the tensors fit together, and make the weight that they store."""
        where = f"{tensors['weight'].file.path}: tensor {tensors['weight'].info.name!r}"
        # transformers prefers the first key, GPTQModel the second, and vLLM reads only the first.
        stated = {key: str(config[key]).lower() for key in ("checkpoint_format", "format") if config.get(key)}
        formats = {*stated.values()} or {"gptq"}
        if formats not in ({"gptq"}, {"gptq_v2"}):
            found = ", ".join(f"{key}={value!r}" for key, value in stated.items())
            raise UnsupportedError(f"{where}: format must be gptq or gptq_v2, found {found}; use the 16-bit model")
        weight, scales, zeros = (tensors[role].info.shape for role in ("weight", "scales", "zeros"))
        config = {**config, **_rule(config, name.removesuffix(".weight"), where)}
        bits = config.get("bits")
        codes.check_fit(len(weight) == len(scales) == len(zeros) == 2, tensors, where)
        if "groups" in tensors and weight[0]:  # its length is the number of inputs, which gives the bits
            bits = weight[0] * 32 // max(1, math.prod(tensors["groups"].info.shape))
        if bits not in (2, 3, 4, 8):
            raise UnsupportedError(f"{where}: GPTQ with {bits!r} bits is not supported")
        inputs, outputs = weight[0] * 32 // bits, weight[1]
        size = codes.group_size(config, inputs)
        groups = scales[0] if "groups" in tensors else -(-inputs // size)
        fits = scales == (groups, outputs) and zeros == (groups, -(-outputs * bits // 32))
        fits &= weight[0] == -(-inputs * bits // 32) and codes.has_packed_dtypes(tensors)
        if "groups" in tensors:
            fits &= tensors["groups"].info.shape == (inputs,) and tensors["groups"].info.dtype == "I32"
        codes.check_fit(fits, tensors, where)
        label, less_one, symmetric = f"GPTQ {bits} bits", formats == {"gptq"}, config.get("sym") is True
        return cls(name, (outputs, inputs), dict(tensors), label, torch.float32, None, bits, size, less_one, symmetric)

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``(q − zero) · scale``, transposed."""
        values = codes.unpack(self.tensors["weight"].whole()[:, i:j], self.bits, 0, self.shape[1])
        zeros = self._zeros(i, j)
        if "groups" in self.tensors:
            group = codes.group_indices(self.tensors["groups"], self.tensors["scales"].info.shape[0])
        else:
            group = torch.arange(self.shape[1]) // self.group_size
        return codes.dequantize_groups(values, zeros, self.tensors["scales"].whole()[:, i:j], group)

    def _zeros(self, i: int, j: int) -> Tensor:
        """Unpack the zero points of outputs i to j: (groups, j − i)."""
        words, bits = self.tensors["zeros"].whole(), self.bits
        if self.symmetric:
            return torch.full((len(words), j - i), self._half, dtype=torch.int32)
        if self.less_one and bits != 3:
            words = words + sum(1 << at for at in range(0, 32, bits))  # int32 sums wrap around
        zeros = codes.unpack(words.T, bits, i, j).T
        return (zeros + 1) & 7 if self.less_one and bits == 3 else zeros

    @cached_property
    def _half(self) -> int:
        """Half of the range, which kernels for symmetric codes take without a look at the zero points.

        Some models of GPTQModel 5 store these as they are and state "gptq", such as Qwen3.5-27B-GPTQ-Int4 (vLLM's pull request 38966).

        Raises
        ------
        UnsupportedError
            If the stored ones are others, so that kernels differ.
        """
        half = 1 << (self.bits - 1)
        stored = set(codes.unpack(self.tensors["zeros"].whole().T, self.bits, 0, self.shape[0]).flatten().tolist())
        if len(stored) > 1 or not stored <= {half, half - self.less_one}:
            where = f"{self.where}: {self.name!r}"
            raise UnsupportedError(f"{where}: its zero points are not those of sym=true; use the 16-bit model")
        return half


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern[2:] if pattern.startswith(("-:", "+:")) else pattern)


def _rule(config: Mapping[str, Any], module: str, where: str) -> dict[str, Any]:
    """Read the settings that the first matching rule of ``dynamic`` gives a module."""
    try:
        rules = (config.get("dynamic") or {}).items()
        none: tuple[str, dict[str, Any]] = ("", {})
        pattern, rule = next(((p, r) for p, r in rules if _expression(p).match(module)), none)
        settings = {key: rule[key] for key in ("bits", "group_size", "sym") if key in rule}
    except (AttributeError, TypeError, OverflowError, RecursionError, re.error):
        raise FormatError(f'{where}: cannot read "dynamic" in the quantization config; get config.json again') from None
    if pattern.startswith("-:"):
        raise UnsupportedError(f'{where}: a rule in "dynamic" says that it is not quantized; use the 16-bit model')
    return settings


@dataclass(frozen=True)
class PackedIntegers(QuantizedWeight):
    """Integers in 32-bit words, which compressed-tensors calls pack-quantized.

    Attributes
    ----------
    bits
        1 to 8.
    """

    bits: int

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Self:
        """Check that the tensors fit together, and make the weight that they store."""
        where = f"{tensors['weight'].file.path}: tensor {tensors['weight'].info.name!r}"
        words, scales, stated = (tensors[role].info for role in ("weight", "scales", "shape"))
        readable = stated.dtype in ("I64", "I32") and stated.shape == (2,)
        shape = tuple(tensors["shape"].whole().tolist()) if readable else ()
        if len(words.shape) != 2 or len(shape) != 2 or shape[0] != words.shape[0] or shape[1] < 1:
            raise UnsupportedError(f"{where}: packed weights of shape {list(words.shape)} are not supported")
        m, n = shape
        known = {b for w in stated_weights(config) if type(b := w.get("num_bits")) is int and 0 < b <= 8}
        if old := [b for b in known if 32 % b and n > 32 // b and -(-n // (32 // b)) == words.shape[1]]:
            raise UnsupportedError(
                f"{where}: no value of its {listed(old)} bits seems to cross a word, as in compressed-tensors up to 0.10, which is not "
                "supported; quantize again with a newer version, or use the 16-bit model"
            )
        fitting = [b for b in known or range(1, 9) if -(-n * b // 32) == words.shape[1]]
        fits = words.dtype == "I32" and len(fitting) == 1 and len(scales.shape) == 2 and scales.shape[0] == m
        codes.check_fit(fits, tensors, where)
        bits, groups = fitting[0], scales.shape[1]
        fits = scales.dtype in codes.SCALE_DTYPES and 0 < groups <= n
        if "zeros" in tensors:
            fits &= tensors["zeros"].info.dtype == "I32" and tensors["zeros"].info.shape == (-(-m * bits // 32), groups)
        if "groups" in tensors:
            fits &= tensors["groups"].info.dtype == "I32" and tensors["groups"].info.shape == (n,)
        codes.check_fit(fits, tensors, where)
        return cls(name, (m, n), dict(tensors), f"INT{bits} (compressed-tensors)", torch.float32, None, bits)

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``(q − zero) · scale``."""
        n, scales = self.shape[1], self.tensors["scales"].rows(i, j).to(torch.float32)
        values = codes.unpack(self.tensors["weight"].rows(i, j).T, self.bits, 0, n).T
        count = scales.shape[1]
        group, stated = torch.arange(n) // -(-n // count), self.tensors.get("groups")
        if stated is not None and not bool((stated.whole() < 0).any()):  # −1 marks an unused g_idx
            group = codes.group_indices(stated, count)
        stored = self.tensors.get("zeros")
        zeros = codes.unpack(stored.whole(), self.bits, i, j)[:, group] if stored else 1 << (self.bits - 1)
        return values.sub(zeros).to(torch.float32).mul_(scales[:, group])


SETTINGS = ("packing", "compute_dtype", "axis", "group_size", "view_as_float", "channel_wise", "quant_zero", "quant_scale", "nbits",
            "unpack_view_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "optimize", "round_zero")  # fmt: skip
"""Names of the tensors that hold a layer's settings."""

UNSUPPORTED = ("zero_q", "scale_q", "zero_scale")
"""Names of quantized zero points and scales, and of both in one tensor."""

_PACKINGS = (("U8", 8, 1), ("U8", 4, 2), ("I32", 3, 10), ("U8", 2, 4), ("U8", 1, 8))
"""Dtype of the words, bits of a value, values in a word."""


@dataclass(frozen=True)
class HQQ(QuantizedWeight):
    """Packed integers and their groups.

    Attributes
    ----------
    table
        Rows and columns of the values' table.
    bits, count
        Bits of a value, and values in a word.
    """

    table: tuple[int, int]
    bits: int
    count: int

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Self:
        """Check that the tensors fit together, and make the weight that they store."""
        where = f"{tensors['weight'].file.path}: tensor {tensors['weight'].info.name!r}"
        if unsupported := [role for role in UNSUPPORTED if role in tensors]:
            raise UnsupportedError(f"{where}: HQQ with {unsupported[0]!r} is not supported; use the 16-bit model")
        missing = [role for role in ("scale", "zero", "shape", "packing") if role not in tensors]
        if missing:
            raise FormatError(f"{where}: {missing[0]!r} of its HQQ layer is missing; get the file again")
        parts = {role: tensors[role] for role in ("weight", "scale", "zero", "shape")}
        packed, scale, zero, stated = (stored.info for stored in parts.values())
        fits = (stated.dtype, stated.shape) == ("I64", (2,)) and scale.dtype in SCALE_DTYPES
        fits &= (scale.dtype, scale.shape) == (zero.dtype, zero.shape)
        check_fit(fits and len(scale.shape) == 2 and min(scale.shape) == 1, parts, where)
        (m, n), groups = tensors["shape"].whole().tolist(), max(scale.shape)
        check_fit(m > 0 and n > 0 and m * n % groups == 0, parts, where)
        table = (groups, m * n // groups) if scale.shape[1] == 1 else (m * n // groups, groups)
        fitting = [packing for packing in _PACKINGS if _holds(packed, table, *packing)]
        check_fit(len(fitting) == 1, parts, where)
        dtype, bits, count = fitting[0]
        info = replace(packed, dtype=dtype, shape=(-(-table[0] // count), table[1]))
        stored = {**tensors, "weight": replace(tensors["weight"], info=info)}
        return cls(name, (m, n), stored, f"HQQ {bits} bits", torch.float32, None, table, bits, count)

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``(q − zero) · scale``.

        Raises
        ------
        FormatError
            If a setting contradicts the shapes.
        """
        self._check_settings()
        n, (rows, columns) = self.shape[1], self.table
        first, last = i * n // columns, -(-j * n // columns)
        # A column for groups in rows, else one row.
        parts = (self.tensors[role] for role in ("zero", "scale"))
        zero, scale = (part.whole() if part.info.shape[0] == 1 else part.rows(first, last) for part in parts)
        at, packed = torch.arange(first, last), -(-rows // self.count)
        words = self.tensors["weight"].whole()[at % packed]
        shift = (self.count - 1 - at // packed).mul_(self.bits).to(words.dtype)
        values = words.bitwise_right_shift_(shift[:, None]).bitwise_and_((1 << self.bits) - 1).to(scale.dtype)
        start = i * n - first * columns
        return values.sub_(zero).mul_(scale).to(torch.float32).flatten()[start : start + (j - i) * n].view(j - i, n)

    def _check_settings(self) -> None:
        axis = int(self.tensors["scale"].info.shape[1] == 1)
        packing = f"{self.bits}bit_{'32' if self.bits == 3 else 'u8'}"
        for role, expected in {"packing": packing, "axis": axis, "group_size": self.table[axis]}.items():
            if (stored := self.tensors.get(role)) is not None:
                raw = bytes(stored.bytes(0, min(stored.info.nbytes, 16)).tolist())
                found = raw.decode("latin-1") if role == "packing" else int.from_bytes(raw, "little")
                if found != expected:
                    raise FormatError(
                        f"{self.where}: tensor {stored.info.name!r}: expected {expected!r} by the shapes of its HQQ layer, "
                        f"found {found!r}; get the file again"
                    )


def _holds(packed: TensorInfo, table: tuple[int, int], dtype: str, bits: int, count: int) -> bool:
    """Test whether a tensor holds a table in these words; the library may view them as floating-point values."""
    rows = -(-table[0] // count)
    whole = bits == 3 or rows * count == table[0]
    size = rows * table[1] * TORCH_DTYPES[dtype].itemsize
    return whole and (packed.shape[:1], packed.nbytes) == ((rows,), size) and packed.dtype in (dtype, *SCALE_DTYPES)


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
        blocksize, inner = state.get("blocksize"), state.get("nested_blocksize") if nested else 1
        offset = state.get("nested_offset", 0.0)
        if not (_is_count(blocksize) and _is_count(inner) and type(offset) in (int, float)):
            found = f"blocksize {blocksize!r}, nested_blocksize {inner!r} and offset {offset!r}"
            raise FormatError(f"{where}: its quant_state has {found}; get the file again")
        count = math.prod(shape)
        blocks = -(-count // blocksize)
        wanted = {"weight": -(-count // 2), "absmax": blocks * (1 if nested else 4), "map": 64}
        if nested:
            wanted |= {"nested_absmax": -(-blocks // inner) * 4, "nested_map": 1024}
        check_fit(wanted.keys() <= tensors.keys(), tensors, where)
        for role, size in wanted.items():
            info, dtype = tensors[role].info, "U8" if nested and role == "absmax" else "F32"
            check_fit(info.nbytes == size and (role == "weight" or info.dtype == dtype), tensors, where)
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
        fits = len(weight.shape) == 2 and quant_scale.dtype == "F32" and math.prod(quant_scale.shape) == weight.shape[0]
        check_fit(fits, tensors, where)
        if "format" in tensors and bool(tensors["format"].bytes().any()):
            raise UnsupportedError(
                f"{where}: its weight_format is not 0 (rows); save the model again with bitsandbytes 0.45 or later"
            )
        return cls(name, weight.shape, dict(tensors), "INT8 (bitsandbytes)", torch.float32, None)

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``q · SCB / 127``, multiplying as the library does."""
        quant_scale = self.tensors["SCB"].flat(i, j)
        return self.tensors["weight"].rows(i, j).to(torch.float32).mul_(quant_scale[:, None]).mul_(7.874015718698502e-3)


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 < value < 2**62


def _state(stored: StoredTensor, where: str) -> dict[str, Any]:
    """Parse the JSON, a few hundred bytes, that bitsandbytes keeps in a tensor."""
    if stored.info.nbytes > 1 << 16:
        raise FormatError(f"{where}: its quant_state has {stored.info.nbytes} bytes; get the file again")
    try:
        state = strict_json(stored.bytes().numpy().tobytes())
    except ValueError as e:
        raise FormatError(f"{where}: its quant_state is not JSON: {e}; get the file again") from None
    return state if isinstance(state, dict) else {}
