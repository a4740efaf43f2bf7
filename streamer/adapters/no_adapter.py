"""Stand in for an adapter where there is a base alone."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from streamer.adapters.adapter import DeltaSource
from streamer.adapters.adapter_config import CONFIG_NAME, AdapterConfig
from streamer.storage.identities import AdapterIdentity


class NoAdapter(DeltaSource):
    """A source of no deltas."""

    describes_model: ClassVar[bool] = False
    identity_bytes: ClassVar[int] = 0

    @classmethod
    def at(cls, base: Path) -> NoAdapter:
        """Make one for a base, which messages name."""
        return cls(base, AdapterConfig({}, base / CONFIG_NAME), (), {})

    def identity(self) -> AdapterIdentity:
        """Say that it changes nothing."""
        return {"modules": 0}

    def trains(self, module: str) -> bool:
        """Return False: there is nothing that it could train."""
        return False
