"""Unpack integers in 32-bit words and apply scales and zero points by group, as GPTQ, AWQ and compressed-tensors all do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from streamer.errors import FormatError
from streamer.weights.base import StoredTensor

SCALE_DTYPES = ("F16", "BF16", "F32")
"""Dtypes of scales; the product of a value and a 16-bit scale is exact in float32."""


def unpack(words: Tensor, bits: int, i: int, j: int) -> Tensor:
    """Unpack values i to j from bit streams down the columns of (k, c) int32 words, lowest bits first; returns (j − i, c) int32.

    With 3 bits, value 10 occupies bits 30 and 31 of the first word and bit 0 of the second.
    """
    at = torch.arange(i, j) * bits
    word, shift = at // 32, (at % 32).to(torch.int32)
    values = words[word] >> shift[:, None]
    split = torch.nonzero(shift + bits > 32).flatten()  # these values continue in the next word
    if len(split):
        low = 32 - shift[split, None]
        values[split] = (values[split] & ((1 << low) - 1)) | (words[word[split] + 1] << low)
    return values.bitwise_and_((1 << bits) - 1)


def dequantize_groups(values: Tensor, zeros: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    """Compute ``(values − zeros[group]) · scales[group]`` in float32, transposed and contiguous.

    Parameters
    ----------
    values
        (in, out) int32.
    zeros, scales
        (groups, out).
    group
        (in,) group of each input.
    """
    out = values.sub(zeros[group]).to(torch.float32).mul_(scales.to(torch.float32)[group])
    return out.T.contiguous()


def group_size(config: Mapping[str, Any], inputs: int) -> int:
    """Read the number of inputs in a group from a quantization config: 128 by default, all inputs for −1."""
    size = config.get("group_size", config.get("q_group_size", 128))
    return size if type(size) is int and size > 0 else max(1, inputs)


def has_packed_dtypes(tensors: Mapping[str, StoredTensor]) -> bool:
    """Test whether values and zero points are int32 words and scales are floating-point."""
    words = {tensors[role].info.dtype for role in ("weight", "zeros")}
    return words == {"I32"} and tensors["scales"].info.dtype in SCALE_DTYPES


def group_indices(stored: StoredTensor, count: int) -> Tensor:
    """Read the group of each input from ``g_idx``.

    Raises
    ------
    FormatError
        If it names a group beyond the `count` groups that have scales.
    """
    group = stored.whole()
    if bool(((group < 0) | (group >= count)).any()):
        raise FormatError(
            f"{stored.file.path}: tensor {stored.info.name!r}: names groups that do not exist; get the file again"
        )
    return group


def check_fit(fits: bool, tensors: Mapping[str, StoredTensor], where: str) -> None:
    """Refuse tensors of one weight whose dtypes or shapes contradict each other.

    Raises
    ------
    FormatError
        If not `fits`; the message lists the tensors.
    """
    if not fits:
        found = ", ".join(f"{p.info.name} {p.info.dtype} {list(p.info.shape)}" for p in tensors.values())
        raise FormatError(
            f"{where}: codes, scales and zero points do not fit: {found}; get the file again, and its config.json"
        )
