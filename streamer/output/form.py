"""Describe the form of outputs: what their files look like, whatever the mitigation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from streamer.methods.files import InputMap
from streamer.output.record import MergedDtype


@dataclass(frozen=True)
class Form:
    """Form of an output.

    Attributes
    ----------
    dequantize, dtype, shard_bytes, requantize
        Of a merged model; see `plan_merged`.
    to_lora
        Rank of a LoRA adapter made from deltas of any kind, or the share of their energy that it keeps; None for the adapter's own kind.
    for_server
        Whether an adapter gets one rank and scale 1 for all modules.
    card
        Whether the output's ``README.md`` describes how it was made.
    measured
        What a repair adds to the record: ``measured`` and ``repair``.
    """

    dequantize: bool = False
    dtype: MergedDtype | None = None
    shard_bytes: int | None = None
    requantize: InputMap | None = None
    to_lora: int | float | None = None
    for_server: bool = False
    card: bool = True
    measured: Mapping[str, Any] = field(default_factory=dict)

    def changes(self) -> dict[str, Any]:
        """Return the options that give the output another form than its input's, as in the record."""
        options = {
            "dtype": self.dtype,
            "shard_bytes": self.shard_bytes,
            "for_server": self.for_server,
            "requantize": None if self.requantize is None else self.requantize.record(),
        }
        return {key: value for key, value in options.items() if value}

    def decisions(self) -> dict[str, Any]:
        """Return everything about the form that determines the output's bytes."""
        converted = {} if self.to_lora is None else {"to_lora": self.to_lora}
        return {
            "dequantize": self.dequantize,
            "card": self.card,
            **self.measured,
            **self.changes(),
            **converted,
        }
