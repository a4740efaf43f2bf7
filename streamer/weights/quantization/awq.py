"""Decode AWQ (gemm): 4-bit integers in 32-bit words, with a scale and a zero point for each group of inputs and each output.

``W[out, in] = (q[in, out] − zero[g, out]) · scale[g, out]``, where g is the group of the input; stored transposed, inputs first. Values and
zero points are packed along the outputs, eight to a word, in the order of `AWQ_ORDER`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from streamer.errors import UnsupportedError
from streamer.weights.base import QuantizedWeight, StoredTensor
from streamer.weights.quantization import packing

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
        size = packing.group_size(config, inputs)
        groups = -(-inputs // size)
        fits = len(weight) == 2 and scales == (groups, 8 * weight[1]) and zeros == (groups, weight[1])
        packing.check_fit(fits and packing.has_packed_dtypes(tensors), tensors, where)
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
        return packing.dequantize_groups(unpacked("weight"), unpacked("zeros"), scales, group)
