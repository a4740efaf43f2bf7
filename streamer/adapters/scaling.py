"""Rank and scale of a module, as PEFT reads them out of an adapter's config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamer.adapters.rank_patterns import first_match
from streamer.errors import FormatError, MismatchError


def scale_of(name: str, rank: int, config: Mapping[str, Any], where: Path) -> float:
    """The scale that the config gives a module of this rank.

    Raises
    ------
    MismatchError, FormatError
        If the config has another rank, or no usable number.
    """
    stated = config_number(config, "rank_pattern", "r", name, where, default=rank)
    if stated != rank:
        raise MismatchError(
            f"{where}: module {name!r}: expected rank {stated:g} by the config, found {rank} rows in lora_A; "
            "config and weights are not of one adapter"
        )
    alpha = config_number(config, "alpha_pattern", "lora_alpha", name, where)
    return finite_scale(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank, name, where)


def finite_scale(scale: float, name: str, where: Path) -> float:
    """The scale, if it is a finite number other than 0."""
    if not math.isfinite(scale) or scale == 0:
        raise FormatError(
            f"{where}: module {name!r}: its alpha gives a scale of {scale!r}; expected a finite number, not 0"
        )
    return scale


def config_number(
    config: Mapping[str, Any], pattern_key: str, key: str, module: str, where: Path, default: float | None = None
) -> float:
    """A module's number: that of the first pattern that fits it, else the config's own, else the default."""
    patterns = config.get(pattern_key) or {}
    if not isinstance(patterns, dict):
        raise FormatError(f"{where}: {pattern_key}: expected an object, found {type(patterns).__name__}")
    try:
        found = first_match(patterns, module)
    except ValueError as e:
        raise FormatError(f"{where}: {pattern_key}: {e}") from None
    value = config.get(key, default) if found is None else patterns[found]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FormatError(f"{where}: {key} of module {module!r}: expected a number, found {value!r}")
    return float(value)
