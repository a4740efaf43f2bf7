"""Find the parts of a PEFT model in memory: the base's tensors by their names without PEFT, and an adapter's tensors."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from streamer.adapters.adapter_config import AdapterConfig
from streamer.errors import UnsupportedError, UsageError
from streamer.packages import require_package
from streamer.peft.tensors import LiveTensor
from streamer.plan.targets import Target
from streamer.units import listed


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
