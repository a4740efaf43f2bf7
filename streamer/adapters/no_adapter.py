"""Provide an empty source of deltas for runs on a base alone."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from streamer.adapters.adapter import DeltaSource
from streamer.adapters.adapter_config import CONFIG_NAME, AdapterConfig
from streamer.storage.identities import AdapterIdentity


class NoAdapter(DeltaSource):
    """Source without deltas."""

    describes_model: ClassVar[bool] = False
    identity_bytes: ClassVar[int] = 0

    @classmethod
    def at(cls, base: Path) -> NoAdapter:
        """Make one for a base; messages name the base."""
        return cls(base, AdapterConfig({}, base / CONFIG_NAME), (), {})

    def identity(self) -> AdapterIdentity:
        """Return an identity without modules: nothing is changed."""
        return {"modules": 0}

    def trains(self, module: str) -> bool:
        """Return False: nothing was trained."""
        return False
