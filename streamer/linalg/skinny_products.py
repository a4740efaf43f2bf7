"""Multiply a large matrix with a block of few columns, by the kernels that are measured to be fast at it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

PIECES = 8
"""Row blocks that a product of a long matrix is cut into; measured in docs/benchmarks.md."""


@functools.cache
def _has_fast_onednn() -> bool:
    """Test whether torch has oneDNN's products of float32 matrices, and the processor AVX-512, for which they are fast.

    Before torch 2.9 they are not asked for: there they were not measured.
    """
    asked = hasattr(torch.backends, "fp32_precision") and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return asked and torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def skinny_product(M: Tensor, X: Tensor) -> Tensor:
    """``M @ X`` for M (m, n), row-major or a transpose, and X (n, c) of few columns.

    oneDNN takes float32 where `_has_fast_onednn`; its bits do not depend on the number of threads. Elsewhere X gets zero columns up to a
    multiple of 16, for which products are several times as fast, a transpose is multiplied from the left on the CPU, and long matrices in
    `PIECES`. All are measured in docs/benchmarks.md.
    """
    c = X.shape[1]
    if M.device.type == "cpu" and M.dtype == torch.float32 and min(*M.shape, c) > 0 and _has_fast_onednn():
        # Only whole matrices: for a part of longer rows oneDNN has a reference kernel, a thousand times as slow.
        X = X if X.T.is_contiguous() else X.contiguous()
        if M.is_contiguous():
            return _onednn_linear(M, X.T)
        if M.T.is_contiguous():
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
    """``A @ B.T`` by oneDNN; B is row-major or the transpose of a row-major matrix."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(A, B, None, "none", [], "")
    return product
