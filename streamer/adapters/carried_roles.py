"""What an adapter holds beside its factors: modules saved whole, biases, trained tokens, and the module that each is of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamer.adapters.modules import Carried, Module
from streamer.errors import FormatError


def carried_tensor(
    role: str,
    match: re.Match[str],
    source: str,
    modules: Mapping[str, Module],
    file: Path,
    config: Mapping[str, Any],
    where: Path,
) -> Carried:
    """Say what a tensor that is no factor belongs to.

    Parameters
    ----------
    role, match
        By the rule of `kinds` that its name falls under.
    source
        Its name in the file.
    modules
        Those that have factors.
    file, where
        The paths of the weights and of the config, for messages.
    """
    groups = match.groupdict()
    module = groups.get("module") or source
    if role == "lora_bias":
        if module not in modules:
            raise FormatError(f"{file}: {source!r} has no lora_A and lora_B beside it; save the adapter again")
        return Carried(role, module, "bias", source, modules[module].scale)
    if role == "tokens":
        return Carried(role, module, "weight", source, indices=_token_indices(config, module, where))
    return Carried(role, module, groups.get("parameter") or "weight", source)


def _token_indices(config: Mapping[str, Any], module: str, where: Path) -> tuple[int, ...]:
    """The rows that trained tokens replace: PEFT stores them in the config, for the input embedding or by module."""
    stated = config.get("trainable_token_indices")
    if isinstance(stated, dict):
        stated = next((v for key, v in stated.items() if f".{module}".endswith(f".{key}")), None)
    numbers = [i for i in stated if type(i) is int and i >= 0] if isinstance(stated, list) else []
    if not numbers or numbers != stated or len(set(numbers)) != len(numbers):
        raise FormatError(
            f"{where}: trainable_token_indices: expected the rows of {module!r} as different numbers, found {stated!r}"
        )
    return tuple(numbers)
