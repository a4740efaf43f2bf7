"""Stand in for parameters whose values stay on disk: each operation reads what it needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map

from streamer.errors import UnsupportedError


class Reader(ABC):
    """Reads the float32 values of one parameter for the current variant."""

    name: str
    shape: tuple[int, ...]
    device: torch.device
    rounded: bool = False

    @abstractmethod
    def read(self) -> Tensor:
        """Read all values, or those of the rows in use."""

    def matrix(self, index: int) -> Tensor | None:
        """Read one matrix of a stack, or return a stand-in; None if the parameter is not a stack."""
        return None

    def gather(self, ids: Tensor) -> Tensor | None:
        """Read one row for each id, (*ids, columns); None if the parameter is not read row by row."""
        return None

    @abstractmethod
    def product(self, x: Tensor, transposed: bool) -> Tensor:
        """Compute ``x Wᵀ``, or ``x W`` if `transposed`."""


class _Transpose(Reader):
    """Reads the transpose of a matrix."""

    def __init__(self, of: Reader) -> None:
        self.of = of
        self.name = of.name
        self.shape = of.shape[::-1]
        self.device = of.device

    def read(self) -> Tensor:
        return self.of.read().T

    def product(self, x: Tensor, transposed: bool) -> Tensor:
        return self.of.product(x, not transposed)


class LazyTensor(Tensor):
    """Parameter whose values stay on disk: it has shape and dtype, and each operation reads what it needs.

    Products, look-ups in an embedding, and access to one matrix of a stack read a part at a time; a cast to float32 reads nothing; every
    other operation reads the whole tensor. Results that were read are plain tensors.
    """

    reader: Reader

    @classmethod
    def of(cls, reader: Reader) -> LazyTensor:
        """Make the stand-in for a parameter."""
        lazy: LazyTensor = Tensor._make_subclass(
            cls, torch.empty(reader.shape, dtype=torch.float32, device="meta")
        )
        lazy.reader = reader
        return lazy

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute an operation on values read for it."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            # `__get__` makes a new object each time, so compare with ==.
            if func == Tensor.device.__get__:
                return args[0].reader.device
            if func in _ALIASES:
                return args[0]
            _refuse_writing(func, args, kwargs)
            if func in _METADATA:
                return func(*args, **kwargs)
        # Outside the guard, which holds for the whole thread: a sweep may run other groups before a product returns.
        special = _SPECIAL.get(func)
        if special is not None and (result := special(*args, **kwargs)) is not None:
            return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*tree_map(_values, tuple(args)), **tree_map(_values, dict(kwargs)))

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes more arguments
        return f"LazyTensor({self.reader.shape})"


def _refuse_writing(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse an operation that changes a parameter: it would change only a temporary copy."""
    name = getattr(func, "__name__", "")
    inplace = name in ("__setitem__", "__set__")
    inplace |= name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    inplace |= name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    if (inplace and args and isinstance(args[0], LazyTensor)) or isinstance(
        kwargs.get("out"), LazyTensor
    ):
        target = args[0] if inplace else kwargs["out"]
        raise UnsupportedError(
            f"{target.reader.name!r} is changed by the model as it runs ({name}), not supported by evaluate and repair; measure "
            "merged models"
        )


def _values(value: Any) -> Any:
    return value.reader.read() if isinstance(value, LazyTensor) else value


_ALIASES = {Tensor.data.__get__, Tensor.detach}  # type: ignore[attr-defined]  # a getter, in torch's stub a tensor
"""Operations whose results share the parameter's memory: changing a result would change the parameter."""

_METADATA = {
    *(
        getattr(Tensor, name).__get__
        for name in (
            "shape",
            "dtype",
            "ndim",
            "is_meta",
            "layout",
            "requires_grad",
            "itemsize",
            "is_quantized",
            "is_sparse",
            "is_nested",
            "is_cuda",
            "is_cpu",
            "is_leaf",
            "grad",
            "grad_fn",
        )
    ),
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.nelement,
    Tensor.element_size,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.__len__,
    Tensor.ndimension,
    Tensor.is_contiguous,
}


def _linear(x: Any, weight: Any, bias: Any = None) -> Tensor | None:
    """Compute ``x Wᵀ + b``."""
    if not isinstance(weight, LazyTensor) or isinstance(x, LazyTensor):
        return None
    product = weight.reader.product(x, False)
    return product if bias is None else product + _values(bias)


def _embedding(ids: Tensor, weight: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """Look up rows; the function's other arguments concern training or norms."""
    renormed = kwargs.get("max_norm") is not None or (len(args) > 1 and args[1] is not None)
    if not isinstance(weight, LazyTensor) or renormed:
        return None
    count = weight.reader.shape[0]
    # Beyond the rows a file has other bytes.
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < count:
        raise UnsupportedError(
            f"{weight.reader.name!r}: expected rows 0 to {count - 1}, found {int(ids.min())} to {int(ids.max())} looked up; use a "
            "smaller --length if they are positions"
        )
    return weight.reader.gather(ids)


def _item(weight: Any, index: Any) -> Tensor | None:
    """Take one matrix of a stack."""
    if not isinstance(weight, LazyTensor):
        return None
    if isinstance(index, Tensor) and index.ndim == 0 and not index.is_floating_point():
        index = index.item()
    return weight.reader.matrix(index) if type(index) is int else None


def _matmul(x: Any, weight: Any) -> Tensor | None:
    """Compute ``x W``."""
    lazy = isinstance(weight, LazyTensor) and weight.ndim == 2 and not isinstance(x, LazyTensor)
    return weight.reader.product(x, True) if lazy else None


def _addmm(bias: Any, x: Any, weight: Any, *, beta: float = 1, alpha: float = 1) -> Tensor | None:
    """Compute ``b + x W``."""
    product = _matmul(x, weight) if beta == alpha == 1 else None
    return None if product is None else product + _values(bias)


def _bmm(input: Any, mat2: Any) -> Tensor | None:  # noqa: A002  # torch's names, by which it may be called
    """Compute ``x_e W_e`` for each matrix of a stack, one at a time."""
    if (
        isinstance(input, LazyTensor)
        or not isinstance(mat2, LazyTensor)
        or len(input) != mat2.shape[0]
    ):
        return None
    products = []
    for e, rows in enumerate(input):
        matrix = mat2.reader.matrix(e)
        if matrix is None:
            return None
        products.append(rows @ matrix)
    return torch.stack(products) if products else None


def _cast(weight: Any, dtype: Any = None, *others: Any, **options: Any) -> Tensor | None:
    """Keep the stand-in where a router asks for float32, unless its products are rounded."""
    same = dtype is torch.float32 and not others and not options and not weight.reader.rounded
    return weight if same else None


def _transpose(weight: Any, *dimensions: int) -> Tensor | None:
    """Return a stand-in for the transpose of a matrix."""
    exchanged = not dimensions or {d % 2 for d in dimensions} == {0, 1}
    lazy = isinstance(weight, LazyTensor) and weight.ndim == 2
    return LazyTensor.of(_Transpose(weight.reader)) if lazy and exchanged else None


_SPECIAL: Mapping[Any, Callable[..., Tensor | None]] = {
    functional.linear: _linear,
    functional.embedding: _embedding,
    Tensor.__getitem__: _item,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    Tensor.mm: _matmul,
    torch.addmm: _addmm,
    torch.bmm: _bmm,
    Tensor.bmm: _bmm,
    Tensor.T.__get__: _transpose,  # type: ignore[attr-defined]  # as above
    Tensor.mT.__get__: _transpose,  # type: ignore[attr-defined]  # as above
    Tensor.t: _transpose,
    torch.t: _transpose,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.to: _cast,
    Tensor.type: _cast,
    Tensor.float: partial(_cast, dtype=torch.float32),
}
