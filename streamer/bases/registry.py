"""Which logical weights a base has, and how each is encoded: one entry an encoding."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from streamer.bases.plain import Plain
from streamer.bases.weight import Part, Weight
from streamer.storage.checkpoint import Checkpoint


class Weights(Mapping[str, Weight]):
    """The logical weights of a base by name, in its file order.

    Parameters
    ----------
    checkpoint
        The files.
    config
        The model's ``config.json``, or {}.

    Looking one up raises `UnsupportedError` if it is encoded in a way that has no entry.
    """

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        self.checkpoint = checkpoint
        self._parts = {t.name: Part(f, t) for f in checkpoint.files.values() for t in f.header.tensors}
        self._instead: dict[str, Part] = {}

    def replaced(self, sources: Mapping[str, Part]) -> Weights:
        """The same with other tensors in the place of some, or beside them; they are written as those that they replace."""
        out = copy.copy(self)
        out._instead = {**self._instead, **sources}
        return out

    def __getitem__(self, name: str) -> Weight:
        if name not in self._instead:
            return Plain.of(self._parts[name])
        weight = Plain.of(self._instead[name])
        written = Plain.of(self._parts[name]).encoding if name in self._parts else weight.encoding
        return replace(weight, name=name, encoding=written)

    def __contains__(self, name: object) -> bool:
        return name in self._parts or name in self._instead

    def __iter__(self) -> Iterator[str]:
        return iter({**self._parts, **self._instead})

    def __len__(self) -> int:
        return len({**self._parts, **self._instead})
