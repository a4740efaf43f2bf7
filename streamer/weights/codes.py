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
from streamer.weights.base import TORCH_DTYPES, QuantizedWeight, StoredTensor

NOT_FINITE = "the result holds NaN or Inf; check the adapter's scale and lambda"

SCALE_DTYPES = ("F16", "BF16", "F32")
"""Dtypes of scales; the product of a value and a 16-bit scale is exact in float32."""


def unpack(words: Tensor, bits: int, i: int, j: int) -> Tensor:
    """Unpack values i to j from bit streams down the columns of (k, c) int32 words, lowest bits first; returns (j − i, c) int32.

    With 3 bits, value 10 occupies bits 30 and 31 of the first word and bit 0 of the second.
    """
    at = torch.arange(i, j) * bits
    word, shift = at // 32, (at % 32).to(torch.int32)
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


def group_size(config: Mapping[str, Any], inputs: int) -> int:
    """Read the number of inputs in a group from a quantization config: 128 by default, all inputs for −1."""
    size = config.get("group_size", config.get("q_group_size", 128))
    return size if type(size) is int and size > 0 else max(1, inputs)


def has_packed_dtypes(tensors: Mapping[str, StoredTensor]) -> bool:
    """Test whether values and zero points are int32 words and scales are floating-point."""
    words = {tensors[role].info.dtype for role in ("weight", "zeros")}
    return words == {"I32"} and tensors["scales"].info.dtype in SCALE_DTYPES


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


def where(tensors: Mapping[str, StoredTensor]) -> str:
    """Name a weight's tensor of codes, for messages."""
    return f"{tensors['weight'].file.path}: tensor {tensors['weight'].info.name!r}"


def check_fit(
    fits: bool, tensors: Mapping[str, StoredTensor], also: str = "its config.json"
) -> None:
    """Refuse tensors of one weight whose dtypes, shapes or settings contradict each other.

    Raises
    ------
    FormatError
        If not `fits`; the message lists the tensors.
    """
    if not fits:
        found = ", ".join(
            f"{p.info.name} {p.info.dtype} {list(p.info.shape)}" for p in tensors.values()
        )
        fault = f"codes, scales and zero points do not fit: {found}"
        raise FormatError(f"{where(tensors)}: {fault}; get the file again, and {also}")


def unsupported(tensors: Mapping[str, StoredTensor], what: str) -> UnsupportedError:
    """Make the error for a weight that is stored in a way that nothing here decodes."""
    return UnsupportedError(f"{where(tensors)}: {what} is not supported; use the 16-bit model")


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
    def of(cls, name: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Self:
        """Check that the tensors fit together, and make the weight that they store; `config` is the model's ``quantization_config``."""
        weight, quant_scale = tensors["weight"].info, tensors["quant_scale"].info
        if len(weight.shape) not in (2, 3):
            raise unsupported(tensors, f"{weight.dtype} with {len(weight.shape)} dimensions")
        if "zeros" in tensors and bool(tensors["zeros"].bytes().any()):
            raise unsupported(tensors, "a zero point other than 0")
        if quant_scale.dtype not in (*SCALE_DTYPES, *EXPONENTS):
            raise unsupported(tensors, f"{quant_scale.name!r} of dtype {quant_scale.dtype}")
        blocks = _blocks(weight.shape, quant_scale.shape, _stated_blocks(config))
        if len(blocks) > 1:
            found = f"fit shape {list(weight.shape)} and scale {list(quant_scale.shape)}"
            kinds = " and of ".join(f"{bm}x{bn}" for bm, bn in blocks)
            cure = "state one as weight_block_size in the quantization_config"
            raise UnsupportedError(f"{where(tensors)}: blocks of {kinds} {found}; {cure}")
        check_fit(bool(blocks), tensors)
        mx = quant_scale.dtype in EXPONENTS or config.get("format") == "mxfp8-quantized"
        sizes = [w.get("group_size") for w in stated_weights(config)] or [32]
        fits = (weight.dtype, quant_scale.dtype, blocks) == (
            "F8_E4M3",
            "U8",
            [(1, 32)],
        ) and 32 in sizes
        if mx and config.get("quant_method") == "compressed-tensors" and not fits:
            found = f"{weight.dtype} {list(weight.shape)} with {quant_scale.dtype} {list(quant_scale.shape)}"
            raise unsupported(tensors, f"MXFP8 as {found}, for {sizes} inputs by the config,")
        (m, n), (block,) = weight.shape[-2:], blocks
        kind = (
            "tensor"
            if block == (m, n)
            else "channel"
            if block == (1, n)
            else f"{block[0]}x{block[1]}"
        )
        powers = quant_scale.dtype in EXPONENTS or config.get("scale_fmt") == "ue8m0"
        return cls(
            name,
            weight.shape,
            dict(tensors),
            f"{weight.dtype} ({kind})",
            torch.float32,
            None,
            block,
            powers,
        )

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``(q − zero) · scale``."""
        values = self.tensors["weight"].rows(i, j).to(torch.float32)
        if (zeros := self.tensors.get("zero_points")) is not None:
            self.by_block(values, zeros.whole().to(torch.float32), i, torch.Tensor.sub_)
        return self.by_block(values, self.grid(), i, torch.Tensor.mul_)

    def grid(self) -> Tensor:
        """Decode the scales to float32, (block rows, block columns)."""
        stored = self.tensors["quant_scale"]
        (m, n), (bm, bn) = self.shape[-2:], self.block
        values = (
            exponents(stored.bytes())
            if stored.info.dtype in EXPONENTS
            else stored.whole().to(torch.float32)
        )
        return values.reshape(-(-m // bm), -(-n // bn))

    def by_block(
        self, values: Tensor, grid: Tensor, i: int, act: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Apply `act` in place to rows i, i + 1, … and each value's scale."""
        (bm, bn), n = self.block, values.shape[1]
        scales, whole = grid[torch.arange(i, i + len(values)) // bm], n // bn
        act(values[:, : whole * bn].view(len(values), whole, bn), scales[:, :whole, None])
        act(values[:, whole * bn :], scales[:, whole:].expand(-1, n - whole * bn))
        return values


def exponents(raw: Tensor) -> Tensor:
    """Decode e8m0 bytes to float32, ``2^(byte − 127)`` with 255 as NaN; uses the bits because a power function may be inexact."""
    bits = raw.to(torch.int32)
    values = torch.where(bits == 0, 1 << 22, bits << 23).view(torch.float32)  # 2^-127 is subnormal
    return torch.where(bits == 255, float("nan"), values)


def stated_weights(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List what the groups of a quantization config state of their weights."""
    groups = config.get("config_groups")
    weights = (
        [g.get("weights") for g in groups.values() if isinstance(g, dict)]
        if isinstance(groups, dict)
        else []
    )
    return [w for w in weights if isinstance(w, dict)]


def _stated_blocks(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """List the block sizes that a quantization config of transformers, compressed-tensors or ModelOpt states."""
    stated = [
        config.get("weight_block_size"),
        *(w.get("block_structure") for w in stated_weights(config)),
    ]
    # compressed-tensors before 0.11 wrote "128x128"; ModelOpt's algorithm has one size.
    sizes = [size.split("x") if isinstance(size, str) else size for size in stated]
    sizes += [["128", "128"]] * (config.get("quant_algo") == "FP8_PB_WO")
    pairs = [[*map(str, size)] for size in sizes if isinstance(size, list) and len(size) == 2]
    return [
        (int(m), int(n))
        for m, n in pairs
        if all(re.fullmatch("[1-9][0-9]{0,8}", size) for size in (m, n))
    ]


def _blocks(
    shape: tuple[int, ...], grid: tuple[int, ...], stated: Sequence[tuple[int, int]]
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
    if len(grid) == 4 and (len(shape), grid[1], grid[3]) == (2, 1, 1):
        grid = grid[::2]  # ModelOpt's
    if len(grid) == len(shape) - 1:
        grid = (*grid, 1)  # one scale for each row, stored without a column dimension
    if len(grid) != len(shape) or grid[:-2] != shape[:-2]:
        return []
    gm, gn = grid[-2:]
    even = [(m // gm, n // gn)] if gm and gn and m % gm == 0 and n % gn == 0 else []
    for sizes in (stated, [*even, (128, 128)]):
        fits = [
            (min(bm, m), min(bn, n)) for bm, bn in sizes if (-(-m // bm), -(-n // bn)) == (gm, gn)
        ]
        if fits:
            return list(dict.fromkeys(fits))
    return []


GROUP = 32

_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_ASCENDING = torch.tensor([*range(15, 8, -1), *range(8)], dtype=torch.uint8)
"""The codes of `_E2M1` by their values, without −0."""

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
    def of(cls, name: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Self:
        """Check that the tensors fit together and to the config, and make the weight that they store."""
        packed, scales = (tensors[role].info for role in ("weight", "scales"))
        if "extra" in tensors:
            raise unsupported(tensors, f"FP4 with {tensors['extra'].info.name!r}")
        outer = next((role for role in ("divisor", "factor") if role in tensors), None)
        label, size, shapes = _KINDS.get((scales.dtype, outer), ("", 1, ()))
        check_fit(bool(label) and len(packed.shape) == 2 and 0 not in packed.shape, tensors)
        m, n = packed.shape[0], 2 * packed.shape[1]
        fits = outer is None or (
            tensors[outer].info.dtype == "F32" and tensors[outer].info.shape in shapes
        )
        check_fit(fits and scales.shape == (m, n / size), tensors)
        keys = ("num_bits", "type", "group_size")
        stated = [(*map(w.get, keys), w.get("symmetric", True)) for w in stated_weights(config)]
        if (stated and (4, "float", size, True) not in stated) or config.get(
            "group_size", size
        ) != size:
            stated_as = f"(bits, type, group, symmetric) {stated or config['group_size']}"
            raise unsupported(
                tensors,
                f"{label} in groups of {size} that the quantization_config states as {stated_as}",
            )
        return cls(name, (m, n), dict(tensors), label, torch.float32, None, size)

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
        return Grid(
            _E2M1[_ASCENDING.int()], self._scales(i, j).repeat_interleave(self.group_size, 1)
        )


@dataclass(frozen=True)
class MXFP4(_E2M1Codes):
    """E2m1 values and exponents of a stack of matrices.

    gpt-oss stores ``<name>_blocks`` (experts, out, in / 32, 16) and ``<name>_scales`` (experts, out, in / 32). The model's own tensor is
    (experts, in, out).
    """

    turned: ClassVar[bool] = True

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Self:
        """Check that the tensors fit together, and make the weight that they store."""
        blocks, scales = tensors["weight"].info, tensors["scales"].info
        fits = (
            len(scales.shape) == 3
            and blocks.shape == (*scales.shape, GROUP // 2)
            and scales.dtype == "U8"
        )
        check_fit(fits, tensors)
        experts, out, groups, _ = blocks.shape
        return cls(
            name, (experts, groups * GROUP, out), dict(tensors), "MXFP4", torch.float32, None
        )

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``e2m1 · 2^(scale − 127)``, transposed."""
        first, last = i // GROUP, -(-j // GROUP)
        values = _values(self.tensors["weight"].whole()[:, first:last])  # (out, groups, 32)
        values.mul_(exponents(self.tensors["scales"].whole()[:, first:last])[..., None])
        return values.flatten(1).T[i - first * GROUP : j - first * GROUP].contiguous()

    def grid(self, i: int, j: int) -> Grid:
        """Return e2m1's values and the scale of each."""
        return Grid(
            _E2M1[_ASCENDING.int()],
            exponents(self.tensors["scales"].rows(i, j)).repeat_interleave(GROUP, 1),
        )

    def coded_rows(self, i: int, j: int) -> Tensor:
        """Decode outputs i to j of one expert."""
        return _values(self.tensors["weight"].rows(i, j)).flatten(1).mul_(self.grid(i, j).scales)


def _values(packed: Tensor) -> Tensor:
    """Unpack bytes along the last dimension, float32 in new memory."""
    return _E2M1[torch.stack([packed & 15, packed >> 4], -1).flatten(-2).int()]


LARGEST = 448.0
"""Largest e4m3 value."""

Rows = Callable[[int, int], Tensor]
"""Function that returns rows i to j of a matrix, float32, in new memory."""


@dataclass(frozen=True)
class FP8(Scaled):
    """E4m3 values and their scales."""

    def new_scales(self, merged: Rows) -> Tensor:
        """Choose scales for merged values, (block rows, block columns): each block's maximum over `LARGEST`, rounded as scales are stored.

        Raises
        ------
        NumericError
            If a value is NaN or Inf.
        """
        (bm, bn), n = self.block, self.shape[1]
        grid = torch.zeros_like(self.grid())
        for i, j in self.steps():
            values = merged(i, j)
            if not all_finite(values):
                raise NumericError(f"tensor {self.name!r}: {NOT_FINITE}")
            largest = (
                torch.nn.functional.pad(values.abs(), (0, -n % bn))
                .view(len(values), -1, bn)
                .amax(2)
            )
            grid.scatter_reduce_(
                0, (torch.arange(i, j) // bm)[:, None].expand_as(largest), largest, "amax"
            )
        quant_scale = torch.where(grid > 0, grid / LARGEST, 1.0)
        if self.powers:
            quant_scale = exponents(_exponent_bytes(quant_scale))
        if self.tensors["quant_scale"].info.dtype in EXPONENTS:
            return quant_scale
        dtype = TORCH_DTYPES[self.tensors["quant_scale"].info.dtype]
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        return quant_scale.clamp_min(smallest).to(dtype).to(torch.float32)

    def requantized(self, role: str, merged: Rows, grid: Tensor) -> Iterator[Tensor]:
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
    def of(cls, name: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Self:
        """Check that the tensors fit together, and make the weight that they store."""
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        if (
            version != "gemm"
            or config.get("bits", 4) != 4
            or config.get("zero_point", True) is not True
        ):
            bits, zero_point = config.get("bits"), config.get("zero_point")
            raise unsupported(tensors, f"AWQ with {bits=!r}, {zero_point=!r}, {version=!r}")
        weight, scales, zeros = (tensors[role].info.shape for role in ("weight", "scales", "zeros"))
        inputs = weight[0] if weight else 0
        size = group_size(config, inputs)
        groups = -(-inputs // size)
        fits = (
            len(weight) == 2 and scales == (groups, 8 * weight[1]) and zeros == (groups, weight[1])
        )
        check_fit(fits and has_packed_dtypes(tensors), tensors)
        return cls(
            name, (8 * weight[1], inputs), dict(tensors), "AWQ 4 bits", torch.float32, None, size
        )

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``(q − zero) · scale``, transposed."""
        first, last = i // 8, -(-j // 8)
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
    def of(cls, name: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Self:
        """Check that the tensors fit together, and make the weight that they store."""
        # transformers prefers the first key, GPTQModel the second, and vLLM reads only the first.
        formats = {
            str(config[k]).lower() for k in ("checkpoint_format", "format") if config.get(k)
        } or {"gptq"}
        if formats not in ({"gptq"}, {"gptq_v2"}):
            raise unsupported(tensors, f"GPTQ in the format {' and '.join(sorted(formats))}")
        weight, scales, zeros = (tensors[role].info.shape for role in ("weight", "scales", "zeros"))
        config = {**config, **_rule(config, name.removesuffix(".weight"), tensors)}
        bits = config.get("bits")
        check_fit(len(weight) == len(scales) == len(zeros) == 2, tensors)
        if (
            "groups" in tensors and weight[0]
        ):  # its length is the number of inputs, which gives the bits
            bits = weight[0] * 32 // max(1, math.prod(tensors["groups"].info.shape))
        if bits not in (2, 3, 4, 8):
            raise unsupported(tensors, f"GPTQ with {bits!r} bits")
        inputs, outputs = weight[0] * 32 // bits, weight[1]
        size = group_size(config, inputs)
        groups = scales[0] if "groups" in tensors else -(-inputs // size)
        fits = scales == (groups, outputs) and zeros == (groups, -(-outputs * bits // 32))
        fits &= weight[0] == -(-inputs * bits // 32) and has_packed_dtypes(tensors)
        if "groups" in tensors:
            fits &= (
                tensors["groups"].info.shape == (inputs,) and tensors["groups"].info.dtype == "I32"
            )
        check_fit(fits, tensors)
        label, less_one, symmetric = (
            f"GPTQ {bits} bits",
            formats == {"gptq"},
            config.get("sym") is True,
        )
        return cls(
            name,
            (outputs, inputs),
            dict(tensors),
            label,
            torch.float32,
            None,
            bits,
            size,
            less_one,
            symmetric,
        )

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
        words, bits = self.tensors["zeros"].whole(), self.bits
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
        stored = set(
            unpack(self.tensors["zeros"].whole().T, self.bits, 0, self.shape[0]).flatten().tolist()
        )
        if len(stored) > 1 or not stored <= {half, half - self.less_one}:
            raise unsupported(self.tensors, "a zero point other than that of sym=true")
        return half


def _rule(
    config: Mapping[str, Any], module: str, tensors: Mapping[str, StoredTensor]
) -> dict[str, Any]:
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
        raise FormatError(f"{where(tensors)}: {fault}") from None
    if pattern.startswith("-:"):
        raise unsupported(tensors, 'a quantized layer that a rule in "dynamic" excludes')
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
    def of(cls, name: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Self:
        """Check that the tensors fit together, and make the weight that they store."""
        words, scales, stated = (tensors[role].info for role in ("weight", "scales", "shape"))
        readable = stated.dtype in ("I64", "I32") and stated.shape == (2,)
        shape = tuple(tensors["shape"].whole().tolist()) if readable else ()
        if len(words.shape) != 2 or len(shape) != 2 or shape[0] != words.shape[0] or shape[1] < 1:
            raise unsupported(tensors, f"a packed weight of shape {list(words.shape)}")
        m, n = shape
        known = {
            b for w in stated_weights(config) if type(b := w.get("num_bits")) is int and 0 < b <= 8
        }
        if old := [
            b for b in known if 32 % b and n > 32 // b and -(-n // (32 // b)) == words.shape[1]
        ]:
            raise unsupported(
                tensors, f"packing of {listed(old)} bits by compressed-tensors up to 0.10"
            )
        fitting = [b for b in known or range(1, 9) if -(-n * b // 32) == words.shape[1]]
        fits = (
            words.dtype == "I32"
            and len(fitting) == 1
            and len(scales.shape) == 2
            and scales.shape[0] == m
        )
        check_fit(fits, tensors)
        bits, groups = fitting[0], scales.shape[1]
        sizes = [w.get("group_size") for w in stated_weights(config)]
        counts = {
            n // size if n % size == 0 else 0 for size in sizes if type(size) is int and size > 0
        }
        if counts and len(counts) == len(sizes) and groups not in counts:
            raise unsupported(
                tensors,
                f"{groups} groups of {n} inputs, which the stated sizes {sizes} do not divide so",
            )
        fits = scales.dtype in SCALE_DTYPES and groups > 0 and n % groups == 0
        if "zeros" in tensors:
            fits &= tensors["zeros"].info.dtype == "I32" and tensors["zeros"].info.shape == (
                -(-m * bits // 32),
                groups,
            )
        if "groups" in tensors:
            fits &= tensors["groups"].info.dtype == "I32" and tensors["groups"].info.shape == (n,)
        check_fit(fits, tensors)
        return cls(
            name,
            (m, n),
            dict(tensors),
            f"INT{bits} (compressed-tensors)",
            torch.float32,
            None,
            bits,
        )

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``(q − zero) · scale``."""
        grid, values = (
            self.grid(i, j),
            unpack(self.tensors["weight"].rows(i, j).T, self.bits, 0, self.shape[1]).T,
        )
        return values.to(torch.float32).sub_(grid.zeros).mul_(grid.scales)

    def grid(self, i: int, j: int) -> Grid:
        """Return the range of the integers, with the scale and the zero point of each value."""
        n, scales = self.shape[1], self.tensors["scales"].rows(i, j).to(torch.float32)
        count = scales.shape[1]
        group, stated = torch.arange(n) // -(-n // count), self.tensors.get("groups")
        if stated is not None and not bool((stated.whole() < 0).any()):  # −1 marks an unused g_idx
            group = group_indices(stated, count)
        stored, half = self.tensors.get("zeros"), float(1 << (self.bits - 1))
        zeros = (
            unpack(stored.whole(), self.bits, i, j)[:, group].to(torch.float32) if stored else half
        )
        return Grid(torch.arange(2.0 * half), scales[:, group], zeros)

    def packed(self, indices: Tensor) -> Tensor:
        """Pack each row into 32-bit words."""
        row = pack(indices, self.bits)
        return torch.nn.functional.pad(row, (0, -row.shape[1] % 4))


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
    def of(cls, name: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Self:
        """Check that the tensors fit together, and make the weight that they store."""
        wrong = [f"with {role!r}" for role in UNSUPPORTED if role in tensors]
        wrong += [
            f"without {role!r}"
            for role in ("scale", "zero", "shape", "packing")
            if role not in tensors
        ]
        if wrong:
            raise unsupported(tensors, f"HQQ {wrong[0]}")
        parts = {role: tensors[role] for role in ("weight", "scale", "zero", "shape")}
        packed, scale, zero, stated = (stored.info for stored in parts.values())
        fits = (stated.dtype, stated.shape) == ("I64", (2,)) and scale.dtype in SCALE_DTYPES
        fits &= (scale.dtype, scale.shape) == (zero.dtype, zero.shape)
        check_fit(fits and len(scale.shape) == 2 and min(scale.shape) == 1, parts)
        (m, n), groups = tensors["shape"].whole().tolist(), max(scale.shape)
        check_fit(m > 0 and n > 0 and m * n % groups == 0, parts)
        table = (groups, m * n // groups) if scale.shape[1] == 1 else (m * n // groups, groups)
        fitting = [packing for packing in _PACKINGS if _holds(packed, table, *packing)]
        check_fit(len(fitting) == 1, parts)
        dtype, bits, count = fitting[0]
        info = replace(packed, dtype=dtype, shape=(-(-table[0] // count), table[1]))
        stored = {**tensors, "weight": replace(tensors["weight"], info=info)}
        return cls(
            name, (m, n), stored, f"HQQ {bits} bits", torch.float32, None, table, bits, count
        )

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
        # Zero points and scales are a column if groups are rows of the table, else one row.
        parts = (self.tensors[role] for role in ("zero", "scale"))
        zero, scale = (
            part.whole() if part.info.shape[0] == 1 else part.rows(first, last) for part in parts
        )
        at, packed = torch.arange(first, last), -(-rows // self.count)
        words = self.tensors["weight"].whole()[at % packed]
        shift = (self.count - 1 - at // packed).mul_(self.bits).to(words.dtype)
        values = (
            words.bitwise_right_shift_(shift[:, None])
            .bitwise_and_((1 << self.bits) - 1)
            .to(scale.dtype)
        )
        start = i * n - first * columns
        return (
            values.sub_(zero)
            .mul_(scale)
            .to(torch.float32)
            .flatten()[start : start + (j - i) * n]
            .view(j - i, n)
        )

    def _check_settings(self) -> None:
        axis = int(self.tensors["scale"].info.shape[1] == 1)
        packing = f"{self.bits}bit_{'32' if self.bits == 3 else 'u8'}"
        for role, expected in {
            "packing": packing,
            "axis": axis,
            "group_size": self.table[axis],
        }.items():
            if (stored := self.tensors.get(role)) is not None:
                raw = bytes(stored.bytes(0, min(stored.info.nbytes, 16)).tolist())
                found = (
                    raw.decode("latin-1") if role == "packing" else int.from_bytes(raw, "little")
                )
                if found != expected:
                    fault = f"expected {expected!r} by the shapes of its HQQ layer, found {found!r}"
                    raise FormatError(
                        f"{self.where}: tensor {stored.info.name!r}: {fault}; get the file again"
                    )


def _holds(packed: TensorInfo, table: tuple[int, int], dtype: str, bits: int, count: int) -> bool:
    """Test whether a tensor holds a table in these words; the library may view them as floating-point values."""
    rows = -(-table[0] // count)
    whole = bits == 3 or rows * count == table[0]
    size = rows * table[1] * TORCH_DTYPES[dtype].itemsize
    return (
        whole
        and (packed.shape[:1], packed.nbytes) == ((rows,), size)
        and packed.dtype in (dtype, *SCALE_DTYPES)
    )


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
    def of(cls, name: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Self:
        """Check that the tensors fit together, and make the weight that they store."""
        state = _state(tensors)
        shape = state.get("shape")
        if not (isinstance(shape, list) and len(shape) == 2 and all(map(_is_count, shape))):
            raise unsupported(tensors, f"bitsandbytes with the shape {shape!r}")
        nested = "nested_absmax" in tensors
        blocksize, inner = state.get("blocksize"), state.get("nested_blocksize") if nested else 1
        offset = state.get("nested_offset", 0.0)
        if not (_is_count(blocksize) and _is_count(inner) and type(offset) in (int, float)):
            raise unsupported(
                tensors,
                f"a quant_state with {blocksize=!r}, nested_blocksize={inner!r}, {offset=!r}",
            )
        count = math.prod(shape)
        blocks = -(-count // blocksize)
        wanted = {"weight": -(-count // 2), "absmax": blocks * (1 if nested else 4), "map": 64}
        if nested:
            wanted |= {"nested_absmax": -(-blocks // inner) * 4, "nested_map": 1024}
        check_fit(wanted.keys() <= tensors.keys(), tensors)
        for role, size in wanted.items():
            info, dtype = tensors[role].info, "U8" if nested and role == "absmax" else "F32"
            check_fit(info.nbytes == size and (role == "weight" or info.dtype == dtype), tensors)
        kind = str(state.get("quant_type")).upper()
        return cls(
            name,
            tuple(shape),
            dict(tensors),
            kind,
            torch.float32,
            None,
            blocksize,
            inner,
            float(offset),
        )

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``quant_map[q] · absmax``."""
        n = self.shape[1]
        a, b = i * n, j * n
        packed = self.tensors["weight"].bytes(a // 2, -(-b // 2))
        quantized = torch.stack([packed >> 4, packed & 15], 1).flatten()[a % 2 :][: b - a]
        return (
            self.tensors["map"].flat(0, 16)[quantized.int()].view(j - i, n).mul_(self._scales(i, j))
        )

    def _scales(self, i: int, j: int) -> Tensor:
        """Decode the scale of each value of rows i to j."""
        n, size = self.shape[1], self.blocksize
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
        outer = self.tensors["nested_absmax"].flat(i // size, -(-j // size))[
            torch.arange(i, j) // size - i // size
        ]
        return values.mul_(outer).add_(self.offset)


@dataclass(frozen=True)
class EightBit(QuantizedWeight):
    """Int8 values with the largest magnitude of each row.

    ``W = q · SCB[row] / 127``.
    """

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Self:
        """Check that the tensors fit together, and make the weight that they store."""
        weight, quant_scale = tensors["weight"].info, tensors["SCB"].info
        fits = (
            len(weight.shape) == 2
            and quant_scale.dtype == "F32"
            and math.prod(quant_scale.shape) == weight.shape[0]
        )
        check_fit(fits, tensors)
        if "format" in tensors and bool(tensors["format"].bytes().any()):
            raise unsupported(
                tensors, "a weight_format other than 0 (rows), of bitsandbytes before 0.45,"
            )
        return cls(name, weight.shape, dict(tensors), "INT8 (bitsandbytes)", torch.float32, None)

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``q · SCB / 127``, multiplying as the library does."""
        quant_scale = self.tensors["SCB"].flat(i, j)
        return (
            self.tensors["weight"]
            .rows(i, j)
            .to(torch.float32)
            .mul_(quant_scale[:, None])
            .mul_(7.874015718698502e-3)
        )


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 < value < 2**62


def _state(tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Parse the JSON, a few hundred bytes, that bitsandbytes keeps in a tensor."""
    stored = tensors["state"]
    try:
        state = strict_json(stored.bytes(0, min(stored.info.nbytes, 1 << 16)).numpy().tobytes())
    except ValueError as e:
        raise FormatError(
            f"{where(tensors)}: its quant_state is not JSON: {e}; get the file again"
        ) from None
    return state if isinstance(state, dict) else {}
