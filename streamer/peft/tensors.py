"""Present tensors of a live model as a safetensors file, wherever they are: on a device, or offloaded by accelerate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamer.errors import UnsupportedError
from streamer.storage.buffers import Piece
from streamer.storage.header import Header, TensorInfo
from streamer.storage.tensor_file import SAMPLE_BYTES, TensorFile
from streamer.weights.dtypes import SPELLINGS, as_bytes

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


@dataclass(frozen=True, eq=False)
class LiveTensor:
    """Parameter or buffer of a module.

    Attributes
    ----------
    module, key
        The module, and the tensor's name in it.
    tensor
        The parameter itself; it is on the meta device if accelerate keeps its values elsewhere.
    """

    module: nn.Module
    key: str
    tensor: Tensor

    @property
    def offloaded(self) -> bool:
        """Return whether accelerate keeps its values elsewhere between uses."""
        return self.tensor.device.type == "meta"

    @property
    def on_disk(self) -> bool:
        """Return whether its values are offloaded to disk."""
        return self.offloaded and self._in_cpu_memory() is None

    @property
    def storage(self) -> tuple[str, int]:
        """Return a key for its values, which tied tensors share, offloaded or not."""
        kept = self._in_cpu_memory() if self.offloaded else None
        return ("parameter", id(self.tensor)) if kept is None or kept.numel() == 0 else ("memory", kept.data_ptr())

    @property
    def device(self) -> torch.device:
        """Return the device on which it is used."""
        return torch.device(_hook(self).execution_device) if self.offloaded else self.tensor.device

    def values(self) -> Tensor:
        """Return its values; those of a tensor offloaded to disk are read each time."""
        if not self.offloaded:
            return self.tensor.detach()
        found: Tensor = _hook(self).weights_map[self.key]
        return found.detach()

    def write(self, values: Tensor) -> None:
        """Replace its values by others of the same shape.

        Raises
        ------
        UnsupportedError
            If they are on disk.
        """
        stored = self._in_cpu_memory() if self.offloaded else self.tensor.detach()
        if stored is None:
            raise UnsupportedError(
                f"{self.key!r} of {type(self.module).__name__}: is offloaded to the disk, which is not written to; load the model without "
                "disk in its device_map, or merge from the files with `streamer merge`"
            )
        with torch.no_grad():
            stored.copy_(values)

    def stay(self) -> None:
        """Make accelerate leave the module's values in place; a hook that PEFT copied from a base's module would load the base's."""
        for hook in _hooks(self.module):
            if getattr(hook, "weights_map", None) is not None:
                hook.offload = False

    def untie(self, values: Tensor) -> None:
        """Give its module separate values instead of those it shares with another module; the values must not be on disk."""
        if self.offloaded:
            data, name = self._map()
            data[name] = values
        else:
            made = values.to(self.device, self.tensor.dtype)
            self.module.register_parameter(self.key, nn.Parameter(made, self.tensor.requires_grad))

    def _in_cpu_memory(self) -> Tensor | None:
        """Return the tensor that accelerate keeps in CPU memory; None if it is on disk."""
        data, name = self._map()
        found = data.get(name) if isinstance(data, Mapping) else None
        return found if isinstance(found, Tensor) else None

    def _map(self) -> tuple[Any, str]:
        """Return the map in which accelerate keeps offloaded values, and the tensor's name in it."""
        data: Any = _hook(self).weights_map
        name = getattr(data, "prefix", "") + self.key
        data = getattr(data, "dataset", data)  # unwrap a view that has only names with a prefix
        return getattr(data, "state_dict", data), name  # unwrap a loader with some values in memory and others on disk


def _hook(live: LiveTensor) -> Any:
    """Find accelerate's hook that keeps the values of an offloaded tensor.

    Raises
    ------
    UnsupportedError
        If there is none.
    """
    for one in _hooks(live.module):
        if getattr(one, "weights_map", None) is not None:
            return one
    raise UnsupportedError(
        f"{live.key!r} of {type(live.module).__name__}: has no values (it is on the meta device, and no hook of accelerate keeps them); "
        "load the model with its weights"
    )


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """List accelerate's hooks on a module."""
    hook = getattr(module, "_hf_hook", None)
    return tuple(getattr(hook, "hooks", (hook,)))


class LiveFile(TensorFile):
    """Tensors of a live model by name, as a read-only file; its bytes are the model's own if they can be viewed.

    Parameters
    ----------
    title
        Used in messages in place of a path.
    tensors
        Tensors in file order.

    Raises
    ------
    UnsupportedError
        If a tensor has a class or dtype that no file can store.
    """

    def __init__(self, title: str, tensors: Mapping[str, LiveTensor]) -> None:
        self.path, self.io = Path(title), "mmap"
        self.stamp = (0, 0, 0, 0)
        self.tensors = dict(tensors)
        self._last: tuple[str, Tensor] | None = None
        infos, at = [], 0
        for name, live in self.tensors.items():
            tensor = live.tensor
            dtype = SPELLINGS.get(tensor.dtype)
            # Its dtype and shape describe it fully; bitsandbytes' layers describe the rest.
            plain = type(tensor) in _PLAIN or type(tensor).__module__.startswith("bitsandbytes")
            if dtype is None or not plain:
                raise UnsupportedError(
                    f"{title}: {name!r} is a {type(tensor).__name__} of {tensor.dtype}, which is not supported; load the model in a "
                    "plain dtype"
                )
            end = at + tensor.numel() * tensor.element_size()
            infos.append(TensorInfo(name, dtype, tuple(tensor.shape), at, end))
            at = end
        listed = json.dumps([(info.name, info.dtype, info.shape) for info in infos])
        self.header = Header(tuple(infos), {}, 0, hashlib.sha256(listed.encode()).hexdigest())

    def check_unchanged(self) -> None:
        """Do nothing: the owner of the model may change it."""

    def release(self) -> None:
        """Drop the copy of the last tensor that could not be viewed."""
        self._last = None

    def view(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> memoryview:
        """View the bytes ``[start, stop)`` of a tensor or of a slice of one, read-only."""
        stop = info.nbytes if stop is None else stop
        offset = info.start - self.header.by_name[info.name].start
        return as_bytes(self._contiguous(info.name))[offset + start : offset + stop]

    def chunks(self, info: TensorInfo, size: int = 4 << 20) -> Iterator[Piece]:
        """Yield a tensor's bytes in pieces."""
        whole = self.view(info)
        return (Piece(whole[i : i + size]) for i in range(0, info.nbytes, size))

    def sample(self, size: int = SAMPLE_BYTES) -> str:
        """Compute the SHA-256 (hex) of names, dtypes, shapes, and the middle `size` bytes of every tensor that is not on disk."""
        digest = hashlib.sha256(self.header.digest.encode())
        for info in self.header.tensors:
            live = self.tensors[info.name]
            if live.on_disk or info.nbytes == 0:
                continue
            flat = live.values().reshape(-1)
            count = max(1, min(size // flat.element_size(), len(flat)))
            middle = (len(flat) - count) // 2
            digest.update(as_bytes(flat[middle : middle + count].cpu()))
        return digest.hexdigest()

    def _contiguous(self, name: str) -> Tensor:
        """Return a tensor's values in CPU memory; if they must be copied, the last copy is kept."""
        live = self.tensors[name]
        if live.tensor.device.type == "cpu" and live.tensor.is_contiguous():
            return live.values()
        if self._last is None or self._last[0] != name:
            self._last = None  # free the last copy before making the next
            self._last = name, live.values().cpu().contiguous()
        return self._last[1]
