"""Decode FP4 (e2m1), two values in a byte, the first in the low bits: NVFP4 and MXFP4 matrices, and gpt-oss's MXFP4 expert stacks.

A matrix is stored as (out, in / 2) bytes and one scale for each group of inputs. MXFP4 has groups of 32, whose scales are powers of two.
NVFP4 has groups of 16, whose scales are e4m3, and one float32 scale for the tensor: ``W = q · (scale / weight_global_scale)`` in
compressed-tensors, ``W = q · (scale · weight_scale_2)`` in ModelOpt, as NVIDIA's published source computes it.

gpt-oss stores ``<name>_blocks`` (experts, out, in / 32, 16) and ``<name>_scales`` (experts, out, in / 32). The model's own tensor is
(experts, in, out).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from streamer.errors import FormatError, UnsupportedError
from streamer.weights.base import QuantizedWeight, StoredTensor
from streamer.weights.quantization.packing import check_fit
from streamer.weights.quantization.scaled_codes import exponents, stated_weights

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
        values = _values(self.tensors["weight"].whole()[:, first:last])  # (out, groups, 32)
        values.mul_(exponents(self.tensors["scales"].whole()[:, first:last])[..., None])
        return values.flatten(1).T[i - first * GROUP : j - first * GROUP].contiguous()


def _values(packed: Tensor) -> Tensor:
    """Unpack bytes along the last dimension, float32 in new memory."""
    return _E2M1[torch.stack([packed & 15, packed >> 4], -1).flatten(-2).int()]
