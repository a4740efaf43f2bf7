"""Decode quantized values with one scale for each tensor, row (channel), or block of rows and columns: FP8 e4m3, and int8.

``W = q · scale`` in float32, under every name of the scale: ``weight_scale`` and ``weight_scale_inv`` (the "inverse" of the quantizer's
factor). Scales are stored as floating-point values or as e8m0 exponents.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from streamer.errors import FormatError, UnsupportedError
from streamer.weights.base import QuantizedWeight, StoredTensor

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
        if not blocks:
            raise FormatError(
                f"{where}: shape {list(weight.shape)} and scale {list(quant_scale.shape)} do not fit; get index and shards of one version"
            )
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
    return [
        (int(m), int(n)) for m, n in pairs if re.fullmatch("[1-9][0-9]{0,8}", m) and re.fullmatch("[1-9][0-9]{0,8}", n)
    ]


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
