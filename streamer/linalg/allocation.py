"""Allocate large matrices in large pages."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

CPU = torch.device("cpu")

LARGE_BYTES = 32 << 20
"""Matrices above so many bytes come from the system each time: up to there the C library keeps memory for the next one."""


def empty_matrix(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a matrix (m, n) of any values; on Linux a large one is in pages of 2 MB, where the system has some.

    An upcast then takes a third of the time, since the system clears and maps fewer pages, and products a twentieth less; measured in
    docs/benchmarks.md.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type == "cpu" and size > LARGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            pages.madvise(mmap.MADV_HUGEPAGE)
            return torch.frombuffer(pages, dtype=dtype).view(shape)
        except OSError:
            pass  # no such pages, or no memory: torch says the latter in its own words
    return torch.empty(shape, dtype=dtype, device=device)
