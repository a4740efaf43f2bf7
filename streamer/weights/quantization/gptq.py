"""Decode GPTQ: integers of 2, 3, 4 or 8 bits in 32-bit words, with a scale and a zero point for each group of inputs and each output.

``W[out, in] = (q[in, out] − zero[g, out]) · scale[g, out]``, where g is the group of the input; stored transposed, inputs first. Values are
packed along the inputs and zero points along the outputs, as in `packing`. The first version of the format stores zero points less one.
GPTQModel subtracts a one from each by a subtraction of whole words: a zero point of 0 borrows from the next, which only the addition of
the same words undoes. Zero points of 3 bits, some of which lie in two words, wrap around instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from streamer.errors import FormatError, UnsupportedError
from streamer.weights.base import QuantizedWeight, StoredTensor
from streamer.weights.quantization import packing


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
        Whether they are said to be half of the range.
    """

    bits: int
    group_size: int
    less_one: bool
    symmetric: bool

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Self:
        """Check that the tensors fit together, and make the weight that they store."""
        where = f"{tensors['weight'].file.path}: tensor {tensors['weight'].info.name!r}"
        stated = config.get("checkpoint_format") or config.get("format") or "gptq"
        if stated not in ("gptq", "gptq_v2"):
            raise UnsupportedError(f"{where}: GPTQ format {stated!r} is not supported; use the 16-bit model")
        weight, scales, zeros = (tensors[role].info.shape for role in ("weight", "scales", "zeros"))
        bits = config.get("bits")
        if len(weight) != 2 or len(scales) != 2 or len(zeros) != 2:
            raise FormatError(f"{where}: expected matrices of codes, scales and zero points; get the file again")
        if (
            "groups" in tensors and weight[0]
        ):  # its length is the number of inputs, which gives the bits; these may differ by layer
            bits = weight[0] * 32 // max(1, math.prod(tensors["groups"].info.shape))
        if bits not in (2, 3, 4, 8):
            raise UnsupportedError(f"{where}: GPTQ with {bits!r} bits is not supported")
        inputs, outputs = weight[0] * 32 // bits, weight[1]
        size = packing.group_size(config, inputs)
        groups = scales[0] if "groups" in tensors else -(-inputs // size)
        fits = scales == (groups, outputs) and zeros == (groups, -(-outputs * bits // 32))
        fits &= weight[0] == -(-inputs * bits // 32) and packing.has_packed_dtypes(tensors)
        if "groups" in tensors:
            fits &= tensors["groups"].info.shape == (inputs,) and tensors["groups"].info.dtype == "I32"
        packing.check_fit(fits, tensors, where)
        label, less_one, symmetric = f"GPTQ {bits} bits", stated == "gptq", config.get("sym") is True
        return cls(name, (outputs, inputs), dict(tensors), label, torch.float32, None, bits, size, less_one, symmetric)

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``(q − zero) · scale``, transposed."""
        values = packing.unpack(self.tensors["weight"].whole()[:, i:j], self.bits, 0, self.shape[1])
        zeros = self._zeros(i, j)
        if "groups" in self.tensors:
            group = packing.group_indices(self.tensors["groups"], self.tensors["scales"].info.shape[0])
        else:
            group = torch.arange(self.shape[1]) // self.group_size
        return packing.dequantize_groups(values, zeros, self.tensors["scales"].whole()[:, i:j], group)

    def _zeros(self, i: int, j: int) -> Tensor:
        """Unpack the zero points of outputs i to j: (groups, j − i)."""
        words, bits, less_one = self.tensors["zeros"].whole(), self.bits, self.less_one
        if less_one and self.symmetric and words.numel():
            # Symmetric zero points are half of the range. Some models of GPTQModel 5 store them so and state "gptq", such as
            # Qwen3.5-27B-GPTQ-Int4 (vLLM's pull request 38966); kernels for symmetric codes never read them.
            less_one = int(packing.unpack(words[:1].T, bits, 0, 1)) != 1 << (bits - 1)
        if less_one and bits != 3:
            words = words + sum(1 << at for at in range(0, 32, bits))  # int32 sums wrap around
        zeros = packing.unpack(words.T, bits, i, j).T
        return (zeros + 1) & 7 if less_one and bits == 3 else zeros
