"""Read a PEFT adapter's ``adapter_config.json`` and apply PEFT's rules for a module's rank and scaling."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from streamer.errors import FormatError, InputError, MismatchError, MissingInputError, UnsupportedError, UsageError
from streamer.storage.checkpoint import read_json_object
from streamer.units import listed, quoted

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
LORA_NAME = "pytorch_lora_weights.safetensors"  # of a diffusers pipeline

MAX_REPEATS = 4
"""Most open-ended repeats in one pattern: each may multiply the time by the name's length."""

LoraBLayout = Literal["rank_major", "grouped_by_expert"]
"""Order of lora_B's columns for stacked experts: rank by rank, as PEFT stores them, or expert by expert, as Unsloth did."""


@dataclass(frozen=True)
class Stated:
    """Facts about a run's adapters; `api.detect_intruder_dimensions` explains them as keywords.

    Raises
    ------
    UsageError
        If a value has the wrong type.
    """

    base_is_residual: bool = False
    lora_b_layout: LoraBLayout | None = None
    ignore_keys: Sequence[str] = ()

    def __post_init__(self) -> None:
        layouts = get_args(LoraBLayout)
        if self.lora_b_layout not in (None, *layouts):
            raise UsageError(f"lora_b_layout: expected {' or '.join(layouts)}, found {self.lora_b_layout!r}")
        keys = self.ignore_keys
        if isinstance(keys, str) or not (isinstance(keys, Collection) and all(isinstance(key, str) for key in keys)):
            raise UsageError(f"ignore_keys: expected a list of keys, found {keys!r}")
        object.__setattr__(self, "ignore_keys", tuple(keys))


NOTHING_STATED = Stated()


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


def stated_options(identity: Mapping[str, Any]) -> list[str]:
    """List the command-line options that state again what an adapter's identity records as stated."""
    words = ["--base-is-residual"] if identity.get("base_is_residual") else []
    if layout := identity.get("lora_b_layout"):
        words += ["--lora-b-layout", layout]
    return words + [word for key in identity.get("ignored_keys", ()) for word in ("--ignore-key", key)]


def first_match(patterns: Iterable[str], module: str) -> str | None:
    """Find the first pattern, in the config's order, that matches a tail of the module's path, as PEFT does.

    Raises
    ------
    ValueError
        If a pattern is not a regular expression, or might never finish: it repeats a group after a repeat or branch, or has many repeats.
        Configs are downloaded and not trusted.
    """
    for pattern in patterns:
        if re.search(r"[*+?|}].*\)[*+{]", pattern) or sum(map(pattern.count, "*+")) > MAX_REPEATS:
            raise ValueError(f"pattern {quoted(pattern)} may never finish matching; write it without repeated groups")
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return pattern
        except (re.error, OverflowError, RecursionError) as e:
            raise ValueError(f"pattern {quoted(pattern)} is not a regular expression: {e}") from None
    return None


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
