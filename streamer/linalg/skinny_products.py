"""Multiply a large matrix by a block of few columns, with the kernels that benchmarks show to be fast."""

from __future__ import annotations

import contextlib
import functools
import math
from pathlib import Path

import torch
from torch import Tensor

PIECES = 8
"""Row blocks into which a product with a long matrix is cut; measured in docs/benchmarks.md."""


@functools.cache
def _has_fast_onednn() -> bool:
    """Test whether torch has oneDNN's float32 products and the processor has AVX-512, which makes them fast.

    They are used only from torch 2.9 on; older versions were not measured.
    """
    asked = hasattr(torch.backends, "fp32_precision") and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return asked and torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def _long_rows() -> float:
    """Return the length of rows from which BLAS multiplies a transpose faster than oneDNN; on AMD's processors it never does."""
    with contextlib.suppress(OSError):  # only Linux has the file
        if b"GenuineIntel" in Path("/proc/cpuinfo").read_bytes():
            return 10_000
    return math.inf


def skinny_product(M: Tensor, X: Tensor) -> Tensor:
    """Compute ``M @ X`` for M (m, n), row-major or transposed, and X (n, c) of few columns.

    If `_has_fast_onednn`, oneDNN multiplies float32 matrices, except transposes with `_long_rows`; its bits do not depend on the
    number of threads. Otherwise X is padded with zero columns to a multiple of 16, which makes products several times as fast; on
    the CPU a transpose is multiplied from the left, and a long matrix is cut into `PIECES`. docs/benchmarks.md has the measurements.
    """
    c = X.shape[1]
    if M.device.type == "cpu" and M.dtype == torch.float32 and min(*M.shape, c) > 0 and _has_fast_onednn():
        # Only contiguous matrices: for part of longer rows oneDNN uses a reference kernel, a thousand times slower.
        X = X if X.T.is_contiguous() else X.contiguous()
        if M.is_contiguous():
            return _onednn_linear(M, X.T)
        if M.T.is_contiguous() and len(M) < _long_rows():
            return _onednn_linear(X.T, M).T
    X = torch.nn.functional.pad(X, (0, -c % 16))
    rows = len(M) // PIECES
    if M.device.type != "cpu":
        return (M @ X)[:, :c]
    if not M.is_contiguous():
        return (X.T @ M.T).T[:, :c]
    if rows < 128:
        return (M @ X)[:, :c]
    pieces, rest = M[: PIECES * rows].view(PIECES, rows, M.shape[1]), M[PIECES * rows :]
    out = torch.bmm(pieces, X.expand(PIECES, *X.shape)).view(PIECES * rows, -1)
    return (torch.cat([out, rest @ X]) if len(rest) else out)[:, :c]


def _onednn_linear(A: Tensor, B: Tensor) -> Tensor:
    """Compute ``A @ B.T`` with oneDNN; B is row-major or the transpose of a row-major matrix."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(A, B, None, "none", [], "")
    return product
