"""Decode HQQ: integers of 1 to 8 bits, with a scale and a zero point for each group of the flattened matrix.

``W = (q − zero) · scale``, in the dtype of the saved model and rounded after each operation, as the library does. The values form a
table: with axis 1 each row is a group; with axis 0 each column is one. A packed row holds as many rows of the table as fit its words: of k
packed rows, the first holds rows 0, k, 2k, …, with row 0 in the highest bits. The settings of each layer are tensors beside its values.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from streamer.errors import FormatError, UnsupportedError
from streamer.weights.base import QuantizedWeight, StoredTensor
from streamer.weights.dtypes import TORCH_DTYPES
from streamer.weights.quantization.packing import SCALE_DTYPES, check_fit

SHAPED = ("scale", "zero", "shape")
"""Roles of the tensors beside the values."""

UNUSED = ("nbits", "unpack_view_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "optimize", "round_zero")  # fmt: skip
"""Roles of settings that do not change what the values mean."""

_PACKINGS = {
    # Name → dtype of the words, bits of a value, values in a word.
    b"8bit_u8": ("U8", 8, 1),
    b"4bit_u8": ("U8", 4, 2),
    b"3bit_32": ("I32", 3, 10),
    b"2bit_u8": ("U8", 2, 4),
    b"1bit_u8": ("U8", 1, 8),
}

_DTYPES = {b"torch.float16": torch.float16, b"torch.bfloat16": torch.bfloat16, b"torch.float32": torch.float32}

SETTINGS: dict[str, Container[bytes] | Container[int]] = {
    "packing": _PACKINGS, "compute_dtype": _DTYPES, "axis": (0, 1), "group_size": range(1, 2**31), "view_as_float": (0, 1),
    "channel_wise": (1,), "quant_zero": (0,), "quant_scale": (0,),
}  # fmt: skip
"""Roles of settings that change what the values mean, and the supported values: text or a number."""


@dataclass(frozen=True)
class HQQ(QuantizedWeight):
    """Packed integers and their groups.

    Attributes
    ----------
    table
        Rows and columns of the values' table.
    bits, count
        Bits of a value, and values in a word.
    dtype
        Dtype in which the library decodes.
    """

    table: tuple[int, int]
    bits: int
    count: int
    dtype: torch.dtype

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Self:
        """Check that the tensors and settings fit together, and make the weight that they store."""
        where = f"{tensors['weight'].file.path}: tensor {tensors['weight'].info.name!r}"
        packed = tensors["weight"].info
        missing = [role for role in (*SHAPED, *SETTINGS) if role not in tensors]
        if missing:
            raise FormatError(f"{where}: {missing[0]!r} of its HQQ layer is missing; get the file again")
        setting = {role: _setting(tensors[role], role) for role in SETTINGS}
        for role, supported in SETTINGS.items():
            if setting[role] not in supported:
                raise UnsupportedError(
                    f"{where}: HQQ with {role}={setting[role]!r} is not supported; use the 16-bit model"
                )
        parts, stated = {role: tensors[role] for role in ("weight", *SHAPED)}, tensors["shape"].info
        check_fit((stated.dtype, stated.shape) == ("I64", (2,)), parts, where)
        spelling, bits, count = _PACKINGS[setting["packing"]]
        (m, n), size = tensors["shape"].whole().tolist(), setting["group_size"]
        check_fit(m > 0 and n > 0 and size > 0 and m * n % size == 0, parts, where)
        groups = m * n // size
        table, per_group = ((groups, size), (groups, 1)) if setting["axis"] else ((size, groups), (1, groups))
        rows = -(-table[0] // count)
        fits = packed.dtype == spelling or (setting["view_as_float"] == 1 and packed.dtype in SCALE_DTYPES)
        fits &= packed.shape[:1] == (rows,) and packed.nbytes == rows * table[1] * TORCH_DTYPES[spelling].itemsize
        fits &= bits == 3 or rows * count == table[0]
        fits &= all(
            tensors[r].info.shape == per_group and tensors[r].info.dtype in SCALE_DTYPES for r in ("scale", "zero")
        )
        check_fit(fits, parts, where)
        dtype, info = _DTYPES[setting["compute_dtype"]], replace(packed, dtype=spelling, shape=(rows, table[1]))
        stored = {**tensors, "weight": replace(tensors["weight"], info=info)}
        return cls(name, (m, n), stored, f"HQQ {bits} bits", torch.float32, None, table, bits, count, dtype)

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``(q − zero) · scale``."""
        n, (rows, columns) = self.shape[1], self.table
        first, last = i * n // columns, -(-j * n // columns)
        at, packed = torch.arange(first, last), -(-rows // self.count)
        words = self.tensors["weight"].whole()[at % packed]
        shift = (self.count - 1 - at // packed).mul_(self.bits).to(words.dtype)
        values = words.bitwise_right_shift_(shift[:, None]).bitwise_and_((1 << self.bits) - 1).to(self.dtype)
        zero, scale = (self._by_group(role, first, last) for role in ("zero", "scale"))
        start = i * n - first * columns
        return values.sub_(zero).mul_(scale).to(torch.float32).flatten()[start : start + (j - i) * n].view(j - i, n)

    def _by_group(self, role: str, first: int, last: int) -> Tensor:
        """Read what scales or shifts rows of the table: a column for groups in rows, else one row."""
        stored = self.tensors[role]
        return (stored.whole() if stored.info.shape[0] == 1 else stored.rows(first, last)).to(self.dtype)


def _setting(stored: StoredTensor, role: str) -> Any:
    """Read a setting: text from its bytes, or a little-endian number."""
    raw = stored.bytes(0, min(stored.info.nbytes, 32)).numpy().tobytes()
    return raw if role in ("packing", "compute_dtype") else int.from_bytes(raw, "little")
