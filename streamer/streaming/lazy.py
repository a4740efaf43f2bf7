"""Stand in for a model's parameter with a tensor that needs no memory and reads its values when an operation needs them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map

from streamer.errors import UnsupportedError

BLOCK_BYTES = 64 << 20
"""Bytes of a matrix's rows that are read and multiplied at a time."""


class Reader(ABC):
    """Reads the float32 values of one parameter for the current variant."""

    name: str
    shape: tuple[int, ...]
    device: torch.device
    has_rows = False
    """Whether `rows` reads only those rows."""

    @abstractmethod
    def read(self) -> Tensor:
        """Read all values."""

    def rows(self, i: int, j: int) -> Tensor:
        """Read rows i to j of a matrix."""
        return self.read()[i:j]

    def row_range(self) -> tuple[int, int]:
        """Return the range of rows in use: all, or a block of the vocabulary."""
        return 0, self.shape[0]

    def matrix(self, index: int) -> Tensor | None:
        """Read one matrix of a stack, or return a stand-in; None if the parameter is not a stack."""
        return None

    def gather(self, ids: Tensor) -> Tensor | None:
        """Read one row for each id, (*ids, columns); None if the parameter is not read row by row."""
        return None


class Multiplier(Reader):
    """Reads the values of one parameter, and multiplies with it itself."""

    @abstractmethod
    def product(self, x: Tensor, transposed: bool) -> Tensor:
        """Compute ``x Wᵀ``, or ``x W`` if `transposed`."""


class _Transpose(Multiplier):
    """Reads the transpose of a matrix."""

    def __init__(self, of: Multiplier) -> None:
        self.of, self.name, self.shape, self.device = of, of.name, of.shape[::-1], of.device

    def read(self) -> Tensor:
        return self.of.read().T

    def product(self, x: Tensor, transposed: bool) -> Tensor:
        return self.of.product(x, not transposed)


class LazyTensor(Tensor):
    """Parameter whose values stay on disk: it has shape and dtype, and each operation reads what it needs.

    Products, look-ups in an embedding, and access to one matrix of a stack read a part at a time; every other operation reads the whole
    tensor. Results are plain tensors.
    """

    reader: Reader

    @classmethod
    def of(cls, reader: Reader) -> LazyTensor:
        """Make the stand-in for a parameter."""
        lazy: LazyTensor = Tensor._make_subclass(cls, torch.empty(reader.shape, dtype=torch.float32, device="meta"))
        lazy.reader = reader
        return lazy

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:  # fmt: skip
        """Compute an operation on values read for it."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func == Tensor.device.__get__:  # `__get__` makes a new object each time, so compare with ==
                return args[0].reader.device
            if func in _ALIASES:
                return args[0]
            _refuse_writing(func, args, kwargs)
            if func in _METADATA:
                return func(*args, **kwargs)
            special = _SPECIAL.get(func)
            if special is not None and (result := special(*args, **kwargs)) is not None:
                return result
            return func(*tree_map(_values, tuple(args)), **tree_map(_values, dict(kwargs)))

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes more arguments
        return f"LazyTensor({self.reader.shape})"


def _refuse_writing(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse an operation that changes a parameter: it would change only a temporary copy."""
    name = getattr(func, "__name__", "")
    inplace = name in ("__setitem__", "__set__") or (
        name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    )
    inplace = inplace or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")
    if (inplace and args and isinstance(args[0], LazyTensor)) or isinstance(kwargs.get("out"), LazyTensor):
        target = args[0] if inplace else kwargs["out"]
        raise UnsupportedError(
            f"{target.reader.name!r} is changed by the model as it runs ({name}), not supported by evaluate and fit; measure merged models"
        )


def _values(value: Any) -> Any:
    return value.reader.read() if isinstance(value, LazyTensor) else value


_ALIASES = {Tensor.data.__get__, Tensor.detach}  # type: ignore[attr-defined]  # a getter, in torch's stub a tensor
"""Operations whose results share the parameter's memory: changing a result would change the parameter."""

_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "ndim", "is_meta", "layout", "requires_grad", "itemsize",
                                                 "is_quantized", "is_sparse", "is_nested", "is_cuda", "is_cpu", "is_leaf", "grad",
                                                 "grad_fn")),
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.is_floating_point, Tensor.is_complex,
    Tensor.__len__, Tensor.ndimension, Tensor.is_contiguous,
}  # fmt: skip


def _linear(x: Tensor, weight: Any, bias: Any = None) -> Tensor | None:
    """Compute ``x Wᵀ + b``, a few rows of W at a time."""
    if not isinstance(weight, LazyTensor) or isinstance(x, LazyTensor):
        return None
    reader = weight.reader
    if isinstance(reader, Multiplier):
        product = reader.product(x, False)
        return product if bias is None else product + _values(bias)
    if not reader.has_rows:
        return None
    first, last = reader.row_range()
    step = max(1, BLOCK_BYTES // (4 * max(1, reader.shape[1])))
    bias = None if bias is None else _values(bias)
    if last - first <= step:
        return functional.linear(x, reader.rows(first, last), bias)
    out = x.new_empty((*x.shape[:-1], last - first))
    for i in range(first, last, step):
        j = min(last, i + step)
        out[..., i - first : j - first] = x @ reader.rows(i, j).T
    return out if bias is None else out.add_(bias)


def _embedding(ids: Tensor, weight: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """Look up rows; the function's other arguments concern training or norms."""
    renormed = kwargs.get("max_norm") is not None or (len(args) > 1 and args[1] is not None)
    if not isinstance(weight, LazyTensor) or renormed:
        return None
    count = weight.reader.shape[0]
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < count:  # beyond the rows a file has other bytes
        raise UnsupportedError(
            f"{weight.reader.name!r}: expected rows 0 to {count - 1}, found {int(ids.min())} to {int(ids.max())} looked up; use a "
            "smaller --length if they are positions"
        )
    return weight.reader.gather(ids)


def _item(weight: Any, index: Any) -> Tensor | None:
    """Take one matrix of a stack."""
    if not isinstance(weight, LazyTensor):
        return None
    number = index.item() if isinstance(index, Tensor) and index.ndim == 0 and not index.is_floating_point() else index
    return weight.reader.matrix(number) if type(number) is int else None


def _matmul(x: Any, weight: Any) -> Tensor | None:
    """Compute ``x W`` if a `Multiplier` reads the weight."""
    multiplier = isinstance(weight, LazyTensor) and weight.ndim == 2 and isinstance(weight.reader, Multiplier)
    return weight.reader.product(x, True) if multiplier and not isinstance(x, LazyTensor) else None


def _addmm(bias: Any, x: Any, weight: Any, *, beta: float = 1, alpha: float = 1) -> Tensor | None:
    """Compute ``b + x W`` if a `Multiplier` reads the weight."""
    product = _matmul(x, weight) if beta == alpha == 1 else None
    return None if product is None else product + _values(bias)


def _bmm(input: Any, mat2: Any) -> Tensor | None:  # noqa: A002  # torch's names, by which it may be called
    """Compute ``x_e W_e`` for each matrix of a stack, one at a time."""
    if isinstance(input, LazyTensor) or not isinstance(mat2, LazyTensor) or len(input) != mat2.shape[0]:
        return None
    products = []
    for e, own in enumerate(input):
        matrix = mat2.reader.matrix(e)
        if matrix is None:
            return None
        product = _matmul(own, matrix)
        products.append(own @ matrix if product is None else product)
    return torch.stack(products)


def _transpose(weight: Any, *dimensions: int) -> Tensor | None:
    """Return a stand-in for the transpose of a matrix that a `Multiplier` reads."""
    multiplier = isinstance(weight, LazyTensor) and weight.ndim == 2 and isinstance(weight.reader, Multiplier)
    exchanged = not dimensions or {d % 2 for d in dimensions} == {0, 1}
    return LazyTensor.of(_Transpose(weight.reader)) if multiplier and exchanged else None


_SPECIAL: Mapping[Any, Callable[..., Tensor | None]] = {
    functional.linear: _linear, functional.embedding: _embedding, Tensor.__getitem__: _item,
    torch.matmul: _matmul, Tensor.matmul: _matmul, Tensor.__matmul__: _matmul, torch.mm: _matmul, Tensor.mm: _matmul,
    torch.addmm: _addmm, torch.bmm: _bmm, Tensor.bmm: _bmm,
    Tensor.T.__get__: _transpose, Tensor.mT.__get__: _transpose, Tensor.t: _transpose, torch.t: _transpose,  # type: ignore[attr-defined]  # as above
    Tensor.transpose: _transpose, torch.transpose: _transpose,
}  # fmt: skip
