"""A stand-in for a parameter: what is computed with it is what the values give, and only what is needed is read."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from seeds import vary
from torch import Tensor
from torch.nn import functional

from streamer.errors import UnsupportedError
from streamer.streaming import values
from streamer.streaming.values import LazyTensor, Multiplier, Reader


class Given(Reader):
    """Values in memory, and what was asked for."""

    has_rows, name = True, "w"

    def __init__(self, values: Tensor) -> None:
        self.values, self.shape, self.device, self.asked = values, tuple(values.shape), values.device, list[Any]()

    def read(self) -> Tensor:
        self.asked.append("all")
        return self.values

    def rows(self, i: int, j: int) -> Tensor:
        self.asked.append((i, j))
        return self.values[i:j]

    def matrix(self, index: int) -> Tensor | None:
        self.asked.append(index)
        return self.values[index] if len(self.shape) == 3 else None

    def gather(self, ids: Tensor) -> Tensor:
        self.asked.append("rows")
        return self.values[ids]


@pytest.fixture
def weight() -> tuple[Given, LazyTensor]:
    given = Given(torch.randn(7, 5, generator=torch.Generator().manual_seed(vary(0))))
    return given, LazyTensor.of(given)


def test_shape_dtype_and_device_are_known_without_reading(weight: tuple[Given, LazyTensor]) -> None:
    given, lazy_weight = weight
    assert (lazy_weight.shape, lazy_weight.size(0), lazy_weight.ndim, lazy_weight.numel()) == ((7, 5), 7, 2, 35)
    assert (lazy_weight.dtype, lazy_weight.device, lazy_weight.is_meta) == (torch.float32, torch.device("cpu"), True)
    assert given.asked == []


@pytest.mark.parametrize("block", [values.BLOCK_BYTES, 40])
def test_products_read_a_few_rows_at_a_time(
    weight: tuple[Given, LazyTensor], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "BLOCK_BYTES", block)
    given, lazy_weight = weight
    x, bias = torch.randn(2, 3, 5), LazyTensor.of(Given(torch.randn(7)))
    torch.testing.assert_close(functional.linear(x, lazy_weight), functional.linear(x, given.values))
    torch.testing.assert_close(
        functional.linear(x, lazy_weight, bias), functional.linear(x, given.values, bias.reader.read())
    )
    assert given.asked[:4] == ([(0, 7), (0, 7)] if block > 40 else [(0, 2), (2, 4), (4, 6), (6, 7)])


def test_other_operations_read_all(weight: tuple[Given, LazyTensor]) -> None:
    given, lazy_weight = weight
    x, values = torch.randn(3, 5), given.values
    for result, expected in (
        (x @ lazy_weight.T, x @ values.T), (lazy_weight * 2, values * 2), (lazy_weight[1:3], values[1:3]), (lazy_weight.float(), values),
        (functional.rms_norm(x, (5,), lazy_weight[0]), functional.rms_norm(x, (5,), values[0])),
        (torch.cat([lazy_weight, x]), torch.cat([values, x])),
    ):  # fmt: skip
        assert type(result) is Tensor
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("change", [
    lambda w: w.div_(2), lambda w: w.data.div_(2), lambda w: w.detach().copy_(w * 2), lambda w: w.__setitem__(0, 0.0),
    lambda w: w.__imul__(2), lambda w: torch.mul(torch.ones(7, 5), 2, out=w),
])  # fmt: skip
def test_what_would_change_it_is_refused(weight: tuple[Given, LazyTensor], change: Any) -> None:
    with pytest.raises(UnsupportedError, match="'w' is changed by the model as it runs"):
        change(weight[1])


def test_embeddings_are_looked_up_and_experts_taken_one_by_one(weight: tuple[Given, LazyTensor]) -> None:
    given, lazy_weight = weight
    ids = torch.tensor([[1, 6], [0, 1]])
    torch.testing.assert_close(
        functional.embedding(ids, lazy_weight, padding_idx=0), functional.embedding(ids, given.values)
    )
    assert given.asked == ["rows"]
    stack = Given(torch.randn(3, 4, 5))
    for index in (2, torch.tensor(2)):
        torch.testing.assert_close(LazyTensor.of(stack)[index], stack.values[2])
    assert stack.asked == [2, 2]


def test_a_product_with_a_stack_takes_one_matrix_at_a_time() -> None:
    stack, x = Given(torch.randn(3, 4, 5)), torch.randn(3, 2, 4)
    for product in (torch.bmm(x, LazyTensor.of(stack)), x.bmm(LazyTensor.of(stack))):
        torch.testing.assert_close(product, torch.bmm(x, stack.values))
    assert stack.asked == [0, 1, 2, 0, 1, 2]


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
