"""Give tensors of a live model the form of a safetensors file, wherever they are: on a device, or offloaded by accelerate."""

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
from streamer.storage.header import Header, TensorInfo
from streamer.storage.tensor_file import SAMPLE_BYTES, TensorFile
from streamer.weights.dtypes import SPELLINGS, as_bytes

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


@dataclass(frozen=True, eq=False)
class LiveTensor:
    """A parameter or buffer of a module.

    Attributes
    ----------
    module, key
        The module that has it, and its name there.
    tensor
        The parameter itself; on the meta device where accelerate keeps its values elsewhere.
    """

    module: nn.Module
    key: str
    tensor: Tensor

    @property
    def offloaded(self) -> bool:
        """Whether accelerate keeps its values elsewhere between two uses."""
        return self.tensor.device.type == "meta"

    @property
    def at_hand(self) -> bool:
        """Whether its bytes can be viewed where they are."""
        return self.tensor.device.type == "cpu" and self.tensor.is_contiguous()

    @property
    def on_disk(self) -> bool:
        """Whether its values are offloaded to the disk."""
        return self.offloaded and self._in_cpu_memory() is None

    @property
    def storage(self) -> tuple[str, int]:
        """Tell its values from others': those of tied tensors are the same ones, offloaded or not."""
        kept = self._in_cpu_memory() if self.offloaded else None
        return ("parameter", id(self.tensor)) if kept is None or kept.numel() == 0 else ("memory", kept.data_ptr())

    @property
    def device(self) -> torch.device:
        """Device that it is used on."""
        return torch.device(_hook(self).execution_device) if self.offloaded else self.tensor.device

    def values(self) -> Tensor:
        """Return its values; those of an offloaded tensor are read anew where they are on the disk."""
        if not self.offloaded:
            return self.tensor.detach()
        found: Tensor = _hook(self).weights_map[self.key]
        return found.detach()

    def write(self, values: Tensor) -> None:
        """Put values of its shape in the place of its own.

        Raises
        ------
        UnsupportedError
            If they are on the disk.
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
        """Have accelerate leave its module's values where they are: a hook that PEFT copied with a base's module loads the base's."""
        for hook in _hooks(self.module):
            if getattr(hook, "weights_map", None) is not None:
                hook.offload = False

    def untie(self, values: Tensor) -> None:
        """Give its module values of its own in the place of those that it shares with another; they are not on the disk."""
        if self.offloaded:
            data, name = self._map()
            data[name] = values
        else:
            made = values.to(self.device, self.tensor.dtype)
            self.module.register_parameter(self.key, nn.Parameter(made, self.tensor.requires_grad))

    def _in_cpu_memory(self) -> Tensor | None:
        """Find the tensor that accelerate keeps in the CPU's memory; None where it is on the disk."""
        data, name = self._map()
        found = data.get(name) if isinstance(data, Mapping) else None
        return found if isinstance(found, Tensor) else None

    def _map(self) -> tuple[Any, str]:
        """Find the map in which accelerate keeps the values of offloaded tensors, and its name there."""
        data: Any = _hook(self).weights_map
        name = getattr(data, "prefix", "") + self.key
        data = getattr(data, "dataset", data)  # a view of some names of one map
        return getattr(data, "state_dict", data), name  # of a loader that has some in memory and others on the disk


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
    """Tensors of a live model by name, as a file that is never written to; bytes are those of the model itself where they can be.

    Parameters
    ----------
    title
        In the place of a path, in messages.
    tensors
        In file order.

    Raises
    ------
    UnsupportedError
        If a tensor is of a class or dtype that no file has.
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
            if dtype is None or not _is_plain(tensor):
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
        """Do nothing: who has the model may change it."""

    def release(self) -> None:
        """Drop the copy of the last tensor that had to be copied to be read."""
        self._last = None

    def view(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> memoryview:
        """View the bytes ``[start, stop)`` of a tensor, or of a slice of one; nobody writes to them."""
        stop = info.nbytes if stop is None else stop
        offset = info.start - self.header.by_name[info.name].start
        return as_bytes(self._contiguous(info.name))[offset + start : offset + stop]

    def chunks(self, info: TensorInfo, size: int = 4 << 20) -> Iterator[memoryview]:
        """Yield a tensor's bytes in pieces."""
        whole = self.view(info)
        return (whole[i : i + size] for i in range(0, info.nbytes, size))

    def sample(self, size: int = SAMPLE_BYTES) -> str:
        """Compute the SHA-256 (hex) of names, dtypes and shapes, and the middle `size` bytes of every tensor that is not on the disk."""
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
        """Return a tensor's values in the CPU's memory; of the last one that had to be copied the copy is kept."""
        live = self.tensors[name]
        if live.at_hand:
            return live.values()
        if self._last is None or self._last[0] != name:
            self._last = None  # before the next is read
            self._last = name, live.values().cpu().contiguous()
        return self._last[1]


def _is_plain(tensor: Tensor) -> bool:
    """Test whether a tensor is what its dtype and shape say: of torch's own classes, or of bitsandbytes', whose layers say the rest."""
    return type(tensor) in _PLAIN or type(tensor).__module__.startswith("bitsandbytes")
