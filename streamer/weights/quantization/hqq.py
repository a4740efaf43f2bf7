"""Decode HQQ: integers of 1 to 8 bits, with a scale and a zero point for each group of the flattened matrix.

``W = (q − zero) · scale``, in the dtype of the scales and rounded after each operation, as the library does. The values form a table: with
axis 1 each row is a group, with axis 0 each column. A packed row holds as many rows of the table as fit its words: of k packed rows, the
first holds rows 0, k, 2k, …, with row 0 in the highest bits. The shapes tell the axis, the group size and the packing, so that only
``shape`` is read when a layer is opened. The library's decoder follows the settings instead: a layer is refused if these contradict its
shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from streamer.errors import FormatError, UnsupportedError
from streamer.storage.header import TensorInfo
from streamer.weights.base import QuantizedWeight, StoredTensor
from streamer.weights.dtypes import TORCH_DTYPES
from streamer.weights.quantization.packing import SCALE_DTYPES, check_fit

SETTINGS = ("packing", "compute_dtype", "axis", "group_size", "view_as_float", "channel_wise", "quant_zero", "quant_scale", "nbits",
            "unpack_view_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "optimize", "round_zero")  # fmt: skip
"""Names of the tensors that hold a layer's settings."""

UNSUPPORTED = ("zero_q", "scale_q", "zero_scale")
"""Names of quantized zero points and scales, and of both in one tensor."""

_PACKINGS = (("U8", 8, 1), ("U8", 4, 2), ("I32", 3, 10), ("U8", 2, 4), ("U8", 1, 8))
"""Dtype of the words, bits of a value, values in a word."""


@dataclass(frozen=True)
class HQQ(QuantizedWeight):
    """Packed integers and their groups.

    Attributes
    ----------
    table
        Rows and columns of the values' table.
    bits, count
        Bits of a value, and values in a word.
    """

    table: tuple[int, int]
    bits: int
    count: int

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Self:
        """Check that the tensors fit together, and make the weight that they store."""
        where = f"{tensors['weight'].file.path}: tensor {tensors['weight'].info.name!r}"
        if unsupported := [role for role in UNSUPPORTED if role in tensors]:
            raise UnsupportedError(f"{where}: HQQ with {unsupported[0]!r} is not supported; use the 16-bit model")
        missing = [role for role in ("scale", "zero", "shape", "packing") if role not in tensors]
        if missing:
            raise FormatError(f"{where}: {missing[0]!r} of its HQQ layer is missing; get the file again")
        parts = {role: tensors[role] for role in ("weight", "scale", "zero", "shape")}
        packed, scale, zero, stated = (stored.info for stored in parts.values())
        fits = (stated.dtype, stated.shape) == ("I64", (2,)) and scale.dtype in SCALE_DTYPES
        fits &= (
            (scale.dtype, scale.shape) == (zero.dtype, zero.shape) and len(scale.shape) == 2 and min(scale.shape) == 1
        )
        check_fit(fits, parts, where)
        (m, n), groups = tensors["shape"].whole().tolist(), max(scale.shape)
        check_fit(m > 0 and n > 0 and m * n % groups == 0, parts, where)
        table = (groups, m * n // groups) if scale.shape[1] == 1 else (m * n // groups, groups)
        fitting = [packing for packing in _PACKINGS if _holds(packed, table, *packing)]
        check_fit(len(fitting) == 1, parts, where)
        dtype, bits, count = fitting[0]
        info = replace(packed, dtype=dtype, shape=(-(-table[0] // count), table[1]))
        stored = {**tensors, "weight": replace(tensors["weight"], info=info)}
        return cls(name, (m, n), stored, f"HQQ {bits} bits", torch.float32, None, table, bits, count)

    def decode(self, i: int, j: int) -> Tensor:
        """Compute ``(q − zero) · scale``.

        Raises
        ------
        FormatError
            If a setting contradicts the shapes.
        """
        self._check_settings()
        n, (rows, columns) = self.shape[1], self.table
        first, last = i * n // columns, -(-j * n // columns)
        zero, scale = (self._by_group(role, first, last) for role in ("zero", "scale"))
        at, packed = torch.arange(first, last), -(-rows // self.count)
        words = self.tensors["weight"].whole()[at % packed]
        shift = (self.count - 1 - at // packed).mul_(self.bits).to(words.dtype)
        values = words.bitwise_right_shift_(shift[:, None]).bitwise_and_((1 << self.bits) - 1).to(scale.dtype)
        start = i * n - first * columns
        return values.sub_(zero).mul_(scale).to(torch.float32).flatten()[start : start + (j - i) * n].view(j - i, n)

    def _check_settings(self) -> None:
        axis = int(self.tensors["scale"].info.shape[1] == 1)
        packing = f"{self.bits}bit_{'32' if self.bits == 3 else 'u8'}"
        for role, expected in {"packing": packing, "axis": axis, "group_size": self.table[axis]}.items():
            if (stored := self.tensors.get(role)) is not None:
                raw = bytes(stored.bytes(0, min(stored.info.nbytes, 16)).tolist())
                found = raw.decode("latin-1") if role == "packing" else int.from_bytes(raw, "little")
                if found != expected:
                    raise FormatError(
                        f"{self.where}: tensor {stored.info.name!r}: expected {expected!r} by the shapes of its HQQ layer, "
                        f"found {found!r}; get the file again"
                    )

    def _by_group(self, role: str, first: int, last: int) -> Tensor:
        """Read what scales or shifts rows of the table: a column for groups in rows, else one row."""
        stored = self.tensors[role]
        return stored.whole() if stored.info.shape[0] == 1 else stored.rows(first, last)


def _holds(packed: TensorInfo, table: tuple[int, int], dtype: str, bits: int, count: int) -> bool:
    """Test whether a tensor holds a table in these words; the library may view them as floating-point values."""
    rows = -(-table[0] // count)
    whole = bits == 3 or rows * count == table[0]
    size = rows * table[1] * TORCH_DTYPES[dtype].itemsize
    return whole and (packed.shape[:1], packed.nbytes) == ((rows,), size) and packed.dtype in (dtype, *SCALE_DTYPES)
