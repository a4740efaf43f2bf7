"""Second moments ``C = Σ x xᵀ / N`` (n, n) of inputs x, by rows that are read for each product, or by the counts of one-hot inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from streamer.linalg.allocation import CPU
from streamer.linalg.null_space import leading


@dataclass(frozen=True)
class RowMoments:
    """Those of inputs that are read a few at a time.

    Attributes
    ----------
    size
        n.
    count
        N, which may be more than there are inputs: those of an expert are some of the text's tokens.
    trace
        Of C.
    blocks
        Reads all inputs in order, (t, n) at a time, in float32.
    device
        Where the inputs are, and where is computed with them.
    """

    size: int
    count: int
    trace: float
    blocks: Callable[[], Iterator[Tensor]]
    device: torch.device = CPU

    def products(self, V: Tensor) -> Tensor:
        """``C V`` (n, k) for V (n, k), computed in the type of V."""
        out = torch.zeros_like(V)
        for rows in self.blocks():
            x = rows.to(V.dtype)
            out.addmm_(x.T, x @ V)
        return out.div_(self.count)

    def matrix(self) -> Tensor:
        """Form C in float64."""
        out = torch.zeros(self.size, self.size, dtype=torch.float64, device=self.device)
        for rows in self.blocks():
            exact = rows.double()
            out.addmm_(exact.T, exact)
        return out.div_(self.count)


@dataclass(frozen=True)
class OneHotMoments:
    """Those of one-hot inputs.

    Attributes
    ----------
    diagonal
        Of C (n,), in float64; the rest is 0.
    """

    diagonal: Tensor

    @property
    def size(self) -> int:
        """Return n."""
        return len(self.diagonal)

    @property
    def device(self) -> torch.device:
        """Return where the diagonal is."""
        return self.diagonal.device

    @property
    def trace(self) -> float:
        """Sum the diagonal."""
        return float(self.diagonal.sum())


Moments = RowMoments | OneHotMoments

SMALL = 512
"""Inputs of so many values have their moments formed, to be decomposed as a whole."""

MORE, ROUNDS = 16, 8
"""Vectors that are iterated beside those that are wanted, and products with C: eigenvalues to 1e-3 where the last of all are a third of the
last wanted."""


def leading_vectors(moments: RowMoments, count: int) -> tuple[Tensor, Tensor]:
    """Compute the leading eigenvalues (k,), falling, and eigenvectors (n, k) of C in float64, k = min(count, n).

    Above `SMALL` by subspace iteration (Halko, Martinsson and Tropp, SIAM Review 2011), from the same vectors in every run.
    """
    if moments.size <= SMALL:
        values, vectors = torch.linalg.eigh(moments.matrix())
        return values.flip(0)[:count].clamp_min(0), vectors.flip(1)[:, :count]
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(moments.size, min(moments.size, count + MORE), generator=generator).to(moments.device)
    for _ in range(ROUNDS):
        V = moments.products(torch.linalg.qr(V)[0])
    basis = torch.linalg.qr(V.double())[0]
    values, vectors = leading(basis, moments.products(basis.float()).double())
    return values[:count], vectors[:, :count]
