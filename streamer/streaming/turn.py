"""What a model does at the moment: the only state of it that changes while groups run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from streamer.streaming.groups import Group
from streamer.streaming.sites import Site, Watch

Stop = Callable[[], None]
"""Function that is called before each parameter is read; it may raise to stop."""


def nothing(*_: object) -> None:
    """Do nothing."""


@dataclass
class Turn:
    """The group that runs, and what happens while it does.

    Attributes
    ----------
    group
        The group.
    rows
        Range of the vocabulary whose logits the head computes; None for all.
    watch
        Says which matrices make sites.
    stop
        See `Stop`.
    pause
        Pauses the group: at a layer, or, given a site, until its matrices are fitted.
    leave
        Called after each layer.
    """

    group: Group = field(default_factory=lambda: Group(torch.empty(0, 0), 0))
    rows: tuple[int, int] | None = None
    watch: Watch | None = None
    stop: Stop = nothing
    pause: Callable[[Site | None], None] = nothing
    leave: Callable[[], None] = nothing

    @property
    def fitted(self) -> Watch | None:
        """Return what makes sites for the group; None for a rider, and in layers that it skips."""
        return None if self.group.stream is None or self.group.skips else self.watch

    def end(self) -> None:
        """Forget what concerns the last run alone."""
        self.rows = self.watch = None
        self.stop = self.pause = self.leave = nothing
