"""One logical weight of a base, as it stands on disk: decoded a few rows at a time, or whole.

A logical weight is what the model computes with: for a plain checkpoint a tensor as it is, for a quantized one several (codes, scales,
tables) under names of their own. Everything above this floor asks for logical names and logical shapes, and never sees codes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from streamer.storage.header import TensorInfo
from streamer.storage.tensor_file import TensorFile
from streamer.weights.dtypes import TORCH_DTYPES, Encoding, as_tensor

DECODED_BYTES = 4 << 20
"""`Weight.whole` decodes rows of this many bytes at a time."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor on disk.

    Attributes
    ----------
    held
        Its bytes, where they have been read ahead.
    """

    file: TensorFile
    info: TensorInfo
    held: memoryview | None = None

    def rows(self, i: int, j: int) -> Tensor:
        """Indices i to j of the first dimension, as they are stored, without a copy where their address allows it."""
        dtype, rest = TORCH_DTYPES[self.info.dtype], self.info.shape[1:]
        row = math.prod(rest) * dtype.itemsize
        return as_tensor(self._data(i * row, j * row), dtype, (j - i, *rest))

    def flat(self, i: int, j: int) -> Tensor:
        """Values i to j in order, whatever the shape."""
        dtype = TORCH_DTYPES[self.info.dtype]
        return as_tensor(self._data(i * dtype.itemsize, j * dtype.itemsize), dtype, (j - i,))

    def whole(self) -> Tensor:
        """All of it, as it is stored."""
        return as_tensor(self._data(), TORCH_DTYPES[self.info.dtype], self.info.shape)

    def bytes(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Its bytes, a flat uint8 tensor: for codes, whose dtype says nothing."""
        stop = self.info.nbytes if stop is None else stop
        return as_tensor(self._data(start, stop), torch.uint8, (stop - start,))

    def _data(self, start: int = 0, stop: int | None = None) -> memoryview:
        return self.file.view(self.info, start, stop) if self.held is None else self.held[start:stop]

    def slice(self, index: int) -> StoredTensor:
        """What stands under one index of the first dimension."""
        info = self.info
        size = info.nbytes // info.shape[0]
        at = index * size
        held = None if self.held is None else self.held[at : at + size]
        one = replace(info, shape=info.shape[1:], start=info.start + at, end=info.start + at + size)
        return replace(self, info=one, held=held)

    def load(self) -> StoredTensor:
        """The same with its bytes at hand, every page touched: read here and not where they are used."""
        view = self.file.view(self.info)
        np.frombuffer(view, np.uint8)[::4096].sum()
        return replace(self, held=view)


@dataclass(frozen=True)
class Weight(ABC):
    """One logical weight.

    Attributes
    ----------
    name
        The tensor's name in a plain checkpoint of this model.
    shape
        Its shape there.
    tensors
        The tensors on disk that it is made of, by their role; the first one is the one that stands for it in file order.
    label
        The encoding, as findings and tables name it.
    compute
        The dtype that computations with it run in.
    encoding
        How merged values are written back; None where they are not (see `registry`).
    """

    name: str
    shape: tuple[int, ...]
    tensors: Mapping[str, StoredTensor]
    label: str
    compute: torch.dtype
    encoding: Encoding | None

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape of the rows: the first dimension, and all others as one."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def where(self) -> str:
        """The file, for messages."""
        return str(next(iter(self.tensors.values())).file.path)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(stored.info.nbytes for stored in self.tensors.values())

    @property
    def held_bytes(self) -> int:
        """Bytes of anonymous memory that `load` takes: nothing where files are mapped."""
        return sum(stored.info.nbytes for stored in self.tensors.values() if stored.file.io == "pread")

    def load(self) -> Self:
        """The same weight with its bytes read ahead."""
        return replace(self, tensors={role: stored.load() for role, stored in self.tensors.items()})

    def at_hand(self) -> Self:
        """The same, for a loop over its rows: nothing is read twice."""
        return self

    def blocks(self, rows: int) -> Iterator[tuple[int, int, Tensor]]:
        """All `rows` in order, so many at a time: from, to, values; these stay as they are until `QUEUE` more were given."""
        source, m = self.at_hand(), self.matrix[0]
        for i in range(0, m, rows):
            j = min(m, i + rows)
            yield i, j, source.rows(i, j)

    def slice(self, index: int) -> Self:
        """One matrix of a stack, such as an expert's."""
        tensors = {role: stored.slice(index) for role, stored in self.tensors.items()}
        return replace(self, name=f"{self.name}[{index}]", shape=self.shape[1:], tensors=tensors)

    @abstractmethod
    def rows(self, i: int, j: int) -> Tensor:
        """Rows i to j of the `matrix`, (j − i, n), in a floating-point dtype that `compute` holds exactly; not to be written to."""

    def stored(self) -> Tensor | None:
        """All values in one tensor as they are stored, of the logical shape, not to be written to; None where they are in none."""
        return None

    def whole(self, device: torch.device) -> Tensor:
        """All values in the computing dtype: a copy, of the logical shape."""
        source, (m, n) = self.at_hand(), self.matrix
        out = torch.empty((m, n), dtype=self.compute, device=device)
        step = max(1, DECODED_BYTES // max(1, n * self.compute.itemsize))
        for i in range(0, m, step):
            j = min(m, i + step)
            out[i:j] = source.rows(i, j)
        return out.reshape(self.shape)


@dataclass(frozen=True)
class QuantizedWeight(Weight):
    """A weight that stands as codes, and is computed in float32; a stack of matrices is decoded one by one."""

    def at_hand(self) -> Self:
        """With its bytes read, where files are not mapped: a few rows may need some of every row of codes."""
        held = all(stored.held is not None or stored.file.io == "mmap" for stored in self.tensors.values())
        return self if held else self.load()

    @abstractmethod
    def decode(self, i: int, j: int) -> Tensor:
        """Rows i to j of a matrix, (j − i, n) float32, in memory of their own."""

    def rows(self, i: int, j: int) -> Tensor:
        """Rows i to j of the `matrix`."""
        if len(self.shape) == 2:
            return self.decode(i, j)
        return torch.stack([self.slice(k).whole(torch.device("cpu")).flatten() for k in range(i, j)])
