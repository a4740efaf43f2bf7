"""Represent second moments ``C = Σ x xᵀ / N`` (n, n) of inputs x: by rows read for each product, or by counts of one-hot inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from streamer.linalg.allocation import CPU
from streamer.linalg.null_space import leading


@dataclass(frozen=True)
class RowMoments:
    """Second moments of inputs that are read a few at a time.

    Attributes
    ----------
    size
        n.
    count
        N. It may exceed the number of inputs: an expert receives only some of the text's tokens.
    trace
        Trace of C.
    blocks
        Reads all inputs in order, (t, n) at a time, in float32.
    device
        Device of the inputs and of the computation.
    """

    size: int
    count: int
    trace: float
    blocks: Callable[[], Iterator[Tensor]]
    device: torch.device = CPU

    def products(self, V: Tensor) -> Tensor:
        """Compute ``C V`` (n, k) for V (n, k), in V's dtype."""
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
    """Second moments of one-hot inputs.

    Attributes
    ----------
    diagonal
        Diagonal of C (n,), float64; all other entries are 0.
    """

    diagonal: Tensor

    @property
    def size(self) -> int:
        """Return n."""
        return len(self.diagonal)

    @property
    def device(self) -> torch.device:
        """Return the diagonal's device."""
        return self.diagonal.device

    @property
    def trace(self) -> float:
        """Return the sum of the diagonal."""
        return float(self.diagonal.sum())


Moments = RowMoments | OneHotMoments

SMALL = 512
"""Largest n for which C is formed and decomposed directly."""

MORE, ROUNDS = 16, 8
"""Extra vectors in the iteration, and products with C. They give eigenvalues to 1e-3 if the last iterated eigenvalue is a third of the last
one wanted."""


def leading_vectors(moments: RowMoments, count: int) -> tuple[Tensor, Tensor]:
    """Compute the leading eigenvalues (k,), falling, and eigenvectors (n, k) of C in float64, k = min(count, n).

    Above `SMALL`, uses subspace iteration (Halko, Martinsson and Tropp, SIAM Review 2011) from the same random vectors in every run.
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
