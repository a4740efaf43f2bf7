"""Decode compressed-tensors' packed integers: 1 to 8 bits in 32-bit words, with a scale for each output and each group of inputs.

``W[out, in] = (q[out, in] − zero[out, g]) · scale[out, g]``, where g is the group of the input. Values are packed along the inputs and zero
points along the outputs, as in `packing`; without stored zero points, the zero point is half of the range. `scaled_codes` decodes the
library's int8 and FP8 formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from streamer.errors import UnsupportedError
from streamer.units import listed
from streamer.weights.base import QuantizedWeight, StoredTensor
from streamer.weights.quantization import packing
from streamer.weights.quantization.scaled_codes import stated_weights


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
        packing.check_fit(fits, tensors, where)
        bits, groups = fitting[0], scales.shape[1]
        fits = scales.dtype in packing.SCALE_DTYPES and 0 < groups <= n
        if "zeros" in tensors:
            fits &= tensors["zeros"].info.dtype == "I32" and tensors["zeros"].info.shape == (-(-m * bits // 32), groups)
        if "groups" in tensors:
            fits &= tensors["groups"].info.dtype == "I32" and tensors["groups"].info.shape == (n,)
        packing.check_fit(fits, tensors, where)
        return cls(name, (m, n), dict(tensors), f"INT{bits} (compressed-tensors)", torch.float32, None, bits)

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``(q − zero) · scale``."""
        n, scales = self.shape[1], self.tensors["scales"].rows(i, j).to(torch.float32)
        values = packing.unpack(self.tensors["weight"].rows(i, j).T, self.bits, 0, n).T
        count = scales.shape[1]
        group = torch.arange(n) // -(-n // count)
        if "groups" in self.tensors and not bool(
            (self.tensors["groups"].whole() < 0).any()
        ):  # −1 marks an unused g_idx
            group = packing.group_indices(self.tensors["groups"], count)
        stored = self.tensors.get("zeros")
        zeros = packing.unpack(stored.whole(), self.bits, i, j)[:, group] if stored else 1 << (self.bits - 1)
        return values.sub(zeros).to(torch.float32).mul_(scales[:, group])
