"""Read one logical weight of a base, whole or a few rows at a time.

A logical weight is what the model computes with. A plain checkpoint stores it as one tensor. A quantized one stores several tensors
(quantized values, scales, tables) under their own names; an expert's gate and up projections may be stacked from two tensors. The rest of
the package asks for logical names and shapes and gets floating-point values.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from streamer.linalg.allocation import empty_matrix
from streamer.storage.buffers import views
from streamer.storage.header import TensorInfo
from streamer.storage.tensor_file import TensorFile
from streamer.weights.dtypes import TORCH_DTYPES, Encoding, as_tensor

DECODED_BYTES = 4 << 20
"""Bytes of rows that `Weight.whole` decodes at a time."""


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
        dtype, rest = TORCH_DTYPES[self.info.dtype], self.info.shape[1:]
        row = math.prod(rest) * dtype.itemsize
        return as_tensor(self._data(i * row, j * row), dtype, (j - i, *rest))

    def flat(self, i: int, j: int) -> Tensor:
        """Read values i to j in storage order, (j − i,)."""
        dtype = TORCH_DTYPES[self.info.dtype]
        return as_tensor(self._data(i * dtype.itemsize, j * dtype.itemsize), dtype, (j - i,))

    def whole(self) -> Tensor:
        """Read the tensor in the stored dtype and shape."""
        return as_tensor(self._data(), TORCH_DTYPES[self.info.dtype], self.info.shape)

    def bytes(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Read bytes `start` to `stop` as flat uint8, for quantized values whose dtype is meaningless."""
        stop = self.info.nbytes if stop is None else stop
        return as_tensor(self._data(start, stop), torch.uint8, (stop - start,))

    def _data(self, start: int = 0, stop: int | None = None) -> memoryview:
        return self.file.view(self.info, start, stop) if self.prefetched is None else self.prefetched[start:stop]

    def slice(self, index: int) -> StoredTensor:
        """Select one index of the first dimension: (experts, out, in) becomes (out, in)."""
        info = self.info
        size = info.nbytes // info.shape[0]
        at = index * size
        prefetched = None if self.prefetched is None else self.prefetched[at : at + size]
        one = replace(info, shape=info.shape[1:], start=info.start + at, end=info.start + at + size)
        return replace(self, info=one, prefetched=prefetched)

    def load(self) -> StoredTensor:
        """Read the bytes ahead by touching every page, so that later reads do not wait for the disk."""
        view = self.file.view(self.info)
        np.frombuffer(view, np.uint8)[::4096].sum()
        return replace(self, prefetched=view)


def equal(a: StoredTensor, b: StoredTensor) -> bool:
    """Test whether two tensors have the same bytes, dtype and shape."""
    if (a.info.dtype, a.info.shape) != (b.info.dtype, b.info.shape):
        return False
    return all(x == y for x, y in zip(views(a.file.chunks(a.info)), views(b.file.chunks(b.info)), strict=True))


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
    encoding
        Plain encoding in which merged values are written back; None if the weight has none.
    """

    quantized: ClassVar[bool] = False
    """Whether `rows` decodes quantized values from the weight's own tensors."""

    name: str
    shape: tuple[int, ...]
    tensors: Mapping[str, StoredTensor]
    label: str
    compute: torch.dtype
    encoding: Encoding | None

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
        return sum(stored.info.nbytes for stored in self.tensors.values() if stored.file.io == "pread")

    @property
    def remote(self) -> bool:
        """Return whether each read crosses a network."""
        return any(stored.file.remote for stored in self.tensors.values())

    def load(self) -> Self:
        """Read the bytes ahead."""
        return replace(self, tensors={role: stored.load() for role, stored in self.tensors.items()})

    def at_hand(self) -> Self:
        """Prepare for a loop over the rows that must not read any byte twice."""
        return self.load() if self.remote and not self.prefetched else self

    @property
    def prefetched(self) -> bool:
        """Return whether the bytes have been read ahead."""
        return all(stored.prefetched is not None for stored in self.tensors.values())

    def blocks(self, rows: int) -> Iterator[tuple[int, int, Tensor]]:
        """Yield all rows in order, `rows` at a time, as (from, to, values); values are valid until the next block is asked for."""
        source, m = self.at_hand(), self.matrix[0]
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

    def stored(self) -> Tensor | None:
        """Read all values in the stored dtype and logical shape, read-only; return None if no single tensor holds them."""
        return None

    def whole(self, device: torch.device) -> Tensor:
        """Decode all values into a new tensor of the computing dtype and logical shape."""
        source, (m, n) = self.at_hand(), self.matrix
        out = empty_matrix((m, n), self.compute, device)
        step = max(1, DECODED_BYTES // max(1, n * self.compute.itemsize))
        for i in range(0, m, step):
            j = min(m, i + step)
            out[i:j] = source.rows(i, j)
        return out.reshape(self.shape)


@dataclass(frozen=True)
class QuantizedWeight(Weight):
    """Weight that is stored quantized and computed in float32; the matrices of a stack are decoded one at a time."""

    quantized: ClassVar[bool] = True

    def at_hand(self) -> Self:
        """Read the bytes ahead unless files are mapped: a few rows may need part of every stored row."""
        ready = all(stored.prefetched is not None or stored.file.io == "mmap" for stored in self.tensors.values())
        return self if ready else self.load()

    @abstractmethod
    def decode(self, i: int, j: int) -> Tensor:
        """Decode rows i to j of a matrix, (j − i, n) float32, into new memory."""

    def rows(self, i: int, j: int) -> Tensor:
        """Decode rows i to j of the `matrix`."""
        if len(self.shape) == 2:
            return self.decode(i, j)
        return torch.stack([self.slice(k).whole(torch.device("cpu")).flatten() for k in range(i, j)])


@dataclass(frozen=True)
class RowConcat(Weight):
    """Row-wise concatenation of matrices of one width and encoding."""

    pieces: tuple[Weight, ...]

    @classmethod
    def of(cls, name: str, pieces: Sequence[Weight]) -> Self:
        """Concatenate weights of one width and encoding."""
        first = pieces[0]
        tensors = {f"{at}.{role}": stored for at, piece in enumerate(pieces) for role, stored in piece.tensors.items()}
        shape = (sum(piece.shape[0] for piece in pieces), *first.shape[1:])
        return cls(name, shape, tensors, first.label, first.compute, first.encoding, tuple(pieces))

    def load(self) -> Self:
        """Read the bytes of all pieces ahead."""
        return replace(self, pieces=tuple(piece.load() for piece in self.pieces))

    def at_hand(self) -> Self:
        """Prepare all pieces for a loop over the rows."""
        return replace(self, pieces=tuple(piece.at_hand() for piece in self.pieces))

    def rows(self, i: int, j: int) -> Tensor:
        """Read rows i to j from the pieces that hold them."""
        found, start = [], 0
        for piece in self.pieces:
            stop = start + piece.shape[0]
            if i < stop and start < j:
                found.append(piece.rows(max(i, start) - start, min(j, stop) - start))
            start = stop
        return found[0] if len(found) == 1 else torch.cat(found)
