"""GPTQ, AWQ and compressed-tensors: integers in 32-bit words, with a scale and a zero point for each group of inputs and each output.

``W[out, in] = (code[in, out] − zero[g, out]) · scale[g, out]`` with g the group of the input; computed in float32, where the product
with a 16-bit scale is exact. The first two stand transposed, inputs first.

GPTQ packs codes along the inputs, and zero points along the outputs, as one stream of bits over 32-bit words; its first format stores
zero points less one. AWQ packs both along the outputs, eight to a word, in the order of `AWQ_ORDER`.
compressed-tensors packs as GPTQ does; where it keeps no zero points, they are half of the range.
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

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place in a word of the eight outputs that it holds."""

_SCALES = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class GPTQ(QuantizedWeight):
    """Codes along the inputs.

    Attributes
    ----------
    bits
        2, 3, 4 or 8.
    group_size
        Inputs to a group, where no ``g_idx`` says it for each.
    offset
        What is added to a stored zero point.
    """

    bits: int
    group_size: int
    offset: int

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Self:
        """The weight of these tensors."""
        where = f"{tensors['weight'].file.path}: tensor {tensors['weight'].info.name!r}"
        stated = config.get("checkpoint_format") or config.get("format") or "gptq"
        if stated not in ("gptq", "gptq_v2"):
            raise UnsupportedError(f"{where}: GPTQ format {stated!r} is not supported; use the 16-bit model")
        weight, scales, zeros = (tensors[role].info.shape for role in ("weight", "scales", "zeros"))
        bits = config.get("bits")
        if len(weight) != 2 or len(scales) != 2 or len(zeros) != 2:
            raise FormatError(f"{where}: expected matrices of codes, scales and zero points; get the file again")
        if "groups" in tensors and weight[0]:  # tells the inputs, and so the bits, which may differ by layer
            bits = weight[0] * 32 // max(1, math.prod(tensors["groups"].info.shape))
        if bits not in (2, 3, 4, 8):
            raise UnsupportedError(f"{where}: GPTQ with {bits!r} bits is not supported")
        inputs, outputs = weight[0] * 32 // bits, weight[1]
        group = _group_size(config, inputs)
        fits = (
            _dtypes(tensors)
            and scales[1] == outputs
            and zeros == (scales[0], -(-outputs * bits // 32))
            and weight[0] == -(-inputs * bits // 32)
        )
        if "groups" in tensors:
            fits &= tensors["groups"].info.shape == (inputs,) and tensors["groups"].info.dtype == "I32"
        else:
            fits &= scales[0] == -(-inputs // group)
        _check(fits, tensors, where)
        return cls(
            name,
            (outputs, inputs),
            dict(tensors),
            f"GPTQ {bits} bits",
            torch.float32,
            None,
            bits,
            group,
            int(stated == "gptq"),
        )

    def decode(self, i: int, j: int) -> Tensor:
        """``(code − zero) · scale``, transposed."""
        inputs = self.shape[1]
        codes = unpacked(self.tensors["weight"].whole()[:, i:j], self.bits, 0, inputs)
        zeros = unpacked(self.tensors["zeros"].whole().T, self.bits, i, j).T + self.offset
        if "groups" in self.tensors:
            group = _known(self.tensors["groups"], self.tensors["scales"].info.shape[0])
        else:
            group = torch.arange(inputs) // self.group_size
        return _scaled(codes, zeros, self.tensors["scales"].whole()[:, i:j], group)


@dataclass(frozen=True)
class AWQ(QuantizedWeight):
    """Codes of four bits along the outputs.

    Attributes
    ----------
    group_size
        Inputs to a group.
    """

    group_size: int

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Self:
        """The weight of these tensors."""
        where = f"{tensors['weight'].file.path}: tensor {tensors['weight'].info.name!r}"
        stated = config.get("version") or config.get("format") or "gemm"
        if str(stated).lower() != "gemm" or config.get("bits", 4) != 4 or config.get("zero_point", True) is not True:
            raise UnsupportedError(
                f"{where}: AWQ is supported with 4 bits, zero points and version gemm, found bits={config.get('bits')!r}, "
                f"zero_point={config.get('zero_point')!r}, version={stated!r}"
            )
        weight, scales, zeros = (tensors[role].info.shape for role in ("weight", "scales", "zeros"))
        inputs = weight[0] if weight else 0
        group = _group_size(config, inputs)
        _check(
            _dtypes(tensors)
            and len(weight) == 2
            and scales == (-(-inputs // group), 8 * weight[1])
            and zeros == (scales[0], weight[1]),
            tensors,
            where,
        )
        return cls(name, (8 * weight[1], inputs), dict(tensors), "AWQ 4 bits", torch.float32, None, group)

    def decode(self, i: int, j: int) -> Tensor:
        """``(code − zero) · scale``, transposed."""
        first, last = i // 8, -(-j // 8)
        shifts = torch.tensor(AWQ_ORDER, dtype=torch.int32) * 4

        def codes(role: str) -> Tensor:
            words = self.tensors[role].whole()[:, first:last]
            return ((words[..., None] >> shifts) & 15).flatten(1)[:, i - 8 * first : j - 8 * first]

        group = torch.arange(self.shape[1]) // self.group_size
        return _scaled(codes("weight"), codes("zeros"), self.tensors["scales"].whole()[:, i:j], group)


@dataclass(frozen=True)
class Packed(QuantizedWeight):
    """What compressed-tensors calls pack-quantized.

    Attributes
    ----------
    bits
        1 to 8.
    """

    bits: int

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Self:
        """The weight of these tensors."""
        where = f"{tensors['weight'].file.path}: tensor {tensors['weight'].info.name!r}"
        words, scales, stated = (tensors[role].info for role in ("weight", "scales", "shape"))
        shape = (
            tuple(tensors["shape"].whole().tolist()) if stated.dtype in ("I64", "I32") and stated.shape == (2,) else ()
        )
        if len(words.shape) != 2 or len(shape) != 2 or shape[0] != words.shape[0] or shape[1] < 1:
            raise UnsupportedError(f"{where}: packed weights of shape {list(words.shape)} are not supported")
        m, n = shape
        fitting = [bits for bits in range(1, 9) if -(-n * bits // 32) == words.shape[1]]
        _check(
            words.dtype == "I32" and len(fitting) == 1 and len(scales.shape) == 2 and scales.shape[0] == m,
            tensors,
            where,
        )
        bits, groups = fitting[0], scales.shape[1]
        fits = scales.dtype in _SCALES and 0 < groups <= n
        if "zeros" in tensors:
            fits &= tensors["zeros"].info.dtype == "I32" and tensors["zeros"].info.shape == (-(-m * bits // 32), groups)
        if "groups" in tensors:
            fits &= tensors["groups"].info.dtype == "I32" and tensors["groups"].info.shape == (n,)
        _check(fits, tensors, where)
        return cls(name, (m, n), dict(tensors), f"INT{bits} (compressed-tensors)", torch.float32, None, bits)

    def decode(self, i: int, j: int) -> Tensor:
        """``(code − zero) · scale``."""
        n, scales = self.shape[1], self.tensors["scales"].rows(i, j).to(torch.float32)
        codes = unpacked(self.tensors["weight"].rows(i, j).T, self.bits, 0, n).T
        count = scales.shape[1]
        group = torch.arange(n) // -(-n // count)
        if "groups" in self.tensors and not bool((self.tensors["groups"].whole() < 0).any()):  # −1 where it is not used
            group = _known(self.tensors["groups"], count)
        if "zeros" in self.tensors:
            zeros = unpacked(self.tensors["zeros"].whole(), self.bits, i, j)
            return codes.sub(zeros[:, group]).to(torch.float32).mul_(scales[:, group])
        return codes.sub(1 << (self.bits - 1)).to(torch.float32).mul_(scales[:, group])


def unpacked(words: Tensor, bits: int, i: int, j: int) -> Tensor:
    """Codes i to j of streams of bits that run down the columns of (k, c) int32 words, the lowest bits first; (j − i, c) int32."""
    at = torch.arange(i, j) * bits
    word, shift = at // 32, (at % 32).to(torch.int32)
    codes = words[word] >> shift[:, None]
    split = torch.nonzero(shift + bits > 32).flatten()  # the rest of these stands in the next word
    if len(split):
        low = 32 - shift[split, None]
        codes[split] = (codes[split] & ((1 << low) - 1)) | (words[word[split] + 1] << low)
    return codes.bitwise_and_((1 << bits) - 1)


def _scaled(codes: Tensor, zeros: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    """``(codes − zeros[group]) · scales[group]`` transposed, contiguous."""
    values = codes.sub(zeros[group]).to(torch.float32).mul_(scales.to(torch.float32)[group])
    return values.T.contiguous()


def _group_size(config: Mapping[str, Any], inputs: int) -> int:
    size = config.get("group_size", config.get("q_group_size", 128))
    return size if type(size) is int and size > 0 else max(1, inputs)


def _dtypes(tensors: Mapping[str, StoredTensor]) -> bool:
    words = {tensors[role].info.dtype for role in ("weight", "zeros")}
    return words == {"I32"} and tensors["scales"].info.dtype in _SCALES


def _known(stored: StoredTensor, count: int) -> Tensor:
    """The group of each input, if all are there."""
    group = stored.whole()
    if bool(((group < 0) | (group >= count)).any()):
        raise FormatError(
            f"{stored.file.path}: tensor {stored.info.name!r}: names groups that are not there; get the file again"
        )
    return group


def _check(fits: bool, tensors: Mapping[str, StoredTensor], where: str) -> None:
    if not fits:
        found = ", ".join(f"{p.info.name} {p.info.dtype} {list(p.info.shape)}" for p in tensors.values())
        raise FormatError(
            f"{where}: codes, scales and zero points do not fit: {found}; get the file again, and its config.json"
        )
