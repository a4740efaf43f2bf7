"""Form each delta with coefficients of its directions, ``U diag(c) Uᵀ Δ``, or ``c Δ`` of a dense one, such that c gets gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streamer.linalg.low_rank import LowRank
from streamer.plan.plan import Plan
from streamer.plan.targets import Target, TensorSlice
from streamer.streaming.products import StreamedMatrix
from streamer.streaming.spool import Spool, Spooled


@dataclass(frozen=True)
class FactoredChange:
    """``L Rᵀ`` (m, n) with L (m, r), which depends on the coefficients, and R (n, r)."""

    delta: LowRank

    def dense(self) -> Tensor:
        """Form the matrix."""
        return self.delta.dense()

    def add_product(self, out: Tensor, x: Tensor, transposed: bool, rows: tuple[int, int]) -> Tensor:
        """``out + x Mᵀ``, or `transposed`, ``out + x M``, of these rows M of the matrix; all are matrices."""
        part = self.delta.row_slice(*rows)
        return torch.addmm(out, x @ part.L, part.R.T) if transposed else torch.addmm(out, x @ part.R, part.L.T)

    def rows(self, ids: Tensor) -> Tensor:
        """Form some of its rows."""
        return self.delta.L[ids] @ self.delta.R.T


@dataclass(frozen=True)
class DenseChange:
    """``c Δ`` (m, n) with one coefficient, () or 1; Δ is formed for each product."""

    coefficient: Tensor | float
    shape: tuple[int, int]
    matrix: Callable[[], Tensor]

    def dense(self) -> Tensor:
        """Form the matrix."""
        return self.coefficient * self.matrix()

    def add_product(self, out: Tensor, x: Tensor, transposed: bool, rows: tuple[int, int]) -> Tensor:
        """``out + x Mᵀ``, or `transposed`, ``out + x M``, of these rows M of the matrix; all are matrices."""
        i, j = rows
        streamed = StreamedMatrix((j - i, self.shape[1]), lambda: iter([(0, j - i, self.matrix()[i:j])]))
        return out + self.coefficient * streamed.product(x, transposed)

    def rows(self, ids: Tensor) -> Tensor:
        """Form some of its rows."""
        return self.coefficient * self.matrix()[ids]


Change = FactoredChange | DenseChange
"""What a variant adds to rows of a weight."""


class CoefficientDeltas:
    """The deltas of an adapter, with coefficients.

    Parameters
    ----------
    directory
        Where singular directions are spooled, which are computed once.

    Attributes
    ----------
    coefficients
        Of each target (p,), tensors that may require gradients; None: the deltas as they are.
    """

    def __init__(self, plan: Plan, directory: Path | None) -> None:
        self.plan, self.spool = plan, Spool(directory)
        self.coefficients: Mapping[str, Tensor] | None = None
        self._places: dict[str, Spooled] = {}

    def change(self, target: Target, part: TensorSlice) -> Change:
        """Form what a target adds to a slice of a weight, in float32 and as the weight is stored."""
        c = None if self.coefficients is None else self.coefficients[target.tensor]
        if target.module.low_rank:
            delta = self._factors(target, c)
            delta = delta if part.rows is None else delta.row_slice(*part.rows)
            return FactoredChange(delta.T if target.transposed else delta)

        def matrix() -> Tensor:
            dense = self.plan.finite_delta(target)
            dense = dense if part.rows is None else dense.row_slice(*part.rows)
            return (dense.T if target.transposed else dense).to(torch.float32).dense()

        rows, columns = target.module.shape
        i, j = part.rows or (0, rows)
        shape = (columns, j - i) if target.transposed else (j - i, columns)
        return DenseChange(1.0 if c is None else c[0].to(torch.float32), shape, matrix)

    def _factors(self, target: Target, c: Tensor | None) -> LowRank:
        if c is None:
            delta = self.plan.finite_delta(target)
            assert isinstance(delta, LowRank)
            return delta.to(torch.float32)
        place = self._places.get(target.tensor)
        if place is None:
            delta = self.plan.finite_delta(target)
            assert isinstance(delta, LowRank)
            U, S, Vh = delta.svd()
            place = self.spool.write([U.to(torch.float32), (Vh.T * S).to(torch.float32)])
            self._places[target.tensor] = place
        U, R = self.spool.read(place)
        return LowRank(U * c.to(torch.float32), R)
