"""Read a PEFT adapter's ``adapter_config.json`` and apply PEFT's rules for a module's rank and scaling.

Find LoRA on parameters of a module, as PEFT's ``target_parameters`` writes it, typically for the experts of a mixture.

PEFT wraps the module once for each parameter; the parameter registered first is innermost. The factors are stored under the module's
name, with ``base_layer`` appended once or more for inner wrappers; which parameter each belongs to is not stored. lora_A is (E·r, in),
and its row e·r + k is expert e's k-th. lora_B is (out, r·E), and its column k·E + e is expert e's k-th. Until September 2026 Unsloth
stored that column at e·r + k. Shapes and norms are the same, so only the config or the user can say which.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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

_LAYOUTS = get_args(LoraBLayout)


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
        if self.lora_b_layout not in (None, *_LAYOUTS):
            raise UsageError(f"lora_b_layout: expected {' or '.join(_LAYOUTS)}, found {self.lora_b_layout!r}")
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
        if re.search(r"[*+?|}].*\)[*+{]", pattern) or sum(map(pattern.count, ("*", "+", ",}"))) > MAX_REPEATS:
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


LAYOUT_KEY, LAYOUT_DETAILS = "lora_B_layout", "unsloth_fused_expert_lora"

INNER = ".base_layer"


@dataclass(frozen=True)
class Wrapped:
    """Wrappers of one module.

    Attributes
    ----------
    module
        Path of the module in the model.
    parameters
        The module's parameters that the config names, one for each wrapper.
    factors
        Names of each wrapper's lora_A and lora_B, the innermost first.
    """

    module: str
    parameters: tuple[str, ...]
    factors: tuple[tuple[str, str], ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Return the wrappers' names on disk."""
        return tuple(self.module + INNER * depth for depth in range(len(self.factors)))

    def matched_as(self, parameter: str) -> str:
        """Return the name by which to search a base for a parameter."""
        return f"{self.module}.{parameter}".removesuffix(".weight")


def find_wrapped(
    pairs: Mapping[str, Mapping[str, str]], config: AdapterConfig, is_matrix: Callable[[str, str], bool]
) -> tuple[list[Wrapped], list[str]]:
    """Find the wrapped modules among those with factors, and everything that is wrong with them, one phrase each.

    Parameters
    ----------
    pairs
        Module → {"A": tensor, "B": tensor}; inner wrappers appear under their names on disk.
    is_matrix
        Tests whether a parameter's lora_A has as many rows as the rank; the parameter is then a plain matrix, not a stack.
    """
    found, wrong = [], []
    for name, factors in pairs.items():
        if name.endswith(INNER):
            continue
        layers = [factors]
        while (inner := pairs.get(name + INNER * len(layers))) is not None:
            layers.append(inner)
        parameters = targeted_parameters(config, name)
        # ``gate_up_proj`` names a parameter of any module that has one; if lora_A fits a single matrix, it belongs to the module's weight.
        bare = parameters & set(config.strings("target_parameters")) - {"weight"}
        if bare and len(layers) == 1 and is_matrix(name, factors["A"]):
            parameters -= bare
        if not parameters or (parameters == {"weight"} and is_matrix(f"{name}.weight", factors["A"])):
            continue
        if len(parameters) != len(layers):
            named = f"{len(parameters)} of its parameters ({listed(sorted(parameters))})"
            wrong.append(f"module {name!r}: target_parameters names {named}, but there are factors for {len(layers)}")
        found.append(Wrapped(name, tuple(sorted(parameters)), tuple((f["A"], f["B"]) for f in reversed(layers))))
    known = {name for w in found for name in w.layers}
    strays = [name for name in pairs if name.endswith(INNER) and name not in known]
    wrong += [f"module {name!r}: target_parameters names none of its parameters" for name in strays]
    return found, wrong


def targeted_parameters(config: AdapterConfig, module: str) -> set[str]:
    """List a module's parameters that a config names, by their own names; PEFT's rule."""
    named = {target: target.rpartition(".")[2] for target in config.strings("target_parameters")}
    return {own for target, own in named.items() if f".{module}.{own}".endswith(f".{target}")}


def layout_refusals(config: AdapterConfig) -> list[str]:
    """Return the reason to refuse the config's order of lora_B's columns, if any."""
    rows, columns = _layouts(config)
    stated = config.stated.lora_b_layout
    if rows - {"grouped_by_expert"}:
        return [f"lora_A_layout is {listed(sorted(rows))}, expected grouped_by_expert"]
    if len(columns) > 1 or columns - ({stated} if stated else {*_LAYOUTS}):
        expected = f"{stated} (as --lora-b-layout says; leave it out)" if stated else " or ".join(_LAYOUTS)
        return [f"{LAYOUT_KEY} is {listed(sorted(columns))}, expected {expected} for all experts"]
    return []


def stored_layout(config: AdapterConfig) -> str | None:
    """Return the order of lora_B's columns that a config states, or None."""
    return next(iter(_layouts(config)[1]), None)


def is_grouped(config: AdapterConfig, path: Path, metadata: Mapping[str, str]) -> bool:
    """Test whether the columns of an adapter's lora_B are grouped by expert.

    Parameters
    ----------
    path
        The adapter's directory.
    metadata
        Metadata of the weights file.

    Raises
    ------
    UnsupportedError
        If Unsloth may have written the adapter, and neither its config nor the user states the order.
    """
    layout, card = stored_layout(config) or config.stated.lora_b_layout, path / "README.md"
    # Adapters written by streamer are in PEFT's order, even if their card names Unsloth as the trainer.
    if layout is None and "streamer" not in metadata:
        text = card.read_text("utf-8", "replace") if card.is_file() else ""
        if "unsloth" in f"{json.dumps([config.values, dict(metadata)])}{text}".lower():
            raise UnsupportedError(
                f"{config.path}: refused: LoRA on stacked experts, and config, metadata or README.md names Unsloth, which stored lora_B "
                "grouped by expert until September 2026; pass --lora-b-layout grouped_by_expert if it wrote this one before then, else "
                "--lora-b-layout rank_major"
            )
    return layout == "grouped_by_expert"


def _layouts(config: AdapterConfig) -> tuple[set[str], set[str]]:
    """Collect every order that a config states for the rows of lora_A and for the columns of lora_B."""
    details = config.get(LAYOUT_DETAILS)
    details = details if isinstance(details, dict) else {}
    parameters = details.get("parameters")
    each = [details, *(parameters.values() if isinstance(parameters, dict) else ())]
    rows, columns = ([one.get(key) for one in each if isinstance(one, dict)] for key in ("lora_A_layout", LAYOUT_KEY))

    def said(layouts: Iterable[object]) -> set[str]:
        return {str(v) if v in _LAYOUTS else quoted(v, 30) for v in layouts if v is not None}

    return said(rows), said([config.get(LAYOUT_KEY), *columns])
