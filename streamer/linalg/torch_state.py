"""Set torch's process-wide state while streamer computes, and restore it: the number of threads, and products in full float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Multiply float32 matrices in full float32 inside the context; restore the setting after it.

    With TF32 a product has an error of 5e-4 of its size in place of 6e-8: every bound would be that much wider, and most matrices
    would go to the dense solver.
    """
    if hasattr(torch.backends, "fp32_precision"):  # torch 2.9, where reading the older setting fails if both were used
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


@contextlib.contextmanager
def threads(count: int = 1) -> Iterator[None]:
    """Compute on `count` of torch's threads inside the context: on one while rows are merged and written.

    With more threads each small step ends at a barrier, and where other processes want the cores the wait there is many times the work
    (docs/benchmarks.md). On one thread a sum's last bit does not depend on the number of cores; on several it may.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
