"""Find the inputs of a command, which may be names on the hub or addresses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from streamer.adapters.one_or_several import One, Several, one_or_several
from streamer.api.options import Adapters
from streamer.remote.inputs import Remote


@dataclass(frozen=True)
class Inputs:
    """Base, and one adapter or several, as given."""

    base: str | Path
    adapter: Adapters

    def located(self, remote: Remote) -> tuple[str | Path, One | Several]:
        """Find base and adapters, and determine whether one adapter or several are given."""
        base = remote.path(self.base)
        if isinstance(self.adapter, str | Path):
            return base, one_or_several(remote.path(self.adapter))
        return base, one_or_several(remote.paths(*self.adapter))
