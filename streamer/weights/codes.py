"""Decoders of quantized weights: one class for each way to store them, with its formula.

`Scaled`: one scale for each tensor, row (channel), or block of rows and columns, as in FP8 e4m3 and int8. `PackedFP4` and `MXFP4`: FP4
(e2m1), two values in a byte, the first in the low bits. `AWQ`, `GPTQ`, `PackedIntegers` (compressed-tensors) and `HQQ`: integers with
scales and zero points for groups. `FourBit` and `EightBit`: bitsandbytes, decoded in float32; the library itself then rounds to the dtype
that the model had.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self, TypeGuard

import numpy as np
import torch
from torch import Tensor

from streamer.errors import FormatError, NumericError, UnsupportedError
from streamer.linalg.operators import all_finite
from streamer.linalg.rounding import Grid
from streamer.storage.files import strict_json
from streamer.storage.header import TensorInfo
from streamer.units import listed
from streamer.weights.base import TORCH_DTYPES, QuantizedWeight, StoredTensor, TensorShape

NOT_FINITE = "the result holds NaN or Inf; check the adapter's scale and lambda"

Config = Mapping[str, Any]
"""A model's ``quantization_config``."""

SCALE_DTYPES = ("F16", "BF16", "F32")
"""Dtypes of scales; the product of a value and a 16-bit scale is exact in float32."""


def unpack(words: Tensor, bits: int, i: int, j: int) -> Tensor:
    """Unpack values i to j from bit streams down the columns of (k, c) int32 words, lowest bits first; returns (j − i, c) int32.

    With 3 bits, value 10 occupies bits 30 and 31 of the first word and bit 0 of the second.
    """
    at = torch.arange(i, j) * bits
    word = at // 32
    shift = (at % 32).to(torch.int32)
    values = words[word] >> shift[:, None]
    split = torch.nonzero(shift + bits > 32).flatten()  # these values continue in the next word
    if len(split):
        low = 32 - shift[split, None]
        values[split] = (values[split] & ((1 << low) - 1)) | (words[word[split] + 1] << low)
    return values.bitwise_and_((1 << bits) - 1)


def dequantize_groups(values: Tensor, zeros: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    """Compute ``(values − zeros[group]) · scales[group]`` in float32, transposed and contiguous.

    Parameters
    ----------
    values
        (in, out) int32.
    zeros, scales
        (groups, out).
    group
        (in,) group of each input.
    """
    out = values.sub(zeros[group]).to(torch.float32).mul_(scales.to(torch.float32)[group])
    return out.T.contiguous()


def group_size(config: Config, inputs: int) -> int:
    """Read the number of inputs in a group from a quantization config: 128 by default, all inputs for −1."""
    size = config.get("group_size", config.get("q_group_size", 128))
    return size if type(size) is int and size > 0 else max(1, inputs)


def group_indices(stored: StoredTensor, count: int) -> Tensor:
    """Read the group of each input from ``g_idx``.

    Raises
    ------
    FormatError
        If it names a group beyond the `count` groups that have scales.
    """
    group = stored.whole()
    if bool(((group < 0) | (group >= count)).any()):
        raise FormatError(
            f"{stored.file.path}: tensor {stored.info.name!r}: names absent groups; get the file again"
        )
    return group


class Parts(dict[str, StoredTensor]):
    """The tensors that store one weight, by role; ``weight`` holds its codes."""

    @property
    def where(self) -> str:
        """Name the tensor of codes, for messages."""
        codes = self["weight"]
        return f"{codes.file.path}: tensor {codes.info.name!r}"

    def infos(self, *roles: str) -> list[TensorInfo]:
        """List the headers of tensors."""
        return [self[role].info for role in roles]

    def may_have(self, role: str, dtype: str, shape: TensorShape) -> bool:
        """Test whether a tensor, if there is one, has this dtype and shape."""
        return role not in self or (self[role].info.dtype, self[role].info.shape) == (dtype, shape)

    def has_packed_dtypes(self) -> bool:
        """Test whether values and zero points are int32 words and scales are floating-point."""
        weight, zeros, scales = (info.dtype for info in self.infos("weight", "zeros", "scales"))
        return weight == zeros == "I32" and scales in SCALE_DTYPES

    def check(self, fits: bool, also: str = "its config.json") -> None:
        """Refuse tensors whose dtypes, shapes or settings contradict each other.

        Raises
        ------
        FormatError
            If not `fits`; the message lists the tensors.
        """
        if not fits:
            found = ", ".join(f"{i.name} {i.dtype} {list(i.shape)}" for i in self.infos(*self))
            fault = f"codes, scales and zero points do not fit: {found}"
            raise FormatError(f"{self.where}: {fault}; get the file again, and {also}")

    def unsupported(self, what: str) -> UnsupportedError:
        """Make the error for a weight that is stored in a way that nothing here decodes."""
        return UnsupportedError(f"{self.where}: {what} is not supported; use the 16-bit model")


class Recodable(QuantizedWeight):
    """Quantized weight that can hold other values with its own scales."""

    turned: ClassVar[bool] = False
    """Whether codes are stored by columns of the model's matrix."""

    @abstractmethod
    def grid(self, i: int, j: int) -> Grid:
        """Return the values that the codes of rows i to j, as stored, represent."""

    @abstractmethod
    def packed(self, indices: Tensor) -> Tensor:
        """Pack codes of whole rows, given as indices of their levels, as they are stored."""

    def coded_rows(self, i: int, j: int) -> Tensor:
        """Decode rows i to j as stored, float32, into new memory."""
        return self.decode(i, j)


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack uint8 values of at most `bits` bits along the rows, lowest bits first, into bytes; the inverse of `unpack`."""
    streams = np.unpackbits(
        values.numpy()[..., None], axis=-1, count=bits, bitorder="little"
    ).reshape(len(values), -1)
    return torch.from_numpy(np.packbits(streams, axis=-1, bitorder="little"))


EXPONENTS = ("F8_E8M0", "U8")
"""Dtypes of scales that are stored as e8m0 exponents."""


@dataclass(frozen=True)
class Scaled(QuantizedWeight):
    """Quantized values with scales.

    ``W = q · scale`` in float32, under every name of the scale: ``weight_scale`` and ``weight_scale_inv`` (the "inverse" of the quantizer's
    factor). Scales are stored as floating-point values or as e8m0 exponents. torchao's integers may have zero points, of the scales' shape:
    ``W = (q − zero) · scale``.

    Attributes
    ----------
    block
        Rows and columns that share a scale; the last block of a row or column may be smaller.
    powers
        Whether scales are powers of two.
    """

    block: tuple[int, int]
    powers: bool

    @classmethod
    def of(cls, name: str, parts: Parts, config: Config) -> Self:
        """Check that the tensors fit together, and make the weight that they store."""
        weight, quant_scale = parts.infos("weight", "quant_scale")
        if len(weight.shape) not in (2, 3):
            raise parts.unsupported(f"{weight.dtype} with {len(weight.shape)} dimensions")
        if "zeros" in parts and bool(parts["zeros"].bytes().any()):
            raise parts.unsupported("a zero point other than 0")
        if quant_scale.dtype not in (*SCALE_DTYPES, *EXPONENTS):
            raise parts.unsupported(f"{quant_scale.name!r} of dtype {quant_scale.dtype}")
        blocks = _blocks(weight.shape, quant_scale.shape, _stated_blocks(config))
        if len(blocks) > 1:
            found = f"fit shape {list(weight.shape)} and scale {list(quant_scale.shape)}"
            kinds = " and of ".join(f"{bm}x{bn}" for bm, bn in blocks)
            cure = "state one as weight_block_size in the quantization_config"
            raise UnsupportedError(f"{parts.where}: blocks of {kinds} {found}; {cure}")
        parts.check(bool(blocks))
        (block,) = blocks
        powers = quant_scale.dtype in EXPONENTS
        if powers or config.get("format") == "mxfp8-quantized":
            sizes = [w.get("group_size") for w in stated_weights(config)] or [32]
            dtypes = (weight.dtype, quant_scale.dtype)
            fits = dtypes == ("F8_E4M3", "U8") and block == (1, 32) and 32 in sizes
            if config.get("quant_method") == "compressed-tensors" and not fits:
                found = f"{weight.dtype} {list(weight.shape)} with {quant_scale.dtype} {list(quant_scale.shape)}"
                raise parts.unsupported(f"MXFP8 as {found}, for {sizes} inputs by the config,")
        m, n = weight.shape[-2:]
        rows, columns = block
        kind = {(1, n): "channel", (m, n): "tensor"}.get(block, f"{rows}x{columns}")
        powers |= config.get("scale_fmt") == "ue8m0"
        return cls(name, weight.shape, parts, f"{weight.dtype} ({kind})", block, powers)

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``(q − zero) · scale``."""
        values = self.tensors["weight"].rows(i, j).to(torch.float32)
        if (zeros := self.tensors.get("zero_points")) is not None:
            self.by_block(values, zeros.whole().to(torch.float32), i, torch.Tensor.sub_)
        return self.by_block(values, self.grid(), i, torch.Tensor.mul_)

    def grid(self) -> Tensor:
        """Decode the scales to float32, (block rows, block columns)."""
        stored = self.tensors["quant_scale"]
        m, n = self.shape[-2:]
        bm, bn = self.block
        shape = (-(-m // bm), -(-n // bn))
        if stored.info.dtype in EXPONENTS:
            return exponents(stored.bytes()).reshape(shape)
        return stored.whole().to(torch.float32).reshape(shape)

    def by_block(
        self, values: Tensor, grid: Tensor, i: int, act: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Apply `act` in place to rows i, i + 1, … and each value's scale."""
        bm, bn = self.block
        n = values.shape[1]
        whole = n // bn
        scales = grid[torch.arange(i, i + len(values)) // bm]
        act(values[:, : whole * bn].view(len(values), whole, bn), scales[:, :whole, None])
        act(values[:, whole * bn :], scales[:, whole:].expand(-1, n - whole * bn))
        return values


def exponents(raw: Tensor) -> Tensor:
    """Decode e8m0 bytes to float32, ``2^(byte − 127)`` with 255 as NaN; uses the bits because a power function may be inexact."""
    bits = raw.to(torch.int32)
    values = torch.where(bits == 0, 1 << 22, bits << 23).view(torch.float32)  # 2^-127 is subnormal
    return torch.where(bits == 255, float("nan"), values)


def stated_weights(config: Config) -> list[dict[str, Any]]:
    """List what the groups of a quantization config state of their weights."""
    groups = config.get("config_groups")
    if not isinstance(groups, dict):
        return []
    weights = (group.get("weights") for group in groups.values() if isinstance(group, dict))
    return [stated for stated in weights if isinstance(stated, dict)]


def _stated_blocks(config: Config) -> list[tuple[int, int]]:
    """List the block sizes that a quantization config of transformers, compressed-tensors or ModelOpt states."""
    structures = (weights.get("block_structure") for weights in stated_weights(config))
    stated = [config.get("weight_block_size"), *structures]
    # compressed-tensors before 0.11 wrote "128x128"; ModelOpt's algorithm has one size.
    sizes = [size.split("x") if isinstance(size, str) else size for size in stated]
    if config.get("quant_algo") == "FP8_PB_WO":
        sizes.append([128, 128])
    pairs = (size for size in sizes if isinstance(size, list) and len(size) == 2)
    number = "([1-9][0-9]{0,8})"
    matches = (re.fullmatch(f"{number}x{number}", "x".join(map(str, pair))) for pair in pairs)
    return [(int(match[1]), int(match[2])) for match in matches if match]


def _blocks(
    shape: TensorShape, grid: TensorShape, stated: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Infer from the shapes which rows and columns share a scale: all sizes that fit.

    Stated sizes come first. If none fits, because a checkpoint may mix kinds of blocks, a size that divides evenly and 128×128 are tried.
    """
    m, n = shape[-2:]
    stack = math.prod(shape[:-2])
    if 0 in shape:
        return []
    if math.prod(grid) == stack and (stack == 1 or grid[0] == stack):
        return [(m, n)]
    match grid:
        case (rows, 1, columns, 1) if len(shape) == 2:
            grid = (rows, columns)  # ModelOpt's
    if len(grid) == len(shape) - 1:
        grid = (*grid, 1)  # one scale for each row, stored without a column dimension
    if len(grid) != len(shape) or grid[:-2] != shape[:-2]:
        return []
    gm, gn = grid[-2:]
    even = [(m // gm, n // gn)] if gm and gn and m % gm == 0 and n % gn == 0 else []
    for sizes in (stated, [*even, (128, 128)]):
        fitting = ((bm, bn) for bm, bn in sizes if (-(-m // bm), -(-n // bn)) == (gm, gn))
        if fits := dict.fromkeys((min(bm, m), min(bn, n)) for bm, bn in fitting):
            return list(fits)
    return []


GROUP = 32

_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_ASCENDING = torch.tensor([*range(15, 8, -1), *range(8)], dtype=torch.uint8)
"""The codes of `_E2M1` by their values, without −0."""

_LEVELS = _E2M1[_ASCENDING.int()]

_KINDS = {
    # Dtype of the scales and role of the tensor's own scale → name, inputs in a group, shapes of the tensor's scale.
    ("U8", None): ("MXFP4 (compressed-tensors)", GROUP, ()),
    ("F8_E4M3", "divisor"): ("NVFP4 (compressed-tensors)", 16, ((1,),)),
    ("F8_E4M3", "factor"): ("NVFP4 (ModelOpt)", 16, ((), (1,))),
}


class _E2M1Codes(Recodable):
    """E2m1 values with a scale for each group of inputs, two in a byte."""

    def packed(self, indices: Tensor) -> Tensor:
        """Pack two codes into each byte, the first in the low bits."""
        return pack(_ASCENDING[indices.int()], 4)


@dataclass(frozen=True)
class PackedFP4(_E2M1Codes):
    """E2m1 values of a matrix.

    It is stored as (out, in / 2) bytes and one scale for each group of inputs. MXFP4 has groups of 32, whose scales are powers of two.
    NVFP4 has groups of 16, whose scales are e4m3, and one float32 scale for the tensor: ``W = q · (scale / weight_global_scale)`` in
    compressed-tensors, ``W = q · (scale · weight_scale_2)`` in ModelOpt, as NVIDIA's published source computes it.

    Attributes
    ----------
    group_size
        Inputs that share a scale.
    """

    group_size: int

    @classmethod
    def of(cls, name: str, parts: Parts, config: Config) -> Self:
        """Check that the tensors fit together and to the config, and make the weight that they store."""
        packed, scales = parts.infos("weight", "scales")
        if "extra" in parts:
            raise parts.unsupported(f"FP4 with {parts['extra'].info.name!r}")
        outer = next((role for role in ("divisor", "factor") if role in parts), None)
        label, size, shapes = _KINDS.get((scales.dtype, outer), ("", 1, ()))
        parts.check(bool(label) and len(packed.shape) == 2 and 0 not in packed.shape)
        m, half = packed.shape
        n = 2 * half
        fits = outer is None or any(parts.may_have(outer, "F32", shape) for shape in shapes)
        parts.check(fits and scales.shape == (m, n / size))
        keys = ("num_bits", "type", "group_size")
        stated = [(*map(w.get, keys), w.get("symmetric", True)) for w in stated_weights(config)]
        is_other = config.get("group_size", size) != size
        if is_other or (stated and (4, "float", size, True) not in stated):
            stated_as = f"(bits, type, group, symmetric) {stated or config['group_size']}"
            raise parts.unsupported(
                f"{label} in groups of {size} that the quantization_config states as {stated_as}"
            )
        return cls(name, (m, n), parts, label, size)

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``e2m1 · scale``."""
        scales = self._scales(i, j)
        values = _values(self.tensors["weight"].rows(i, j)).view(*scales.shape, self.group_size)
        return values.mul_(scales[..., None]).flatten(1)

    def _scales(self, i: int, j: int) -> Tensor:
        stored = self.tensors["scales"].rows(i, j)
        scales = exponents(stored) if stored.dtype == torch.uint8 else stored.to(torch.float32)
        if "divisor" in self.tensors:
            scales /= self.tensors["divisor"].whole()
        if "factor" in self.tensors:
            scales *= self.tensors["factor"].whole()
        return scales

    def grid(self, i: int, j: int) -> Grid:
        """Return e2m1's values and the scale of each."""
        scales = self._scales(i, j).repeat_interleave(self.group_size, 1)
        return Grid(_LEVELS, scales)


@dataclass(frozen=True)
class MXFP4(_E2M1Codes):
    """E2m1 values and exponents of a stack of matrices.

    gpt-oss stores ``<name>_blocks`` (experts, out, in / 32, 16) and ``<name>_scales`` (experts, out, in / 32). The model's own tensor is
    (experts, in, out).
    """

    turned = True

    @classmethod
    def of(cls, name: str, parts: Parts, config: Config) -> Self:
        """Check that the tensors fit together, and make the weight that they store."""
        blocks, scales = parts.infos("weight", "scales")
        fits = len(scales.shape) == 3 and scales.dtype == "U8"
        parts.check(fits and blocks.shape == (*scales.shape, GROUP // 2))
        experts, out, groups = scales.shape
        return cls(name, (experts, groups * GROUP, out), parts, "MXFP4")

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``e2m1 · 2^(scale − 127)``, transposed."""
        first = i // GROUP
        last = -(-j // GROUP)
        values = _values(self.tensors["weight"].whole()[:, first:last])  # (out, groups, 32)
        values.mul_(exponents(self.tensors["scales"].whole()[:, first:last])[..., None])
        return values.flatten(1).T[i - first * GROUP : j - first * GROUP].contiguous()

    def grid(self, i: int, j: int) -> Grid:
        """Return e2m1's values and the scale of each."""
        scales = exponents(self.tensors["scales"].rows(i, j))
        return Grid(_LEVELS, scales.repeat_interleave(GROUP, 1))

    def coded_rows(self, i: int, j: int) -> Tensor:
        """Decode outputs i to j of one expert."""
        return _values(self.tensors["weight"].rows(i, j)).flatten(1).mul_(self.grid(i, j).scales)


def _values(packed: Tensor) -> Tensor:
    """Unpack bytes along the last dimension, float32 in new memory."""
    return _E2M1[torch.stack([packed & 15, packed >> 4], -1).flatten(-2).int()]


LARGEST = 448.0
"""Largest e4m3 value."""

ReadRows = Callable[[int, int], Tensor]
"""Function that returns rows i to j of a matrix, float32, in new memory."""


@dataclass(frozen=True)
class FP8(Scaled):
    """E4m3 values and their scales."""

    def new_scales(self, merged: ReadRows) -> Tensor:
        """Choose scales for merged values, (block rows, block columns): each block's maximum over `LARGEST`, rounded as scales are stored.

        Raises
        ------
        NumericError
            If a value is NaN or Inf.
        """
        bm, bn = self.block
        grid = torch.zeros_like(self.grid())
        for i, j in self.steps():
            values = merged(i, j)
            if not all_finite(values):
                raise NumericError(f"tensor {self.name!r}: {NOT_FINITE}")
            padded = torch.nn.functional.pad(values.abs(), (0, -self.shape[1] % bn))
            largest = padded.view(len(values), -1, bn).amax(2)
            rows = (torch.arange(i, j) // bm)[:, None].expand_as(largest)
            grid.scatter_reduce_(0, rows, largest, "amax")
        quant_scale = torch.where(grid > 0, grid / LARGEST, 1.0)
        if self.powers:
            quant_scale = exponents(_exponent_bytes(quant_scale))
        stored = self.tensors["quant_scale"].info.dtype
        if stored in EXPONENTS:
            return quant_scale
        dtype = TORCH_DTYPES[stored]
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        return quant_scale.clamp_min(smallest).to(dtype).to(torch.float32)

    def requantized(self, role: str, merged: ReadRows, grid: Tensor) -> Iterator[Tensor]:
        """Yield one tensor for merged values with the scales of `new_scales`: the scales, or e4m3 values rounded to nearest."""
        if role == "quant_scale":
            dtype = self.tensors["quant_scale"].info.dtype
            yield _exponent_bytes(grid) if dtype in EXPONENTS else grid.to(TORCH_DTYPES[dtype])
            return
        for i, j in self.steps():
            scaled = self.by_block(merged(i, j), grid, i, torch.Tensor.div_)
            yield scaled.clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def _exponent_bytes(values: Tensor) -> Tensor:
    """Round up to powers of two, as e8m0 bytes."""
    mantissa, exponent = torch.frexp(values)  # mantissa in [0.5, 1)
    return (exponent - (mantissa == 0.5).int() + 127).clamp(0, 254).to(torch.uint8)


AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Index of the four bits that hold each of a word's eight outputs: output 1 is in bits 16 to 19."""


@dataclass(frozen=True)
class AWQ(QuantizedWeight):
    """Four-bit values, packed along the outputs.

    ``W[out, in] = (q[in, out] − zero[g, out]) · scale[g, out]``, where g is the group of the input; stored transposed, inputs first. Values
    and zero points are packed along the outputs, eight to a word, in the order of `AWQ_ORDER`.

    Attributes
    ----------
    group_size
        Inputs in a group.
    """

    group_size: int

    @classmethod
    def of(cls, name: str, parts: Parts, config: Config) -> Self:
        """Check that the tensors fit together, and make the weight that they store."""
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        bits = config.get("bits")
        zero_point = config.get("zero_point")
        usual = config.get("bits", 4) == 4 and config.get("zero_point", True) is True
        if version != "gemm" or not usual:
            raise parts.unsupported(f"AWQ with {bits=!r}, {zero_point=!r}, {version=!r}")
        weight, scales, zeros = (info.shape for info in parts.infos("weight", "scales", "zeros"))
        parts.check(len(weight) == 2 and parts.has_packed_dtypes())
        inputs, words = weight
        size = group_size(config, inputs)
        groups = -(-inputs // size)
        parts.check(scales == (groups, 8 * words) and zeros == (groups, words))
        return cls(name, (8 * words, inputs), parts, "AWQ 4 bits", size)

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``(q − zero) · scale``, transposed."""
        first = i // 8
        last = -(-j // 8)
        shifts = torch.tensor(AWQ_ORDER, dtype=torch.int32) * 4

        def unpacked(role: str) -> Tensor:
            words = self.tensors[role].whole()[:, first:last]
            return ((words[..., None] >> shifts) & 15).flatten(1)[:, i - 8 * first : j - 8 * first]

        group = torch.arange(self.shape[1]) // self.group_size
        scales = self.tensors["scales"].whole()[:, i:j]
        return dequantize_groups(unpacked("weight"), unpacked("zeros"), scales, group)


@dataclass(frozen=True)
class GPTQ(QuantizedWeight):
    """Quantized values packed along the inputs.

    ``W[out, in] = (q[in, out] − zero[g, out]) · scale[g, out]``, where g is the group of the input; stored transposed, inputs first. Values
    are packed along the inputs and zero points along the outputs; see `unpack`. The first version of the format stores zero points less
    one. GPTQModel subtracts a one from each by a subtraction of whole words: a zero point of 0 borrows from the next, which only the
    addition of the same words undoes. Zero points of 3 bits, some of which lie in two words, wrap around instead.

    The config's ``dynamic`` holds rules for single modules, which GPTQModel, vLLM and SGLang read in the same way: the first regular
    expression that matches a module's name from its start applies. They take the format from the config alone, whatever a rule says.

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
    def of(cls, name: str, parts: Parts, config: Config) -> Self:
        """Check that the tensors fit together, and make the weight that they store."""
        # transformers prefers the first key, GPTQModel the second, and vLLM reads only the first.
        stated = (config.get(key) for key in ("checkpoint_format", "format"))
        formats = {str(format_).lower() for format_ in stated if format_} or {"gptq"}
        if formats not in ({"gptq"}, {"gptq_v2"}):
            raise parts.unsupported(f"GPTQ in the format {' and '.join(sorted(formats))}")
        weight, scales, zeros = (info.shape for info in parts.infos("weight", "scales", "zeros"))
        config = {**config, **_rule(config, name.removesuffix(".weight"), parts)}
        bits = config.get("bits")
        parts.check(len(weight) == len(scales) == len(zeros) == 2)
        words, outputs = weight
        grouped = "groups" in parts
        if grouped and words:  # the number of inputs gives the bits
            bits = words * 32 // max(1, math.prod(parts["groups"].info.shape))
        if bits not in (2, 3, 4, 8):
            raise parts.unsupported(f"GPTQ with {bits!r} bits")
        inputs = words * 32 // bits
        size = group_size(config, inputs)
        groups = scales[0] if grouped else -(-inputs // size)
        fits = scales == (groups, outputs) and zeros == (groups, -(-outputs * bits // 32))
        fits &= words == -(-inputs * bits // 32) and parts.may_have("groups", "I32", (inputs,))
        parts.check(fits and parts.has_packed_dtypes())
        label = f"GPTQ {bits} bits"
        symmetric = config.get("sym") is True
        less_one = formats == {"gptq"}
        return cls(name, (outputs, inputs), parts, label, bits, size, less_one, symmetric)

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``(q − zero) · scale``, transposed."""
        values = unpack(self.tensors["weight"].whole()[:, i:j], self.bits, 0, self.shape[1])
        zeros = self._zeros(i, j)
        if "groups" in self.tensors:
            group = group_indices(self.tensors["groups"], self.tensors["scales"].info.shape[0])
        else:
            group = torch.arange(self.shape[1]) // self.group_size
        return dequantize_groups(values, zeros, self.tensors["scales"].whole()[:, i:j], group)

    def _zeros(self, i: int, j: int) -> Tensor:
        """Unpack the zero points of outputs i to j: (groups, j − i)."""
        words = self.tensors["zeros"].whole()
        bits = self.bits
        if self.symmetric:
            return torch.full((len(words), j - i), self._half, dtype=torch.int32)
        if self.less_one and bits != 3:
            words = words + sum(1 << at for at in range(0, 32, bits))  # int32 sums wrap around
        zeros = unpack(words.T, bits, i, j).T
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
        zeros = unpack(self.tensors["zeros"].whole().T, self.bits, 0, self.shape[0])
        stored = set(zeros.flatten().tolist())
        if len(stored) > 1 or not stored <= {half, half - self.less_one}:
            raise Parts(self.tensors).unsupported("a zero point other than that of sym=true")
        return half


def _rule(config: Config, module: str, parts: Parts) -> dict[str, Any]:
    """Read the settings that the first matching rule of ``dynamic`` gives a module."""
    try:
        rules = (config.get("dynamic") or {}).items()
        none: tuple[str, dict[str, Any]] = ("", {})
        pattern, rule = next(
            ((p, r) for p, r in rules if re.match(re.sub("^[-+]:", "", p), module)), none
        )
        settings = {key: rule[key] for key in ("bits", "group_size", "sym") if key in rule}
    except (AttributeError, TypeError, OverflowError, RecursionError, re.error):
        fault = 'cannot read "dynamic" in the quantization config; get config.json again'
        raise FormatError(f"{parts.where}: {fault}") from None
    if pattern.startswith("-:"):
        raise parts.unsupported('a quantized layer that a rule in "dynamic" excludes')
    return settings


@dataclass(frozen=True)
class PackedIntegers(Recodable):
    """Integers in 32-bit words, which compressed-tensors calls pack-quantized.

    ``W[out, in] = (q[out, in] − zero[out, g]) · scale[out, g]``, where g is the group of the input. Values are packed along the inputs and
    zero points along the outputs; without stored zero points, the zero point is half of the range.

    Attributes
    ----------
    bits
        1 to 8.
    """

    bits: int

    @classmethod
    def of(cls, name: str, parts: Parts, config: Config) -> Self:
        """Check that the tensors fit together, and make the weight that they store."""
        words, scales, stored_shape = parts.infos("weight", "scales", "shape")
        readable = stored_shape.dtype in ("I64", "I32") and stored_shape.shape == (2,)
        if readable:
            m, n = parts["shape"].whole().tolist()
        else:
            m = 0
            n = 0
        if len(words.shape) != 2 or m != words.shape[0] or n < 1:
            raise parts.unsupported(f"a packed weight of shape {list(words.shape)}")
        width = words.shape[1]
        weights = stated_weights(config)
        stated_bits = (stated.get("num_bits") for stated in weights)
        known = {b for b in stated_bits if type(b) is int and 0 < b <= 8}
        if old := [b for b in known if 32 % b and n > 32 // b and -(-n // (32 // b)) == width]:
            raise parts.unsupported(
                f"packing of {listed(old)} bits by compressed-tensors up to 0.10"
            )
        fitting = [b for b in known or range(1, 9) if -(-n * b // 32) == width]
        fits = words.dtype == "I32" and len(fitting) == 1
        parts.check(fits and len(scales.shape) == 2 and scales.shape[0] == m)
        (bits,) = fitting
        groups = scales.shape[1]
        sizes = [stated.get("group_size") for stated in weights]
        positive = (size for size in sizes if type(size) is int and size > 0)
        counts = {0 if n % size else n // size for size in positive}
        if counts and len(counts) == len(sizes) and groups not in counts:
            raise parts.unsupported(
                f"{groups} groups of {n} inputs, which the stated sizes {sizes} do not divide so"
            )
        fits = scales.dtype in SCALE_DTYPES and groups > 0 and n % groups == 0
        fits &= parts.may_have("zeros", "I32", (-(-m * bits // 32), groups))
        parts.check(fits and parts.may_have("groups", "I32", (n,)))
        return cls(name, (m, n), parts, f"INT{bits} (compressed-tensors)", bits)

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``(q − zero) · scale``."""
        grid = self.grid(i, j)
        values = unpack(self.tensors["weight"].rows(i, j).T, self.bits, 0, self.shape[1]).T
        return values.to(torch.float32).sub_(grid.zeros).mul_(grid.scales)

    def grid(self, i: int, j: int) -> Grid:
        """Return the range of the integers, with the scale and the zero point of each value."""
        n = self.shape[1]
        scales = self.tensors["scales"].rows(i, j).to(torch.float32)
        count = scales.shape[1]
        group = torch.arange(n) // -(-n // count)
        stated = self.tensors.get("groups")
        if stated is not None and not bool((stated.whole() < 0).any()):  # −1 marks an unused g_idx
            group = group_indices(stated, count)
        half = float(1 << (self.bits - 1))
        zeros: Tensor | float = half
        if stored := self.tensors.get("zeros"):
            zeros = unpack(stored.whole(), self.bits, i, j)[:, group].to(torch.float32)
        return Grid(torch.arange(2.0 * half), scales[:, group], zeros)

    def packed(self, indices: Tensor) -> Tensor:
        """Pack each row into 32-bit words."""
        row = pack(indices, self.bits)
        return torch.nn.functional.pad(row, (0, -row.shape[1] % 4))


SETTINGS = (
    "packing",
    "compute_dtype",
    "axis",
    "group_size",
    "view_as_float",
    "channel_wise",
    "quant_zero",
    "quant_scale",
    "nbits",
    "unpack_view_dtype",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "optimize",
    "round_zero",
)
"""Names of the tensors that hold a layer's settings."""

NOT_DECODED = ("zero_q", "scale_q", "zero_scale")
"""Names of quantized zero points and scales, and of both in one tensor."""

_PACKINGS = (("U8", 8, 1), ("U8", 4, 2), ("I32", 3, 10), ("U8", 2, 4), ("U8", 1, 8))
"""Dtype of the words, bits of a value, values in a word."""


@dataclass(frozen=True)
class HQQ(QuantizedWeight):
    """Packed integers and their groups.

    ``W = (q − zero) · scale``, in the dtype of the scales and rounded after each operation, as the library does. The values form a table:
    with axis 1 each row is a group, with axis 0 each column. A packed row holds as many rows of the table as fit its words: of k packed
    rows, the first holds rows 0, k, 2k, …, with row 0 in the highest bits. The shapes tell the axis, the group size and the packing, so
    that only ``shape`` is read when a layer is opened. The library's decoder follows the settings instead: a layer is refused if these
    contradict its shapes.

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
    def of(cls, name: str, parts: Parts, config: Config) -> Self:
        """Check that the tensors fit together, and make the weight that they store."""
        if role := next((role for role in NOT_DECODED if role in parts), None):
            raise parts.unsupported(f"HQQ with {role!r}")
        needed = ("scale", "zero", "shape", "packing")
        if role := next((role for role in needed if role not in parts), None):
            raise parts.unsupported(f"HQQ without {role!r}")
        read = Parts({role: parts[role] for role in ("weight", "scale", "zero", "shape")})
        packed, scale = read.infos("weight", "scale")
        fits = read.may_have("shape", "I64", (2,)) and scale.dtype in SCALE_DTYPES
        fits &= read.may_have("zero", scale.dtype, scale.shape)
        read.check(fits and len(scale.shape) == 2 and min(scale.shape) == 1)
        m, n = read["shape"].whole().tolist()
        groups = max(scale.shape)
        read.check(m > 0 and n > 0 and m * n % groups == 0)
        size = m * n // groups
        table = (groups, size) if scale.shape[1] == 1 else (size, groups)
        fitting = [packing for packing in _PACKINGS if _holds(packed, table, *packing)]
        read.check(len(fitting) == 1)
        ((dtype, bits, count),) = fitting
        rows, columns = table
        info = replace(packed, dtype=dtype, shape=(-(-rows // count), columns))
        stored = {**parts, "weight": replace(parts["weight"], info=info)}
        return cls(name, (m, n), stored, f"HQQ {bits} bits", table, bits, count)

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``(q − zero) · scale``.

        Raises
        ------
        FormatError
            If a setting contradicts the shapes.
        """
        self._check_settings()
        n = self.shape[1]
        rows, columns = self.table
        first = i * n // columns
        last = -(-j * n // columns)
        # Zero points and scales are a column if groups are rows of the table, else one row.
        parts = (self.tensors[role] for role in ("zero", "scale"))
        zero, scale = (
            part.whole() if part.info.shape[0] == 1 else part.rows(first, last) for part in parts
        )
        at = torch.arange(first, last)
        packed = -(-rows // self.count)
        words = self.tensors["weight"].whole()[at % packed]
        shift = (self.count - 1 - at // packed).mul_(self.bits).to(words.dtype)
        codes = words.bitwise_right_shift_(shift[:, None]).bitwise_and_((1 << self.bits) - 1)
        values = codes.to(scale.dtype).sub_(zero).mul_(scale).to(torch.float32).flatten()
        start = i * n - first * columns
        return values[start : start + (j - i) * n].view(j - i, n)

    def _check_settings(self) -> None:
        axis = 1 if self.tensors["scale"].info.shape[1] == 1 else 0
        packing = f"{self.bits}bit_{'32' if self.bits == 3 else 'u8'}"
        settings = {"packing": packing, "axis": axis, "group_size": self.table[axis]}
        for role, expected in settings.items():
            stored = self.tensors.get(role)
            if stored is None:
                continue
            raw = bytes(stored.bytes(0, min(stored.info.nbytes, 16)).tolist())
            found = raw.decode("latin-1") if role == "packing" else int.from_bytes(raw, "little")
            if found != expected:
                fault = f"expected {expected!r} by the shapes of its HQQ layer, found {found!r}"
                raise FormatError(
                    f"{self.where}: tensor {stored.info.name!r}: {fault}; get the file again"
                )


def _holds(packed: TensorInfo, table: tuple[int, int], dtype: str, bits: int, count: int) -> bool:
    """Test whether a tensor holds a table in these words; the library may view them as floating-point values."""
    height, width = table
    rows = -(-height // count)
    if bits != 3 and rows * count != height:
        return False
    size = rows * width * TORCH_DTYPES[dtype].itemsize
    fits = packed.shape[:1] == (rows,) and packed.nbytes == size
    return fits and packed.dtype in (dtype, *SCALE_DTYPES)


@dataclass(frozen=True)
class FourBit(Recodable):
    """NF4 or FP4 values.

    ``W = quant_map[q] · absmax[block]`` over the flattened matrix, two values in a byte, the first in the high bits. With double
    quantization the scales are quantized too: ``absmax = nested_quant_map[q] · nested_absmax[block] + offset``.

    Attributes
    ----------
    blocksize, nested_blocksize, offset
        Values from the quant_state; the last two apply only with double quantization.
    """

    blocksize: int
    nested_blocksize: int
    offset: float

    @classmethod
    def of(cls, name: str, parts: Parts, config: Config) -> Self:
        """Check that the tensors fit together, and make the weight that they store."""
        state = _state(parts)
        shape = state.get("shape")
        if not (isinstance(shape, list) and len(shape) == 2 and all(map(_is_count, shape))):
            raise parts.unsupported(f"bitsandbytes with the shape {shape!r}")
        nested = "nested_absmax" in parts
        blocksize = state.get("blocksize")
        inner = state.get("nested_blocksize") if nested else 1
        offset = state.get("nested_offset", 0.0)
        if not (_is_count(blocksize) and _is_count(inner) and type(offset) in (int, float)):
            raise parts.unsupported(
                f"a quant_state with {blocksize=!r}, nested_blocksize={inner!r}, {offset=!r}"
            )
        count = math.prod(shape)
        blocks = -(-count // blocksize)
        wanted = {"weight": -(-count // 2), "absmax": blocks * (1 if nested else 4), "map": 64}
        if nested:
            wanted |= {"nested_absmax": -(-blocks // inner) * 4, "nested_map": 1024}
        parts.check(wanted.keys() <= parts.keys())
        for role, size in wanted.items():
            info = parts[role].info
            dtype = "U8" if nested and role == "absmax" else "F32"
            parts.check(info.nbytes == size and (role == "weight" or info.dtype == dtype))
        kind = str(state.get("quant_type")).upper()
        return cls(name, tuple(shape), parts, kind, blocksize, inner, float(offset))

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``quant_map[q] · absmax``."""
        n = self.shape[1]
        start = i * n
        packed = self.tensors["weight"].bytes(start // 2, -(-j * n // 2))
        codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[start % 2 :]
        values = self.tensors["map"].flat(0, 16)[codes[: (j - i) * n].int()]
        return values.view(j - i, n).mul_(self._scales(i, j))

    def _scales(self, i: int, j: int) -> Tensor:
        """Decode the scale of each value of rows i to j."""
        n = self.shape[1]
        size = self.blocksize
        first = i * n // size
        blocks = self._absmax(first, -(-j * n // size)).repeat_interleave(size)
        return blocks[i * n - first * size :][: (j - i) * n].view(j - i, n)

    def grid(self, i: int, j: int) -> Grid:
        """Return the ascending values of the table, and the scale of each value."""
        return Grid(self.tensors["map"].flat(0, 16).sort()[0], self._scales(i, j))

    def packed(self, indices: Tensor) -> Tensor:
        """Pack two codes into each byte, the first in the high bits."""
        codes = self.tensors["map"].flat(0, 16).argsort().to(torch.uint8)[indices.int()].flatten()
        pairs = torch.nn.functional.pad(codes, (0, len(codes) % 2)).view(-1, 2)
        return pairs[:, 0] << 4 | pairs[:, 1]

    def _absmax(self, i: int, j: int) -> Tensor:
        """Decode the scales of blocks i to j, (j − i,) float32."""
        stored = self.tensors["absmax"]
        if "nested_absmax" not in self.tensors:
            return stored.flat(i, j)
        size = self.nested_blocksize
        values = self.tensors["nested_map"].flat(0, 256)[stored.flat(i, j).int()]
        first = i // size
        outer = self.tensors["nested_absmax"].flat(first, -(-j // size))
        return values.mul_(outer[torch.arange(i, j) // size - first]).add_(self.offset)


@dataclass(frozen=True)
class EightBit(QuantizedWeight):
    """Int8 values with the largest magnitude of each row.

    ``W = q · SCB[row] / 127``.
    """

    @classmethod
    def of(cls, name: str, parts: Parts, config: Config) -> Self:
        """Check that the tensors fit together, and make the weight that they store."""
        weight, largest = parts.infos("weight", "SCB")
        fits = len(weight.shape) == 2 and largest.dtype == "F32"
        parts.check(fits and math.prod(largest.shape) == weight.shape[0])
        if "format" in parts and bool(parts["format"].bytes().any()):
            raise parts.unsupported(
                "a weight_format other than 0 (rows), of bitsandbytes before 0.45,"
            )
        return cls(name, weight.shape, parts, "INT8 (bitsandbytes)")

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``q · SCB / 127``, multiplying as the library does."""
        values = self.tensors["weight"].rows(i, j).to(torch.float32)
        largest = self.tensors["SCB"].flat(i, j)[:, None]
        return values.mul_(largest).mul_(7.874015718698502e-3)


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 < value < 2**62


def _state(parts: Parts) -> dict[str, Any]:
    """Parse the JSON, a few hundred bytes, that bitsandbytes keeps in a tensor."""
    stored = parts["state"]
    try:
        state = strict_json(stored.bytes(0, min(stored.info.nbytes, 1 << 16)).numpy().tobytes())
    except ValueError as e:
        raise FormatError(
            f"{parts.where}: its quant_state is not JSON: {e}; get the file again"
        ) from None
    return state if isinstance(state, dict) else {}
