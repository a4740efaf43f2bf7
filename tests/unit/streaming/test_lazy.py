"""A stand-in for a parameter: what is computed with it is what the values give, and only what is needed is read."""

from typing import Any

import pytest
import torch
from seeds import vary
from torch import Tensor
from torch.nn import functional

from streamer.errors import UnsupportedError
from streamer.streaming.lazy import LazyTensor, Reader


class Given(Reader):
    """Values in memory, and what was asked for."""

    name = "w"

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.shape = tuple(values.shape)
        self.device = values.device
        self.asked = list[Any]()

    def read(self) -> Tensor:
        self.asked.append("all")
        return self.values

    def matrix(self, index: int) -> Tensor | None:
        self.asked.append(index)
        return self.values[index] if len(self.shape) == 3 else None

    def gather(self, ids: Tensor) -> Tensor:
        self.asked.append("rows")
        return self.values[ids]

    def product(self, x: Tensor, transposed: bool) -> Tensor:
        self.asked.append("product")
        return x @ (self.values if transposed else self.values.T)


@pytest.fixture
def weight() -> tuple[Given, LazyTensor]:
    given = Given(torch.randn(7, 5, generator=torch.Generator().manual_seed(vary(0))))
    return given, LazyTensor.of(given)


def test_shape_dtype_and_device_are_known_without_reading(weight: tuple[Given, LazyTensor]) -> None:
    given, lazy_weight = weight
    assert (lazy_weight.shape, lazy_weight.size(0), lazy_weight.ndim, lazy_weight.numel()) == (
        (7, 5),
        7,
        2,
        35,
    )
    assert (lazy_weight.dtype, lazy_weight.device, lazy_weight.is_meta) == (
        torch.float32,
        torch.device("cpu"),
        True,
    )
    assert given.asked == []


def test_other_operations_read_all(weight: tuple[Given, LazyTensor]) -> None:
    given, lazy_weight = weight
    x = torch.randn(3, 5)
    values = given.values
    for result, expected in (
        (x @ lazy_weight.T, x @ values.T),
        (lazy_weight * 2, values * 2),
        (lazy_weight[1:3], values[1:3]),
        (lazy_weight.double(), values.double()),
        (functional.rms_norm(x, (5,), lazy_weight[0]), functional.rms_norm(x, (5,), values[0])),
        (torch.cat([lazy_weight, x]), torch.cat([values, x])),
    ):
        assert type(result) is Tensor
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.div_(2),
        lambda w: w.data.div_(2),
        lambda w: w.detach().copy_(w * 2),
        lambda w: w.__setitem__(0, 0.0),
        lambda w: w.__imul__(2),
        lambda w: torch.mul(torch.ones(7, 5), 2, out=w),
    ],
)
def test_what_would_change_it_is_refused(weight: tuple[Given, LazyTensor], change: Any) -> None:
    with pytest.raises(UnsupportedError, match="'w' is changed by the model as it runs"):
        change(weight[1])


def test_embeddings_are_looked_up_and_experts_taken_one_by_one(
    weight: tuple[Given, LazyTensor],
) -> None:
    given, lazy_weight = weight
    ids = torch.tensor([[1, 6], [0, 1]])
    torch.testing.assert_close(
        functional.embedding(ids, lazy_weight, padding_idx=0),
        functional.embedding(ids, given.values),
    )
    assert given.asked == ["rows"]
    stack = Given(torch.randn(3, 4, 5))
    for index in (2, torch.tensor(2)):
        torch.testing.assert_close(LazyTensor.of(stack)[index], stack.values[2])
    assert stack.asked == [2, 2]
    assert type(LazyTensor.of(stack)[1:, 0]) is Tensor


def test_a_product_with_a_stack_takes_one_matrix_at_a_time() -> None:
    stack = Given(torch.randn(3, 4, 5))
    x = torch.randn(3, 2, 4)
    for product in (torch.bmm(x, LazyTensor.of(stack)), x.bmm(LazyTensor.of(stack))):
        torch.testing.assert_close(product, torch.bmm(x, stack.values))
    assert stack.asked == [0, 1, 2, 0, 1, 2]


PRODUCTS = {
    "linear": (functional.linear, 5), "linear with a bias": (lambda x, w: functional.linear(x, w, torch.ones(7)), 5),
    "x W": (lambda x, w: x @ w, 7), "x Wᵀ": (lambda x, w: x @ w.T, 5), "x Wᵀ by t()": (lambda x, w: torch.matmul(x, w.t()), 5),
    "x Wᵀ by transpose": (lambda x, w: x.matmul(w.transpose(-1, -2)), 5), "x (Wᵀ)ᵀ": (lambda x, w: x @ w.mT.T, 7),
    "addmm": (lambda x, w: torch.addmm(torch.ones(5), x.flatten(0, 1), w), 7),
    "mm": (lambda x, w: torch.mm(x.flatten(0, 1), w.T), 5), "float()": (lambda x, w: functional.linear(x.float(), w.float()), 5),
    "type()": (lambda x, w: functional.linear(x, w.type(torch.float32)), 5), "to()": (lambda x, w: x @ w.to(torch.float32).T, 5),
}  # fmt: skip


@pytest.mark.parametrize("what", PRODUCTS)
def test_products_do_not_read_all(what: str, weight: tuple[Given, LazyTensor]) -> None:
    (given, lazy_weight), (function, width) = weight, PRODUCTS[what]
    x = torch.randn(2, 3, width)
    torch.testing.assert_close(function(x, lazy_weight), function(x, given.values))
    assert given.asked == ["product"]


def test_a_cast_in_a_product_that_is_rounded_reads_all(weight: tuple[Given, LazyTensor]) -> None:
    """A router's: it asks for products in float32."""
    (given, lazy_weight), x = weight, torch.randn(2, 5)
    given.rounded = True
    torch.testing.assert_close(functional.linear(x, lazy_weight.float()), x @ given.values.T)
    assert given.asked == ["all"]


def test_a_bias_is_read_beside_a_product(weight: tuple[Given, LazyTensor]) -> None:
    x = torch.randn(2, 5)
    bias = Given(torch.randn(7))
    expected = functional.linear(x, weight[0].values, bias.values)
    torch.testing.assert_close(functional.linear(x, weight[1], LazyTensor.of(bias)), expected)
    assert (weight[0].asked, bias.asked) == (["product"], ["all"])


class Pausing(Given):
    """Another operation on a stand-in takes place before a product returns, as when other groups run."""

    def product(self, x: Tensor, transposed: bool) -> Tensor:
        other = Given(torch.ones(4, 5))
        assert type(functional.linear(x, LazyTensor.of(other))) is Tensor
        assert other.asked == ["product"]
        return super().product(x, transposed)


def test_a_product_leaves_no_guard_while_others_run() -> None:
    x = torch.randn(2, 5)
    weight = Pausing(torch.randn(7, 5))
    torch.testing.assert_close(functional.linear(x, LazyTensor.of(weight)), x @ weight.values.T)
