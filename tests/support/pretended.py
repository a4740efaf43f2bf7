"""A device that is pretended: its tensors have values, in memory of the CPU, and an operation on tensors of two devices fails.

It is what torch's fake tensors are on a device that is not there, but that the values are real: what depends on them, such as which rows
are looked up and which expert is given a token, runs as it does, and results can be compared with those of the CPU.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(f"{NAME}:0")

CPU = torch.device("cpu")
COPIES = (torch.ops.aten._to_copy, torch.ops.aten.to, torch.ops.aten.copy_)


class MixedDevices(Exception):
    """An operation on tensors of two devices."""


class Traffic:
    """Bytes that crossed, and that are and were at most on the device."""

    def __init__(self) -> None:
        self.to_device = self.to_host = self.live = self.peak = 0
        self.storages: dict[int, int] = {}

    @contextlib.contextmanager
    def counted(self) -> Iterator[Traffic]:
        """Count anew inside the context."""
        gc.collect()
        self.to_device = 0
        self.to_host = 0
        self.peak = self.live
        before = self.live
        yield self
        self.peak -= before

    def holds(self, inner: torch.Tensor) -> None:
        """Count a tensor's memory until it goes."""
        storage = inner.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, key: int) -> None:
        self.live -= self.storages.pop(key)


TRAFFIC = Traffic()


class PretendedTensor(torch.Tensor):
    """A tensor that says it is on the device, and has its values in `inner`."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> PretendedTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # weights' stand-ins have theirs

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __getitem__(self, index: Any) -> Any:
        indices = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(
            tuple(_tensor(i).to(DEVICE) if isinstance(i, list) else i for i in indices)
        )

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return compute(func, args, kwargs or {})


def each(of: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to what is in lists and tuples."""
    return (
        type(value)([each(of, one) for one in value]) if type(value) in (list, tuple) else of(value)
    )


def compute(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Compute an operation on the values, if all are on one device; its results are there."""
    leaves: list[Any] = []
    each(leaves.append, (*args, *kwargs.values()))
    given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    mine = {id(t.inner): t for t in given if isinstance(t, PretendedTensor)}
    others = [
        t for t in given if not isinstance(t, PretendedTensor) and t.ndim and t.device.type == "cpu"
    ]
    device = next(
        (leaf for leaf in leaves if isinstance(leaf, torch.device)), DEVICE if mine else CPU
    )
    if func.overloadpacket is torch.ops.aten.copy_:
        device = args[0].device
    copied = func.overloadpacket in COPIES and (device == DEVICE) != isinstance(
        given[-1], PretendedTensor
    )
    if copied and device == DEVICE:
        TRAFFIC.to_device += given[-1].nbytes
    elif copied:
        TRAFFIC.to_host += given[-1].nbytes
    elif mine and others:
        raise MixedDevices(f"{func} on {[(type(t).__name__, list(t.shape)) for t in given]}")

    def inner(value: Any) -> Any:
        return (
            CPU
            if isinstance(value, torch.device)
            else value.inner
            if isinstance(value, PretendedTensor)
            else value
        )

    def outer(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        value = value.resolve_conj()  # of which the outer tensor would not know
        if copied and func.overloadpacket is not torch.ops.aten.copy_:
            value = value.clone()
        if device != DEVICE:
            return value
        TRAFFIC.holds(value)
        known = mine.get(id(value))
        if known is not None:
            return known
        with torch.inference_mode(
            value.is_inference()
        ):  # a view of what was made outside of it is none of its tensors
            return PretendedTensor(value)

    return each(
        outer,
        func(
            *each(inner, tuple(args)),
            **{name: each(inner, value) for name, value in kwargs.items()},
        ),
    )


_made = torch.library.Library("_", "IMPL")
_made.fallback(
    lambda func, *args, **kwargs: compute(func, args, kwargs), "PrivateUse1"
)  # what makes tensors

_tensor = torch.tensor


def tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
    """Make a tensor of Python's numbers, which torch itself does not do on a device that Python registers."""
    if device is None or torch.device(device) != DEVICE:
        return _tensor(data, device=device, **options)
    requires_grad = options.pop("requires_grad", False)
    return _tensor(data, **options).to(DEVICE).requires_grad_(requires_grad)


torch.tensor = tensor
