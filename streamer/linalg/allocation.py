"""Allocate large matrices in large pages."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

CPU = torch.device("cpu")

LARGE_BYTES = 32 << 20
"""Size in bytes above which Linux maps new pages for every matrix; the C library reuses memory for smaller ones."""


def empty_matrix(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate an uninitialised matrix (m, n), with large ones in 2 MB pages if Linux has any.

    With large pages the system clears and maps fewer of them: an upcast takes a third of the time, and products are 5 % faster
    (docs/benchmarks.md).
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type == "cpu" and size > LARGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            pages.madvise(mmap.MADV_HUGEPAGE)
            return torch.frombuffer(pages, dtype=dtype).view(shape)
        except OSError:
            pass  # no large pages, or no memory: in the second case torch raises its own error
    return torch.empty(shape, dtype=dtype, device=device)
