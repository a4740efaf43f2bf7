"""Decode GPTQ: integers of 2, 3, 4 or 8 bits in 32-bit words, with a scale and a zero point for each group of inputs and each output.

``W[out, in] = (q[in, out] − zero[g, out]) · scale[g, out]``, where g is the group of the input; stored transposed, inputs first. Values are
packed along the inputs and zero points along the outputs, as in `packing`. The first version of the format stores zero points less one.
GPTQModel subtracts a one from each by a subtraction of whole words: a zero point of 0 borrows from the next, which only the addition of
the same words undoes. Zero points of 3 bits, some of which lie in two words, wrap around instead.

The config's ``dynamic`` holds rules for single modules, which GPTQModel, vLLM and SGLang read in the same way: the first regular expression
that matches a module's name from its start applies. They take the format from the config alone, whatever a rule says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
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
        Whether all of them are said to be half of the range.
    """

    bits: int
    group_size: int
    less_one: bool
    symmetric: bool

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Self:
        """Check that the tensors fit together, and make the weight that they store."""
        where = f"{tensors['weight'].file.path}: tensor {tensors['weight'].info.name!r}"
        # transformers prefers the first key, GPTQModel the second, and vLLM reads only the first.
        stated = {key: str(config[key]).lower() for key in ("checkpoint_format", "format") if config.get(key)}
        formats = {*stated.values()} or {"gptq"}
        if formats not in ({"gptq"}, {"gptq_v2"}):
            found = ", ".join(f"{key}={value!r}" for key, value in stated.items())
            raise UnsupportedError(f"{where}: format must be gptq or gptq_v2, found {found}; use the 16-bit model")
        weight, scales, zeros = (tensors[role].info.shape for role in ("weight", "scales", "zeros"))
        config = {**config, **_rule(config, name.removesuffix(".weight"), where)}
        bits = config.get("bits")
        if len(weight) != 2 or len(scales) != 2 or len(zeros) != 2:
            raise FormatError(f"{where}: expected matrices of codes, scales and zero points; get the file again")
        if "groups" in tensors and weight[0]:  # its length is the number of inputs, which gives the bits
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
        label, less_one, symmetric = f"GPTQ {bits} bits", formats == {"gptq"}, config.get("sym") is True
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
        words, bits = self.tensors["zeros"].whole(), self.bits
        if self.symmetric:
            return torch.full((len(words), j - i), self._half, dtype=torch.int32)
        if self.less_one and bits != 3:
            words = words + sum(1 << at for at in range(0, 32, bits))  # int32 sums wrap around
        zeros = packing.unpack(words.T, bits, i, j).T
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
        stored = set(packing.unpack(self.tensors["zeros"].whole().T, self.bits, 0, self.shape[0]).flatten().tolist())
        if len(stored) > 1 or not stored <= {half, half - self.less_one}:
            where = f"{self.where}: {self.name!r}"
            raise UnsupportedError(f"{where}: its zero points are not those of sym=true; use the 16-bit model")
        return half


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern[2:] if pattern.startswith(("-:", "+:")) else pattern)


def _rule(config: Mapping[str, Any], module: str, where: str) -> dict[str, Any]:
    """Read the settings that the first matching rule of ``dynamic`` gives a module."""
    try:
        rules = (config.get("dynamic") or {}).items()
        none: tuple[str, dict[str, Any]] = ("", {})
        pattern, rule = next(((p, r) for p, r in rules if _expression(p).match(module)), none)
        settings = {key: rule[key] for key in ("bits", "group_size", "sym") if key in rule}
    except (AttributeError, TypeError, OverflowError, RecursionError, re.error):
        raise FormatError(f'{where}: cannot read "dynamic" in the quantization config; get config.json again') from None
    if pattern.startswith("-:"):
        raise UnsupportedError(f'{where}: a rule in "dynamic" says that it is not quantized; use the 16-bit model')
    return settings
