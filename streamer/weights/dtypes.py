"""Convert between bytes and torch tensors of plain dtypes, and round computed values.

A dtype without an entry in `ENCODINGS` is copied as bytes or refused by name, so raw quantized values never reach a computation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from streamer.errors import NumericError, UnsupportedError
from streamer.linalg.operators import all_finite
from streamer.storage.header import TensorInfo


@dataclass(frozen=True)
class Encoding:
    """Floating-point dtype of a plain tensor, and the dtype to compute in.

    Attributes
    ----------
    dtype
        The torch dtype with the same bits.
    compute
        The dtype for computations.
    """

    dtype: torch.dtype
    compute: torch.dtype


ENCODINGS = {
    "BF16": Encoding(torch.bfloat16, torch.float32),
    "F16": Encoding(torch.float16, torch.float32),
    "F32": Encoding(torch.float32, torch.float32),
    "F64": Encoding(torch.float64, torch.float64),
}

# Dtypes that torch can hold, for callers that use tensors unchanged.
TORCH_DTYPES = {
    **{name: e.dtype for name, e in ENCODINGS.items()},
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "C64": torch.complex64,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip

SPELLINGS = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""The format's spelling of each torch dtype."""


def encoding_of(info: TensorInfo, where: str) -> Encoding:
    """Return the encoding of a tensor that takes part in a computation.

    Raises
    ------
    UnsupportedError
        If its dtype is not a floating-point one.
    """
    if info.dtype not in ENCODINGS:
        raise UnsupportedError(
            f"{where}: tensor {info.name!r}: dtype {info.dtype} is not one of {', '.join(ENCODINGS)}, "
            "and no tensor says how to decode it; use the 16-bit model"
        )
    return ENCODINGS[info.dtype]


def in_memory(info: TensorInfo) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return the dtype and shape of a tensor in memory; if torch lacks the dtype, of its bytes, as flat uint8."""
    dtype = TORCH_DTYPES.get(info.dtype)
    return (torch.uint8, (info.nbytes,)) if dtype is None else (dtype, info.shape)


def as_tensor(view: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """View bytes as a tensor, without a copy if their address is aligned. The caller must not write to it."""
    if len(view) == 0:
        return torch.empty(shape, dtype=dtype)
    raw = np.frombuffer(view, dtype=np.uint8)
    if raw.ctypes.data % dtype.itemsize:  # the format does not promise alignment
        raw = raw.copy()
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def as_bytes(t: Tensor) -> memoryview:
    """View a CPU tensor as bytes, without a copy if it is contiguous; the view keeps the tensor alive."""
    raw: np.ndarray[tuple[int], np.dtype[np.uint8]] = (
        t.contiguous().as_strided((t.numel(),), (1,)).view(torch.uint8).numpy()
    )
    return raw.data


def encode(values: Tensor, encoding: Encoding, source: Tensor, name: str, out: Tensor | None = None) -> Tensor:
    """Round computed values to the encoding, once.

    Parameters
    ----------
    values
        Computed values, in `Encoding.compute`.
    source
        The values that they replace, of the same shape; positions that were NaN or Inf may stay so.
    name
        The tensor's name, for messages.
    out
        A tensor of the encoding's dtype to hold the result, for callers that round many blocks.

    Raises
    ------
    NumericError
        If a value became NaN or Inf.
    """
    out = values.to(encoding.dtype) if out is None else out.copy_(values)
    if not all_finite(out) and bool((torch.isfinite(source) & ~torch.isfinite(out)).any()):
        raise NumericError(
            f"tensor {name!r}: the result does not fit {str(encoding.dtype).removeprefix('torch.')} "
            "(NaN or Inf where the input had none); check the adapter's scale and lambda"
        )
    return out
