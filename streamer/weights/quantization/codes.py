"""Apply scales and zero points to stored codes: integers, FP8 and FP4.

Unpack integers in 32-bit words and apply scales and zero points by group, as GPTQ, AWQ and compressed-tensors all do.

Decode quantized values with one scale for each tensor, row (channel), or block of rows and columns: FP8 e4m3, and int8.

``W = q · scale`` in float32, under every name of the scale: ``weight_scale`` and ``weight_scale_inv`` (the "inverse" of the quantizer's
factor). Scales are stored as floating-point values or as e8m0 exponents.

Decode FP4 (e2m1), two values in a byte, the first in the low bits: NVFP4 and MXFP4 matrices, and gpt-oss's MXFP4 expert stacks.

A matrix is stored as (out, in / 2) bytes and one scale for each group of inputs. MXFP4 has groups of 32, whose scales are powers of two.
NVFP4 has groups of 16, whose scales are e4m3, and one float32 scale for the tensor: ``W = q · (scale / weight_global_scale)`` in
compressed-tensors, ``W = q · (scale · weight_scale_2)`` in ModelOpt, as NVIDIA's published source computes it.

gpt-oss stores ``<name>_blocks`` (experts, out, in / 32, 16) and ``<name>_scales`` (experts, out, in / 32). The model's own tensor is
(experts, in, out).

Decode FP8 e4m3 by blocks, and quantize merged values again with new scales.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from streamer.errors import FormatError, NumericError, UnsupportedError
from streamer.linalg.operators import all_finite
from streamer.weights.base import DECODED_BYTES, TORCH_DTYPES, QuantizedWeight, StoredTensor

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
            f"{stored.file.path}: tensor {stored.info.name!r}: names groups that do not exist; get the file again"
        )
    return group


def check_fit(fits: bool, tensors: Mapping[str, StoredTensor], where: str) -> None:
    """Refuse tensors of one weight whose dtypes or shapes contradict each other.

    Raises
    ------
    FormatError
        If not `fits`; the message lists the tensors.
    """
    if not fits:
        found = ", ".join(f"{p.info.name} {p.info.dtype} {list(p.info.shape)}" for p in tensors.values())
        raise FormatError(
            f"{where}: codes, scales and zero points do not fit: {found}; get the file again, and its config.json"
        )


EXPONENTS = ("F8_E8M0", "U8")


@dataclass(frozen=True)
class Scaled(QuantizedWeight):
    """Quantized values with scales.

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
        where = f"{tensors['weight'].file.path}: tensor {name!r}"
        if len(weight.shape) not in (2, 3):
            raise UnsupportedError(
                f"{where}: {weight.dtype} weights of {len(weight.shape)} dimensions are not supported"
            )
        if "zeros" in tensors and bool(tensors["zeros"].bytes().any()):
            raise UnsupportedError(f"{where}: zero points other than 0 are not supported here; use the 16-bit model")
        if quant_scale.dtype not in ("F32", "BF16", "F16", *EXPONENTS):
            raise UnsupportedError(
                f"{where}: its scale {quant_scale.name!r} is of dtype {quant_scale.dtype}, which is not supported"
            )
        blocks = _blocks(weight.shape, quant_scale.shape, _stated_blocks(config))
        if len(blocks) > 1:
            raise UnsupportedError(
                f"{where}: blocks of {' and of '.join(f'{bm}x{bn}' for bm, bn in blocks)} fit shape {list(weight.shape)} and scale "
                f"{list(quant_scale.shape)}; state one as weight_block_size in the quantization_config"
            )
        check_fit(bool(blocks), tensors, where)
        mx = quant_scale.dtype in EXPONENTS or config.get("format") == "mxfp8-quantized"
        sizes = [w.get("group_size") for w in stated_weights(config)] or [32]
        fits = (weight.dtype, quant_scale.dtype, blocks) == ("F8_E4M3", "U8", [(1, 32)]) and 32 in sizes
        if mx and config.get("quant_method") == "compressed-tensors" and not fits:
            raise UnsupportedError(
                f"{where}: expected MXFP8, F8_E4M3 with a U8 scale for 32 inputs, found {weight.dtype} {list(weight.shape)} with "
                f"{quant_scale.dtype} {list(quant_scale.shape)}, for {sizes} inputs by the config; use the 16-bit model"
            )
        (m, n), (block,) = weight.shape[-2:], blocks
        kind = "tensor" if block == (m, n) else "channel" if block == (1, n) else f"{block[0]}x{block[1]}"
        powers = quant_scale.dtype in EXPONENTS or config.get("scale_fmt") == "ue8m0"
        return cls(name, weight.shape, dict(tensors), f"{weight.dtype} ({kind})", torch.float32, None, block, powers)

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``q · scale``."""
        values = self.tensors["weight"].rows(i, j).to(torch.float32)
        return self.by_block(values, self.grid(), i, torch.Tensor.mul_)

    def grid(self) -> Tensor:
        """Decode the scales to float32, (block rows, block columns)."""
        stored = self.tensors["quant_scale"]
        (m, n), (bm, bn) = self.shape[-2:], self.block
        values = exponents(stored.bytes()) if stored.info.dtype in EXPONENTS else stored.whole().to(torch.float32)
        return values.reshape(-(-m // bm), -(-n // bn))

    def by_block(self, values: Tensor, grid: Tensor, i: int, act: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
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
    weights = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    return [w for w in weights if isinstance(w, dict)]


def _stated_blocks(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """List the block sizes that a quantization config of transformers, compressed-tensors or ModelOpt states."""
    stated = [config.get("weight_block_size"), *(w.get("block_structure") for w in stated_weights(config))]
    # compressed-tensors before 0.11 wrote "128x128"; ModelOpt's algorithm has one size.
    sizes = [size.split("x") if isinstance(size, str) else size for size in stated]
    sizes += [["128", "128"]] * (config.get("quant_algo") == "FP8_PB_WO")
    pairs = [[*map(str, size)] for size in sizes if isinstance(size, list) and len(size) == 2]
    return [(int(m), int(n)) for m, n in pairs if all(re.fullmatch("[1-9][0-9]{0,8}", size) for size in (m, n))]


def _blocks(shape: tuple[int, ...], grid: tuple[int, ...], stated: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
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
        fits = [(min(bm, m), min(bn, n)) for bm, bn in sizes if (-(-m // bm), -(-n // bn)) == (gm, gn)]
        if fits:
            return list(dict.fromkeys(fits))
    return []


GROUP = 32

_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

_KINDS = {
    # Dtype of the scales and role of the tensor's own scale → name, inputs in a group, shapes of the tensor's scale.
    ("U8", None): ("MXFP4 (compressed-tensors)", GROUP, ()),
    ("F8_E4M3", "divisor"): ("NVFP4 (compressed-tensors)", 16, ((1,),)),
    ("F8_E4M3", "factor"): ("NVFP4 (ModelOpt)", 16, ((), (1,))),
}


@dataclass(frozen=True)
class PackedFP4(QuantizedWeight):
    """E2m1 values of a matrix.

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
        where = f"{tensors['weight'].file.path}: tensor {packed.name!r}"
        if "extra" in tensors:
            raise UnsupportedError(
                f"{where}: FP4 with {tensors['extra'].info.name!r} is not supported; use the 16-bit model"
            )
        outer = next((role for role in ("divisor", "factor") if role in tensors), None)
        label, size, shapes = _KINDS.get((scales.dtype, outer), ("", 1, ()))
        check_fit(bool(label) and len(packed.shape) == 2 and 0 not in packed.shape, tensors, where)
        m, n = packed.shape[0], 2 * packed.shape[1]
        fits = outer is None or (tensors[outer].info.dtype == "F32" and tensors[outer].info.shape in shapes)
        check_fit(fits and scales.shape == (m, n / size), tensors, where)
        keys = ("num_bits", "type", "group_size")
        stated = [(*map(w.get, keys), w.get("symmetric", True)) for w in stated_weights(config)]
        if (stated and (4, "float", size, True) not in stated) or config.get("group_size", size) != size:
            raise UnsupportedError(
                f"{where}: stored as {label} in groups of {size}, but the quantization_config states (bits, type, group, symmetric) "
                f"{stated or config['group_size']}; get both of one version"
            )
        return cls(name, (m, n), dict(tensors), label, torch.float32, None, size)

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``e2m1 · scale``."""
        stored = self.tensors["scales"].rows(i, j)
        scales = exponents(stored) if stored.dtype == torch.uint8 else stored.to(torch.float32)
        if "divisor" in self.tensors:
            scales /= self.tensors["divisor"].whole()
        if "factor" in self.tensors:
            scales *= self.tensors["factor"].whole()
        values = _values(self.tensors["weight"].rows(i, j)).view(*scales.shape, self.group_size)
        return values.mul_(scales[..., None]).flatten(1)


@dataclass(frozen=True)
class MXFP4(QuantizedWeight):
    """E2m1 values and exponents of a stack of matrices."""

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Self:
        """Check that the tensors fit together, and make the weight that they store."""
        blocks, scales = tensors["weight"].info, tensors["scales"].info
        fits = len(scales.shape) == 3 and blocks.shape == (*scales.shape, GROUP // 2) and scales.dtype == "U8"
        check_fit(fits, tensors, f"{tensors['weight'].file.path}: tensor {blocks.name!r}")
        experts, out, groups, _ = blocks.shape
        return cls(name, (experts, groups * GROUP, out), dict(tensors), "MXFP4", torch.float32, None)

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``e2m1 · 2^(scale − 127)``, transposed."""
        first, last = i // GROUP, -(-j // GROUP)
        values = _values(self.tensors["weight"].whole()[:, first:last])  # (out, groups, 32)
        values.mul_(exponents(self.tensors["scales"].whole()[:, first:last])[..., None])
        return values.flatten(1).T[i - first * GROUP : j - first * GROUP].contiguous()


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
        for i, j in self._steps():
            values = merged(i, j)
            if not all_finite(values):
                raise NumericError(
                    f"tensor {self.name!r}: the result holds NaN or Inf; check the adapter's scale and lambda"
                )
            largest = torch.nn.functional.pad(values.abs(), (0, -n % bn)).view(len(values), -1, bn).amax(2)
            grid.scatter_reduce_(0, (torch.arange(i, j) // bm)[:, None].expand_as(largest), largest, "amax")
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
        for i, j in self._steps():
            scaled = self.by_block(merged(i, j), grid, i, torch.Tensor.div_)
            yield scaled.clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)

    def _steps(self) -> Iterator[tuple[int, int]]:
        m, n = self.matrix
        step = max(1, DECODED_BYTES // (4 * n))
        return ((i, min(m, i + step)) for i in range(0, m, step))


def _exponent_bytes(values: Tensor) -> Tensor:
    """Round up to powers of two, as e8m0 bytes."""
    mantissa, exponent = torch.frexp(values)  # mantissa in [0.5, 1)
    return (exponent - (mantissa == 0.5).int() + 127).clamp(0, 254).to(torch.uint8)
