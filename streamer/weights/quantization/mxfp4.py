"""Decode gpt-oss's MXFP4: stacks of matrices in FP4 (e2m1), where each 32 values share one power of two.

On disk, ``<name>_blocks`` (experts, out, in / 32, 16) holds two values in a byte, the first in the low bits, and ``<name>_scales``
(experts, out, in / 32) holds the exponents. The model's own tensor is (experts, in, out).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from streamer.errors import FormatError
from streamer.weights.base import QuantizedWeight, StoredTensor
from streamer.weights.quantization.scaled_codes import exponents

GROUP = 32

_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@dataclass(frozen=True)
class MXFP4(QuantizedWeight):
    """E2m1 values and their exponents."""

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Self:
        """Check that the tensors fit together, and make the weight that they store."""
        blocks, scales = tensors["weight"].info, tensors["scales"].info
        if len(scales.shape) != 3 or blocks.shape != (*scales.shape, GROUP // 2) or scales.dtype != "U8":
            raise FormatError(
                f"{tensors['weight'].file.path}: tensor {blocks.name!r}: shape {list(blocks.shape)} and scales {list(scales.shape)} of "
                f"{scales.dtype} do not fit; get index and shards of one version"
            )
        experts, out, groups, _ = blocks.shape
        return cls(name, (experts, groups * GROUP, out), dict(tensors), "MXFP4", torch.float32, None)

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``e2m1 · 2^(scale − 127)``, transposed."""
        first, last = i // GROUP, -(-j // GROUP)
        packed = self.tensors["weight"].whole()[:, first:last]
        quantized = torch.stack([packed & 15, packed >> 4], -1).flatten(2)  # (out, groups, 32)
        values = _E2M1[quantized.int()].mul_(exponents(self.tensors["scales"].whole()[:, first:last])[..., None])
        return values.flatten(1).T[i - first * GROUP : j - first * GROUP].contiguous()
