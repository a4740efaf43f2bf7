"""Read a PEFT adapter's ``adapter_config.json`` and apply PEFT's rules for a module's rank and scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamer.adapters.config_patterns import first_match
from streamer.adapters.stated import NOTHING_STATED, Stated
from streamer.errors import FormatError, InputError, MismatchError, MissingInputError, UnsupportedError
from streamer.storage.checkpoint import read_json_object
from streamer.units import listed

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
LORA_NAME = "pytorch_lora_weights.safetensors"  # of a diffusers pipeline


@dataclass(frozen=True)
class AdapterConfig:
    """Values of an ``adapter_config.json``, its path for messages, and what the user states in addition."""

    values: Mapping[str, Any]
    path: Path
    stated: Stated = NOTHING_STATED

    def get(self, key: str, default: Any = None) -> Any:
        """Return a key's value, or the default if the config does not have it."""
        return self.values.get(key, default)

    def strings(self, key: str) -> list[str]:
        """Return the nonempty strings of a key that holds a list."""
        stated = self.values.get(key) or []
        return [s for s in stated if isinstance(s, str) and s] if isinstance(stated, list) else []

    @property
    def peft_type(self) -> Any:
        """Return PEFT's name of the method."""
        return self.values.get("peft_type", "LORA")

    @property
    def base_model(self) -> Any:
        """Return the model that the adapter was trained on: a hub id or a path."""
        return self.values.get("base_model_name_or_path")

    @property
    def fan_in_fan_out(self) -> bool:
        """Return whether the config says that the base stores (in, out)."""
        return bool(self.values.get("fan_in_fan_out", False))

    @property
    def ensure_weight_tying(self) -> bool:
        """Return whether a tied ``lm_head`` also gets the embedding's delta."""
        return bool(self.values.get("ensure_weight_tying"))

    def number(self, pattern_key: str, key: str, module: str, default: float | None = None) -> float:
        """Return a module's number: from the first matching pattern, else from the config, else the default.

        Raises
        ------
        FormatError
            If the value is not a number, or the patterns cannot be matched.
        """
        patterns = self.values.get(pattern_key) or {}
        if not isinstance(patterns, dict):
            raise FormatError(f"{self.path}: {pattern_key}: expected an object, found {type(patterns).__name__}")
        try:
            found = first_match(patterns, module)
        except ValueError as e:
            raise FormatError(f"{self.path}: {pattern_key}: {e}") from None
        value = self.values.get(key, default) if found is None else patterns[found]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FormatError(f"{self.path}: {key} of module {module!r}: expected a number, found {value!r}")
        return float(value)

    def lora_scaling(self, module: str, rank: int) -> float:
        """Return the scaling of a LoRA module with this many rows in ``lora_A``: ``alpha/r``, or ``alpha/√r`` for rsLoRA.

        Raises
        ------
        MismatchError, FormatError
            If the config states another rank, or no usable number.
        """
        stated = self.number("rank_pattern", "r", module, default=rank)
        if stated != rank:
            raise MismatchError(
                f"{self.path}: module {module!r}: expected rank {stated:g} by the config, found {rank} rows in lora_A; "
                "config and weights belong to different adapters"
            )
        alpha = self.number("alpha_pattern", "lora_alpha", module)
        return self._finite(alpha / math.sqrt(rank) if self.values.get("use_rslora") else alpha / rank, module)

    def method_scaling(self, module: str) -> tuple[int, float]:
        """Return the rank and the scaling ``alpha/r`` of a module of a method other than LoRA."""
        rank = int(self.number("rank_pattern", "r", module))
        return rank, self._finite(self.number("alpha_pattern", "alpha", module) / rank if rank else 0.0, module)

    def _finite(self, scaling: float, module: str) -> float:
        if not math.isfinite(scaling) or scaling == 0:
            raise FormatError(
                f"{self.path}: module {module!r}: its alpha gives a scale of {scaling!r}, expected a finite number other than 0"
            )
        return scaling


def read_adapter_config(path: Path, stated: Stated) -> AdapterConfig:
    """Read the config from an adapter's directory.

    Raises
    ------
    InputError
        If the directory holds no adapter, or its weights are not safetensors.
    """
    if not (path / CONFIG_NAME).exists():
        if (path / "config.json").exists():
            raise InputError(
                f"{path}: has no {CONFIG_NAME} but a config.json, so it looks like a model; the order is BASE ADAPTER"
            )
        inside = listed(sorted(repr(p.parent.name) for p in path.glob(f"*/{CONFIG_NAME}")))
        what = f"name one of the adapters in it: {inside}" if inside else "is this a PEFT adapter?"
        raise MissingInputError(f"{path}: expected {CONFIG_NAME}, found none; {what}", path / CONFIG_NAME)
    if not (path / WEIGHTS_NAME).exists():
        if (path / "adapter_model.bin").exists():
            raise UnsupportedError(
                f"{path}: has adapter_model.bin, a pickle, which can run code when read; if you trust it, load it with PEFT "
                f"and save it again with save_pretrained, which writes {WEIGHTS_NAME}"
            )
        found = listed(sorted(p.name for p in path.glob("*.safetensors"))) or "none"
        what = f"{path}: expected {WEIGHTS_NAME}, found {found}; finish the download, or save the adapter again as one file"
        raise MissingInputError(what, path / WEIGHTS_NAME)
    return AdapterConfig(read_json_object(path / CONFIG_NAME), path / CONFIG_NAME, stated)
