"""FP8 weights: e4m3 codes times a scale, which a tensor, a row (a channel), or a block of rows and columns shares.

``W = code · scale`` in float32 under every name that the scale goes by: ``weight_scale_inv`` (the "inverse" of what the quantizer
multiplied with) and ``weight_scale``. Scales stand as floating-point values or as e8m0 exponents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from streamer.bases.weight import DECODED_BYTES, Coded, Part
from streamer.encodings import TORCH_DTYPES
from streamer.errors import FormatError, NumericError, UnsupportedError
from streamer.linalg.operators import all_finite

LARGEST = 448.0
"""The largest e4m3 value."""

_EXPONENTS = ("F8_E8M0", "U8")

Rows = Callable[[int, int], Tensor]
"""Rows i to j of a matrix, float32."""


@dataclass(frozen=True)
class FP8(Coded):
    """E4m3 codes and their scales.

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
    def of(cls, name: str, parts: Mapping[str, Part], config: Mapping[str, Any]) -> Self:
        """The weight of these tensors; `config` is the model's ``quantization_config``."""
        weight, scale = parts["weight"].info, parts["scale"].info
        where = f"{parts['weight'].file.path}: tensor {name!r}"
        if len(weight.shape) not in (2, 3):
            raise UnsupportedError(f"{where}: FP8 weights of {len(weight.shape)} dimensions are not supported")
        if scale.dtype not in ("F32", "BF16", "F16", *_EXPONENTS):
            raise UnsupportedError(
                f"{where}: its scale {scale.name!r} is of dtype {scale.dtype}, which is not supported"
            )
        block = _block(weight.shape, scale.shape, _stated_block(config))
        if block is None:
            raise FormatError(
                f"{where}: shape {list(weight.shape)} and scale {list(scale.shape)} do not fit; get index and shards of one version"
            )
        m, n = weight.shape[-2:]
        kind = "tensor" if block == (m, n) else "channel" if block == (1, n) else f"{block[0]}x{block[1]}"
        powers = scale.dtype in _EXPONENTS or config.get("scale_fmt") == "ue8m0"
        return cls(name, weight.shape, dict(parts), f"F8_E4M3 ({kind})", torch.float32, None, block, powers)

    def decode(self, i: int, j: int) -> Tensor:
        """``code · scale``."""
        values = self.parts["weight"].rows(i, j).to(torch.float32)
        return self._by_block(values, self._grid(), i, torch.Tensor.mul_)

    def _grid(self) -> Tensor:
        """The scales in float32, (block rows, block columns)."""
        part = self.parts["scale"]
        (m, n), (bm, bn) = self.shape[-2:], self.block
        values = exponents(part.bytes()) if part.info.dtype in _EXPONENTS else part.whole().to(torch.float32)
        return values.reshape(-(-m // bm), -(-n // bn))

    def _by_block(self, values: Tensor, grid: Tensor, i: int, act: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Act in place on rows that begin at i with each value's own scale."""
        (bm, bn), n = self.block, values.shape[1]
        scales, whole = grid[torch.arange(i, i + len(values)) // bm], n // bn
        act(values[:, : whole * bn].view(len(values), whole, bn), scales[:, :whole, None])
        act(values[:, whole * bn :], scales[:, whole:].expand(-1, n - whole * bn))
        return values

    def rescaled(self, merged: Rows) -> Tensor:
        """Scales for other values: the largest of each block over `LARGEST`, rounded as the scale is stored; (block rows, block columns).

        Raises
        ------
        NumericError
            If a value has become NaN or Inf.
        """
        (bm, bn), n = self.block, self.shape[1]
        grid = torch.zeros_like(self._grid())
        for i, j in self._steps():
            values = merged(i, j)
            if not all_finite(values):
                raise NumericError(
                    f"tensor {self.name!r}: the result holds NaN or Inf; check the adapter's scale and lambda"
                )
            largest = torch.nn.functional.pad(values.abs(), (0, -n % bn)).view(len(values), -1, bn).amax(2)
            grid.scatter_reduce_(0, (torch.arange(i, j) // bm)[:, None].expand_as(largest), largest, "amax")
        scale = torch.where(grid > 0, grid / LARGEST, 1.0)
        if self.powers:
            scale = exponents(_exponent_bytes(scale))
        if self.parts["scale"].info.dtype in _EXPONENTS:
            return scale
        dtype = TORCH_DTYPES[self.parts["scale"].info.dtype]
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        return scale.clamp_min(smallest).to(dtype).to(torch.float32)

    def recoded(self, role: str, merged: Rows, grid: Tensor) -> Iterator[Tensor]:
        """What stands in one of the parts for other values with the scales of `rescaled`: codes to the nearest, or the scales."""
        if role == "scale":
            dtype = self.parts["scale"].info.dtype
            yield _exponent_bytes(grid) if dtype in _EXPONENTS else grid.to(TORCH_DTYPES[dtype])
            return
        for i, j in self._steps():
            scaled = self._by_block(merged(i, j), grid, i, torch.Tensor.div_)
            yield scaled.clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)

    def _steps(self) -> Iterator[tuple[int, int]]:
        m, n = self.matrix
        step = max(1, DECODED_BYTES // (4 * n))
        return ((i, min(m, i + step)) for i in range(0, m, step))


def exponents(codes: Tensor) -> Tensor:
    """E8m0 bytes as float32: ``2^(byte − 127)``, and 255 is NaN. By the bits, since no power function need be exact."""
    bits = codes.to(torch.int32)
    values = torch.where(bits == 0, 1 << 22, bits << 23).view(torch.float32)  # 2^-127 is subnormal
    return torch.where(bits == 255, float("nan"), values)


def _exponent_bytes(values: Tensor) -> Tensor:
    """The least powers of two that are not smaller, as e8m0 bytes."""
    mantissa, exponent = torch.frexp(values)  # mantissa in [0.5, 1)
    return (exponent - (mantissa == 0.5).int() + 127).clamp(0, 254).to(torch.uint8)


def _stated_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The block that a quantization config states, of transformers' own kind or of compressed-tensors'."""
    groups = config.get("config_groups")
    weights = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    stated = [config.get("weight_block_size"), *(w.get("block_structure") for w in weights if isinstance(w, dict))]
    for size in stated:
        if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
            return size[0], size[1]
    return None


def _block(shape: tuple[int, ...], scale: tuple[int, ...], stated: tuple[int, int] | None) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None if the shapes do not fit.

    What the config states is taken where it fits, then what divides evenly: one checkpoint may hold two kinds of blocks.
    """
    m, n = shape[-2:]
    stack = math.prod(shape[:-2])
    if math.prod(scale) == stack:
        return m, n
    grid = (*scale, 1) if len(scale) == len(shape) - 1 else scale  # one a row, without a dimension for columns
    if len(grid) != len(shape) or grid[:-2] != shape[:-2]:
        return None
    gm, gn = grid[-2:]
    even = [(m // gm, n // gn)] if gm and gn and m % gm == 0 and n % gn == 0 else []
    for bm, bn in [*([stated] if stated else []), *even, (128, 128)]:
        if (-(-m // bm), -(-n // bn)) == (gm, gn):
            return min(bm, m), min(bn, n)
    return None
