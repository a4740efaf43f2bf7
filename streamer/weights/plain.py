"""Read plain floating-point weights, each stored as one tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from streamer.linalg.allocation import empty_matrix
from streamer.storage.buffers import views
from streamer.weights.base import StoredTensor, Weight
from streamer.weights.dtypes import TORCH_DTYPES, as_tensor, encoding_of


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
        encoding = encoding_of(info, str(stored.file.path))
        return cls(info.name, info.shape, {"weight": stored}, info.dtype, encoding.compute, encoding)

    def rows(self, i: int, j: int) -> Tensor:
        """Read rows i to j in the stored dtype."""
        return self.tensors["weight"].rows(i, j).reshape(j - i, -1)

    def blocks(self, rows: int) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the rows in the stored dtype, reading ahead from the disk."""
        stored, (m, n) = self.tensors["weight"], self.matrix
        if stored.prefetched is not None or stored.info.nbytes == 0:
            yield from super().blocks(rows)
            return
        dtype = TORCH_DTYPES[stored.info.dtype]
        for k, view in enumerate(views(stored.file.chunks(stored.info, rows * n * dtype.itemsize))):
            i, j = k * rows, min(m, (k + 1) * rows)
            yield i, j, as_tensor(view, dtype, (j - i, n))

    def stored(self) -> Tensor:
        """Read all values in the stored dtype."""
        return self.tensors["weight"].whole()

    def whole(self, device: torch.device) -> Tensor:
        """Copy all values to the computing dtype."""
        # Copy even if the dtype stays: LAPACK's bits depend on the alignment of its input, and a mapped file may have any alignment.
        return empty_matrix(self.matrix, self.compute, device).reshape(self.shape).copy_(self.stored())
