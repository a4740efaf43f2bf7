"""Products with a parameter that multiplies itself: values are those of the matrix in memory, of which nothing is kept."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from seeds import vary
from torch import Tensor
from torch.nn import functional

from streamer.streaming.lazy import LazyTensor, Multiplier


class Streamed(Multiplier):
    """A matrix in memory, read three rows at a time."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.name, self.shape, self.device = values, "w", tuple(values.shape), values.device
        self.reads = 0

    def read(self) -> Tensor:
        raise AssertionError("no product needs all values")

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        self.reads += 1
        for i in range(0, len(self.values), 3):
            yield i, min(i + 3, len(self.values)), self.values[i : i + 3]

    def product(self, x: Tensor, transposed: bool) -> Tensor:
        if transposed:
            return sum((x[..., i:j] @ rows for i, j, rows in self.blocks()), torch.zeros(()))
        return torch.cat([x @ rows.T for _, _, rows in self.blocks()], -1)


PRODUCTS = {
    "linear": (functional.linear, 5), "linear with a bias": (lambda x, w: functional.linear(x, w, torch.ones(7)), 5),
    "x W": (lambda x, w: x @ w, 7), "x Wᵀ": (lambda x, w: x @ w.T, 5), "x Wᵀ by t()": (lambda x, w: torch.matmul(x, w.t()), 5),
    "x Wᵀ by transpose": (lambda x, w: x.matmul(w.transpose(-1, -2)), 5), "x (Wᵀ)ᵀ": (lambda x, w: x @ w.mT.T, 7),
    "addmm": (lambda x, w: torch.addmm(torch.ones(5), x.flatten(0, 1), w), 7),
    "mm": (lambda x, w: torch.mm(x.flatten(0, 1), w.T), 5),
}  # fmt: skip


@pytest.mark.parametrize("what", PRODUCTS)
def test_values(what: str) -> None:
    function, width = PRODUCTS[what]
    generator = torch.Generator().manual_seed(vary(0))
    matrix, x = Streamed(torch.randn(7, 5, generator=generator)), torch.randn(2, 3, width, generator=generator)
    torch.testing.assert_close(function(x, LazyTensor.of(matrix)), function(x, matrix.values))
    assert matrix.reads == 1
