"""Read one logical weight of a base, whole or a few rows at a time, and convert between bytes and torch tensors of plain dtypes.

A logical weight is what the model computes with. A plain checkpoint stores it as one tensor. A quantized one stores several tensors
(quantized values, scales, tables) under their own names; an expert's gate and up projections may be stacked from two tensors. The rest of
the package asks for logical names and shapes and gets floating-point values.

A dtype without an entry in `FLOATS` is copied as bytes or refused by name, so raw quantized values never reach a computation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from streamer.errors import NumericError, UnsupportedError
from streamer.linalg.operators import all_finite
from streamer.linalg.torch_state import CPU, empty_matrix
from streamer.storage.atomic_file import Piece, views
from streamer.storage.checkpoint import TensorFile
from streamer.storage.header import TensorInfo
from streamer.units import counted

TensorShape = tuple[int, ...]

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""Dtypes of the values of plain tensors, by the format's spelling. Computations use float32, for F64 float64."""

# Dtypes that torch can hold, for callers that use tensors unchanged.
TORCH_DTYPES = {
    **FLOATS,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}

SPELLINGS = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""The format's spelling of each torch dtype."""


def float_dtype(info: TensorInfo, where: str) -> torch.dtype:
    """Return the dtype of a tensor that takes part in a computation.

    Raises
    ------
    UnsupportedError
        If its dtype is not a floating-point one.
    """
    if info.dtype not in FLOATS:
        raise UnsupportedError(
            f"{where}: tensor {info.name!r}: dtype {info.dtype} is not one of {', '.join(FLOATS)}; use the 16-bit model"
        )
    return FLOATS[info.dtype]


def in_memory(info: TensorInfo) -> tuple[torch.dtype, TensorShape]:
    """Return the dtype and shape of a tensor in memory; if torch lacks the dtype, of its bytes, as flat uint8."""
    dtype = TORCH_DTYPES.get(info.dtype)
    return (torch.uint8, (info.nbytes,)) if dtype is None else (dtype, info.shape)


def as_tensor(view: memoryview, dtype: torch.dtype, shape: TensorShape) -> Tensor:
    """View bytes as a tensor, without a copy if their address is aligned. The caller must not write to it."""
    if len(view) == 0:
        return torch.empty(shape, dtype=dtype)
    raw = np.frombuffer(view, dtype=np.uint8)
    if raw.ctypes.data % dtype.itemsize:  # the format does not promise alignment
        raw = raw.copy()
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def as_bytes(t: Tensor) -> memoryview:
    """View a CPU tensor as bytes, without a copy if it is contiguous; the view keeps the tensor alive."""
    view: memoryview = t.contiguous().as_strided((t.numel(),), (1,)).view(torch.uint8).numpy().data
    return view


def encode(values: Tensor, dtype: torch.dtype, name: str, out: Tensor | None = None) -> Tensor:
    """Round computed values to a dtype, once.

    Parameters
    ----------
    values
        Computed values.
    name
        The tensor's name, for messages.
    out
        A tensor of that dtype to hold the result, for callers that round many blocks.

    Raises
    ------
    NumericError
        If a value is NaN or Inf.
    """
    out = values.to(dtype) if out is None else out.copy_(values)
    if not all_finite(out):
        count = counted(int((~torch.isfinite(out)).sum()), "value")
        raise NumericError(
            f"tensor {name!r}: the result does not fit {str(dtype).removeprefix('torch.')} (NaN or Inf in {count} or more); check the "
            "adapter's scale and lambda, or write a dtype with a wider range"
        )
    return out


DECODED_BYTES = 4 << 20
"""Bytes of rows that are decoded at a time."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor on disk.

    Attributes
    ----------
    prefetched
        The tensor's bytes, if they have been read ahead.
    """

    file: TensorFile
    info: TensorInfo
    prefetched: memoryview | None = None

    def rows(self, i: int, j: int) -> Tensor:
        """Read indices i to j of the first dimension in the stored dtype, without a copy if their address is aligned."""
        dtype = TORCH_DTYPES[self.info.dtype]
        _, *rest = self.info.shape
        row = math.prod(rest) * dtype.itemsize
        return as_tensor(self._data(i * row, j * row), dtype, (j - i, *rest))

    def flat(self, i: int, j: int) -> Tensor:
        """Read values i to j in storage order, (j − i,)."""
        dtype = TORCH_DTYPES[self.info.dtype]
        return as_tensor(self._data(i * dtype.itemsize, j * dtype.itemsize), dtype, (j - i,))

    def whole(self) -> Tensor:
        """Read the tensor in the stored dtype and shape."""
        return as_tensor(self._data(), TORCH_DTYPES[self.info.dtype], self.info.shape)

    def chunks(self) -> Iterator[Piece]:
        """Yield the file's bytes in pieces that the caller releases, while the disk reads ahead."""
        return self.file.chunks(self.info)

    def bytes(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Read bytes `start` to `stop` as flat uint8, for quantized values whose dtype is meaningless."""
        stop = self.info.nbytes if stop is None else stop
        return as_tensor(self._data(start, stop), torch.uint8, (stop - start,))

    def _data(self, start: int = 0, stop: int | None = None) -> memoryview:
        if self.prefetched is not None:
            return self.prefetched[start:stop]
        return self.file.view(self.info, start, stop)

    def slice(self, index: int) -> StoredTensor:
        """Select one index of the first dimension: (experts, out, in) becomes (out, in)."""
        info = self.info
        count, *shape = info.shape
        size = info.nbytes // count
        at = index * size
        start = info.start + at
        prefetched = None if self.prefetched is None else self.prefetched[at : at + size]
        matrix = replace(info, shape=tuple(shape), start=start, end=start + size)
        return replace(self, info=matrix, prefetched=prefetched)

    def load(self) -> StoredTensor:
        """Read the bytes ahead by touching every page, so that later reads do not wait for the disk."""
        view = self.file.view(self.info)
        np.frombuffer(view, np.uint8)[::4096].sum()
        return replace(self, prefetched=view)


Tensors = Mapping[str, StoredTensor]


def equal(a: StoredTensor, b: StoredTensor) -> bool:
    """Test whether two tensors have the same bytes, dtype and shape."""
    if (a.info.dtype, a.info.shape) != (b.info.dtype, b.info.shape):
        return False
    chunks = (views(stored.chunks()) for stored in (a, b))
    return all(x == y for x, y in zip(*chunks, strict=True))


@dataclass(frozen=True)
class Weight(ABC):
    """Named array of floating-point values, in whatever form it is stored.

    Attributes
    ----------
    name
        The tensor's name in a plain checkpoint of this model.
    shape
        Its shape in that checkpoint.
    tensors
        The tensors on disk that store it, by role; the first one determines its position in file order.
    label
        Name of the encoding in findings and tables.
    compute
        Dtype for computations with it.
    written
        Dtype in which merged values are written back; None if they cannot be.
    """

    quantized: ClassVar[bool] = False
    """Whether `rows` decodes quantized values from the weight's own tensors."""

    name: str
    shape: TensorShape
    tensors: Tensors
    label: str
    compute: torch.dtype
    written: torch.dtype | None

    @property
    def matrix(self) -> tuple[int, int]:
        """Return (m, n) of the matrix of rows: the first dimension, and the product of all others; 1 for a missing dimension."""
        return math.prod(self.shape[:1]), math.prod(self.shape[1:])

    @property
    def where(self) -> str:
        """Return the file's path, for messages."""
        return str(next(iter(self.tensors.values())).file.path)

    @property
    def nbytes(self) -> int:
        """Return the number of bytes on disk."""
        return sum(stored.info.nbytes for stored in self.tensors.values())

    @property
    def load_bytes(self) -> int:
        """Return the bytes of anonymous memory that `load` needs: 0 for mapped files."""
        stored = self.tensors.values()
        return sum(tensor.info.nbytes for tensor in stored if tensor.file.io == "pread")

    @property
    def remote(self) -> bool:
        """Return whether each read crosses a network."""
        return any(stored.file.remote for stored in self.tensors.values())

    def load(self) -> Self:
        """Read the bytes ahead."""
        return replace(self, tensors={role: stored.load() for role, stored in self.tensors.items()})

    def at_hand(self) -> Self:
        """Prepare for a loop over the rows that must not read any byte twice."""
        stored = self.tensors.values()
        far = any(tensor.file.remote and tensor.prefetched is None for tensor in stored)
        return self.load() if far else self

    def steps(self) -> Iterator[tuple[int, int]]:
        """Divide the rows into ranges of about `DECODED_BYTES` in the computing dtype."""
        m, n = self.matrix
        step = max(1, DECODED_BYTES // max(1, n * self.compute.itemsize))
        return ((i, min(m, i + step)) for i in range(0, m, step))

    def blocks(self, rows: int) -> Iterator[tuple[int, int, Tensor]]:
        """Yield all rows in order, `rows` at a time, as (from, to, values); values are valid until the next block is asked for."""
        source = self.at_hand()
        m, _ = self.matrix
        for i in range(0, m, rows):
            j = min(m, i + rows)
            yield i, j, source.rows(i, j)

    def slice(self, index: int) -> Self:
        """Select one matrix of a stack: ``experts.up`` (8, 64, 32) → ``experts.up[3]`` (64, 32)."""
        tensors = {role: stored.slice(index) for role, stored in self.tensors.items()}
        return replace(self, name=f"{self.name}[{index}]", shape=self.shape[1:], tensors=tensors)

    @abstractmethod
    def rows(self, i: int, j: int) -> Tensor:
        """Read rows i to j of the `matrix`, (j − i, n), in a dtype that `compute` represents exactly; the result is read-only."""

    def whole(self, device: torch.device) -> Tensor:
        """Decode all values into a new tensor of the computing dtype and logical shape."""
        source = self.at_hand()
        out = empty_matrix(self.matrix, self.compute, device)
        for i, j in self.steps():
            out[i:j] = source.rows(i, j)
        return out.reshape(self.shape)


@dataclass(frozen=True)
class QuantizedWeight(Weight):
    """Weight that is stored quantized and computed in float32; the matrices of a stack are decoded one at a time."""

    quantized = True

    compute: torch.dtype = field(default=torch.float32, kw_only=True)
    written: torch.dtype | None = field(default=None, kw_only=True)

    def at_hand(self) -> Self:
        """Read the bytes ahead unless files are mapped: a few rows may need part of every stored row."""
        stored = self.tensors.values()
        read = (tensor.prefetched is not None or tensor.file.io == "mmap" for tensor in stored)
        return self if all(read) else self.load()

    @abstractmethod
    def decode(self, i: int, j: int) -> Tensor:
        """Decode rows i to j of a matrix, (j − i, n) float32, into new memory."""

    def rows(self, i: int, j: int) -> Tensor:
        """Decode rows i to j of the `matrix`."""
        if len(self.shape) == 2:
            return self.decode(i, j)
        return torch.stack([self.slice(k).whole(CPU).flatten() for k in range(i, j)])


@dataclass(frozen=True)
class RowConcat(Weight):
    """Row-wise concatenation of matrices of one width and encoding."""

    pieces: tuple[Weight, ...]

    @classmethod
    def of(cls, name: str, pieces: Sequence[Weight]) -> Self:
        """Concatenate weights of one width and encoding."""
        first = pieces[0]
        tensors = {
            f"{at}.{role}": stored
            for at, piece in enumerate(pieces)
            for role, stored in piece.tensors.items()
        }
        shape = (sum(piece.shape[0] for piece in pieces), *first.shape[1:])
        return cls(name, shape, tensors, first.label, first.compute, first.written, tuple(pieces))

    def load(self) -> Self:
        """Read the bytes of all pieces ahead."""
        return replace(self, pieces=tuple(piece.load() for piece in self.pieces))

    def at_hand(self) -> Self:
        """Prepare all pieces for a loop over the rows."""
        return replace(self, pieces=tuple(piece.at_hand() for piece in self.pieces))

    def rows(self, i: int, j: int) -> Tensor:
        """Read rows i to j from the pieces that hold them."""
        parts = []
        start = 0
        for piece in self.pieces:
            stop = start + piece.shape[0]
            if i < stop and start < j:
                parts.append(piece.rows(max(i, start) - start, min(j, stop) - start))
            start = stop
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class Plain(Weight):
    """Weight stored as one floating-point tensor."""

    @classmethod
    def of(cls, stored: StoredTensor) -> Self:
        """Make the weight that a tensor stores.

        Raises
        ------
        UnsupportedError
            If its dtype is not a floating-point one.
        """
        info = stored.info
        dtype = float_dtype(info, str(stored.file.path))
        compute = torch.promote_types(dtype, torch.float32)
        return cls(info.name, info.shape, {"weight": stored}, info.dtype, compute, dtype)

    def rows(self, i: int, j: int) -> Tensor:
        """Read rows i to j in the stored dtype."""
        return self.tensors["weight"].rows(i, j).reshape(j - i, -1)

    def blocks(self, rows: int) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the rows in the stored dtype, reading ahead from the disk."""
        stored = self.tensors["weight"]
        if stored.prefetched is not None or stored.info.nbytes == 0:
            yield from super().blocks(rows)
            return
        m, n = self.matrix
        dtype = TORCH_DTYPES[stored.info.dtype]
        chunks = stored.file.chunks(stored.info, rows * n * dtype.itemsize)
        for i, view in zip(range(0, m, rows), views(chunks), strict=True):
            j = min(m, i + rows)
            yield i, j, as_tensor(view, dtype, (j - i, n))

    def whole(self, device: torch.device) -> Tensor:
        """Copy all values to the computing dtype."""
        # Copy even if the dtype stays: LAPACK's bits depend on the alignment of its input, and a mapped file may have any alignment.
        out = empty_matrix(self.matrix, self.compute, device).reshape(self.shape)
        return out.copy_(self.tensors["weight"].whole())
