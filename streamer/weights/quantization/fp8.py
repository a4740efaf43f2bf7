"""Decode FP8 e4m3 as in `scaled_codes`, and quantize merged values again with new scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from streamer.errors import NumericError
from streamer.linalg.operators import all_finite
from streamer.weights.base import DECODED_BYTES
from streamer.weights.dtypes import TORCH_DTYPES
from streamer.weights.quantization.scaled_codes import EXPONENTS, Scaled, exponents

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
