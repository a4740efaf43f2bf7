"""Hold facts about adapters that their files do not contain, as the user states them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from streamer.errors import UsageError

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


def stated_options(identity: Mapping[str, Any]) -> list[str]:
    """List the command-line options that state again what an adapter's identity records as stated."""
    words = ["--base-is-residual"] if identity.get("base_is_residual") else []
    if layout := identity.get("lora_b_layout"):
        words += ["--lora-b-layout", layout]
    return words + [word for key in identity.get("ignored_keys", ()) for word in ("--ignore-key", key)]
