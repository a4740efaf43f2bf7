"""Find the parts of a PEFT model in memory: the base's tensors by their names without PEFT, and an adapter's tensors.

Present tensors of a live model as a safetensors file, wherever they are: on a device, or offloaded by accelerate.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from streamer.adapters.adapter_config import AdapterConfig
from streamer.errors import UnsupportedError, UsageError
from streamer.packages import require_package
from streamer.plan.targets import Target
from streamer.storage.atomic_file import Piece
from streamer.storage.checkpoint import SAMPLE_BYTES, TensorFile
from streamer.storage.header import Header, TensorInfo
from streamer.units import listed
from streamer.weights.base import SPELLINGS, as_bytes

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

    def sample(self) -> str:
        """Compute the SHA-256 (hex) of names, dtypes, shapes, and the middle `SAMPLE_BYTES` of every tensor that is not on disk."""
        digest = hashlib.sha256(self.header.digest.encode())
        for info in self.header.tensors:
            live = self.tensors[info.name]
            if live.on_disk or info.nbytes == 0:
                continue
            flat = live.values().reshape(-1)
            count = max(1, min(SAMPLE_BYTES // flat.element_size(), len(flat)))
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


def require_peft() -> Any:
    """Import PEFT; see `require_package`."""
    return require_package("peft", (0, 21), "streamer.peft needs PEFT 0.21", "peft")


@dataclass(frozen=True, eq=False)
class LiveModel:
    """Model into which PEFT put adapters.

    Attributes
    ----------
    model
        A `PeftModel`, or a plain model with injected adapters, without the wrapper of `torch.compile`.
    base
        The model with the layers; `model` itself if adapters were injected.
    adapter_name
        The adapter to use.
    """

    model: nn.Module
    base: nn.Module
    adapter_name: str

    @property
    def adapter_title(self) -> str:
        """Return the adapter's name for messages."""
        return f"adapter {self.adapter_name!r} in memory"

    @property
    def configs(self) -> dict[str, Any]:
        """Return PEFT's configs by adapter name."""
        return cast(dict[str, Any], self.model.peft_config)

    def adapter_tensors(self, adapter_name: str | None = None) -> dict[str, LiveTensor]:
        """Return an adapter's tensors by the names under which PEFT saves them.

        A tensor that PEFT creates for saving belongs to no module.
        """
        every = dict(entries(self.model, "", base_only=False))
        by_id = {id(live.tensor): live for live in every.values()}
        adapter_name = adapter_name or self.adapter_name
        try:
            with quiet_peft():
                saved = require_peft().get_peft_model_state_dict(
                    self.model,
                    state_dict={name: live.tensor for name, live in every.items()},
                    adapter_name=adapter_name,
                    save_embedding_layers=False,
                )
        except KeyError as e:
            raise UnsupportedError(
                f"adapter {adapter_name!r}: PEFT cannot save it, because it looks for {e}, which belongs to another adapter; load it in a "
                "model of its own"
            ) from e
        return {name: by_id.get(id(t)) or LiveTensor(self.model, name, t) for name, t in saved.items()}

    def adapter_config(self) -> AdapterConfig:
        """Return the adapter's config as PEFT would save it, with the version of the running PEFT."""
        tree = self.configs[self.adapter_name].to_dict()
        values = json.loads(json.dumps({**tree, "peft_version": require_peft().__version__}, default=_json_value))
        return AdapterConfig(values, Path(self.adapter_title))

    def layers(self) -> Iterator[tuple[str, Any]]:
        """Yield PEFT's layers that have this adapter, with their paths in `model`."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for name, module in self.model.named_modules():
            if isinstance(module, BaseTunerLayer):
                kinds = (getattr(module, attribute, ()) for attribute in module.adapter_layer_names)
                if any(self.adapter_name in kind for kind in kinds if not isinstance(kind, Tensor)):
                    yield name, module

    def activate(self, adapter_name: str) -> None:
        """Make an adapter active and trainable."""
        from peft import PeftModel, functional

        if isinstance(self.model, PeftModel):
            self.model.set_adapter(adapter_name)
        else:
            functional.set_adapter(self.model, adapter_name)

    def delete(self, adapter_name: str) -> None:
        """Remove an adapter."""
        from peft import PeftModel, functional
        from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

        if isinstance(self.model, PeftModel):
            self.model.delete_adapter(adapter_name)
        else:
            config = self.configs.pop(adapter_name)
            functional.delete_adapter(self.model, adapter_name, PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type])


def open_model(peft_model: nn.Module, adapter_name: str) -> LiveModel:
    """Find the model and the adapter.

    Raises
    ------
    UsageError
        If the model has no adapter of that name.
    UnsupportedError
        If it mixes kinds of adapters, or deltas are merged into its weights.
    """
    peft = require_peft()
    from peft.tuners.tuners_utils import BaseTunerLayer

    model: Any = _uncompiled(peft_model)
    configs = getattr(model, "peft_config", None)
    if not isinstance(model, nn.Module) or not isinstance(configs, dict) or not configs:
        raise UsageError(
            f"peft_model: expected a model with PEFT adapters, found {type(model).__name__}; load one with PeftModel.from_pretrained, or "
            "pass the PEFT model inside it"
        )
    if isinstance(model, peft.PeftModel) and isinstance(_uncompiled(model.get_base_model()), peft.PeftModel):
        raise UnsupportedError(
            "peft_model: a PeftModel around a PeftModel is not supported; merge the inner one, or pass it alone"
        )
    if isinstance(model, peft.PeftMixedModel):
        raise UnsupportedError("peft_model: a PeftMixedModel, whose adapters are of several kinds, is not supported")
    if adapter_name not in configs:
        raise UsageError(
            f"adapter {adapter_name!r}: the model has none of this name; it has {listed(map(repr, configs))}"
        )
    base = _uncompiled(model.get_base_model() if isinstance(model, peft.PeftModel) else model)
    merged = next((n for n, m in base.named_modules() if isinstance(m, BaseTunerLayer) and m.merged), None)
    if merged is not None:
        raise UnsupportedError(
            f"{merged}: an adapter is merged into its weight, so the base's values are not available; call unmerge_adapter() first"
        )
    states = ((name, getattr(parameter, "quant_state", None)) for name, parameter in base.named_parameters())
    packed = next((name for name, state in states if getattr(state, "packing_format_for_cpu", False)), None)
    if packed is not None:
        raise UnsupportedError(
            f"{packed}: bitsandbytes repacked it for this CPU when the model ran, which is not supported; load the model again, and call "
            "streamer before you run the model"
        )
    return LiveModel(model, base, adapter_name)


def _uncompiled(model: Any) -> Any:
    """Return the model without the wrapper of `torch.compile`."""
    while isinstance(model, nn.Module) and "_orig_mod" in model._modules:  # PeftModel passes attributes on to its base
        model = model._modules["_orig_mod"]
    return model


def entries(module: nn.Module, prefix: str, base_only: bool) -> Iterator[tuple[str, LiveTensor]]:
    """Yield the tensors in each module's state dict, which for quantized layers include what decodes them."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if base_only and isinstance(module, AuxiliaryTrainingWrapper | BaseTunerLayer):
        wrapped = "original_module" if isinstance(module, AuxiliaryTrainingWrapper) else "base_layer"
        yield from entries(module.get_submodule(wrapped), prefix, base_only)
        return
    own: dict[str, Any] = {}
    module._save_to_state_dict(own, "", keep_vars=True)
    for key, tensor in own.items():
        if isinstance(tensor, Tensor):
            yield prefix + key, LiveTensor(module, key, tensor)
    for name, child in module.named_children():
        below = prefix if base_only and name == "_orig_mod" else f"{prefix}{name}."
        yield from entries(child, below, base_only)


def layer_of(target: Target, layers: Container[str]) -> str:
    """Return the path of PEFT's layer with the tensors of a target's module; "" if there is none."""
    path = target.module.tensor_names[0]
    while path and path not in layers:
        path = path.rpartition(".")[0]
    return path


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence PEFT's advice, and preserve torch's CPU generator: new factors are overwritten anyway."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        yield


def _json_value(value: object) -> Any:
    """Convert a value to JSON as PEFT does."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", str(value))
