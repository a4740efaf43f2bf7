"""Multiply with a matrix that is read a few rows at a time, and read it again for the backward pass.

No part of the matrix is kept between the two, and it receives no gradient: for ``Y = X Mᵀ`` the backward pass computes ``dX = dY M``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamer.linalg.torch_state import bfloat16_products

Blocks = Iterator[tuple[int, int, Tensor]]
"""Rows of a matrix in order, as (from, to, values), with values (to − from, n) in float32."""


@dataclass(frozen=True)
class StreamedMatrix:
    """Matrix (m, n) that is read for each product.

    Attributes
    ----------
    shape
        (m, n).
    blocks
        Reads all rows in order.
    rounded
        Whether products round their factors to bfloat16.
    """

    shape: tuple[int, int]
    blocks: Callable[[], Blocks]
    rounded: bool = False

    def multiply(self, X: Tensor, transposed: bool) -> Tensor:
        """Compute ``X Mᵀ`` (t, m) for X (t, n), or if `transposed` ``X M`` (t, n) for X (t, m); without gradients."""
        m, n = self.shape
        out: Tensor | None = None
        with torch.no_grad(), bfloat16_products() if self.rounded else contextlib.nullcontext():
            for i, j, rows in self.blocks():
                if transposed and out is None:
                    out = X[:, i:j] @ rows
                elif transposed:
                    out = out.addmm_(X[:, i:j], rows)  # type: ignore[union-attr]  # the branch above has made it
                elif j - i == m:
                    out = X @ rows.T
                else:
                    out = X.new_empty((len(X), m)) if out is None else out
                    out[:, i:j] = X @ rows.T
        return X.new_zeros((len(X), n if transposed else m)) if out is None else out

    def product(self, X: Tensor, transposed: bool) -> Tensor:
        """Compute ``X Mᵀ`` or ``X M`` so that gradients flow to X."""
        out: Tensor = _Product.apply(X, self, transposed)  # type: ignore[no-untyped-call]  # torch types no `apply`
        return out


class _Product(torch.autograd.Function):
    """``X Mᵀ`` or ``X M``; the backward pass reads M again."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, matrix: StreamedMatrix, transposed: bool) -> Tensor:
        ctx.matrix, ctx.transposed = matrix, transposed
        return matrix.multiply(X, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (dY,) = grads
        return (ctx.matrix.multiply(dY, not ctx.transposed) if ctx.needs_input_grad[0] else None), None, None
