"""Which logical weights a base has, and how each is encoded: one entry an encoding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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

    def __getitem__(self, name: str) -> Weight:
        return Plain.of(self._parts[name])

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
