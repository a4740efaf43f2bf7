"""Products in full float32: no TF32 on GPUs, no bf16 on CPUs, whatever the process has asked for elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Multiply float32 matrices in float32 inside; what was set before comes back after.

    With TF32 a product has an error of 5e-4 of its size in place of 6e-8: every bound would be that much wider, and most matrices
    would go to the dense solver.
    """
    if hasattr(
        torch.backends, "fp32_precision"
    ):  # torch 2.9; there, reading the older setting fails where both were used
        backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]  # torch's stubs lack it
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, value in zip(backends, before, strict=True):
                backend.fp32_precision = value
    else:
        precision = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
