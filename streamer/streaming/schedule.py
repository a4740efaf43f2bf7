"""Take turns: groups run the model in step, and stop together at each layer and at each site."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from typing import Any

from streamer.packages import require_package
from streamer.storage.files import give_freed_memory_back
from streamer.streaming.groups import Group
from streamer.streaming.sites import Site, Solve
from streamer.streaming.spool import Spool
from streamer.streaming.turn import Turn, nothing


class Schedule:
    """Passes of groups through a model, each in a greenlet that pauses where the turn's `pause` is called.

    Parameters
    ----------
    turn
        What the model does now.
    groups
        Groups of a fit, which have a stream, and riders.
    spool
        Where groups' states lie while others run; None keeps them in memory.
    forward
        Runs the group whose turn it is through the model.
    """

    def __init__(
        self, turn: Turn, groups: Sequence[Group], spool: Spool | None, forward: Callable[[], None]
    ) -> None:
        greenlet = require_package(
            "greenlet", (3,), "evaluate, repair and map need greenlet", "evaluate"
        )
        self.turn = turn
        self.spool = spool
        self.fitted = [group for group in groups if group.stream is not None]
        self.riders = [group for group in groups if group.stream is None]
        self._passes: dict[Group, Any] = {}
        self._sites: dict[Group, Site | None] = {}
        main = greenlet.getcurrent()
        for group in groups:
            self._passes[group] = greenlet.greenlet(forward, main)
            self._passes[group].gr_context = contextvars.copy_context()
        turn.pause = main.switch

    def _alive(self, groups: Sequence[Group]) -> list[Group]:
        """List the groups that have not ended."""
        return [group for group in groups if not self._passes[group].dead]

    @property
    def ended(self) -> bool:
        """Test whether all groups have run through the model."""
        return not self._alive([*self.fitted, *self.riders])

    def fit(self, solve: Solve) -> None:
        """Run the groups of a fit to the next layer; `solve` receives the inputs of each site on the way, the first site first."""
        moving = self._alive(self.fitted)
        while moving:
            for group in moving:
                self._advance(group)
            give_freed_memory_back()
            sites = {group: site for group in self.fitted if (site := self._sites[group])}
            if not sites:
                return
            first = min(sites.values(), key=lambda site: site.order)
            inputs = {group: site.x for group, site in sites.items() if site.order == first.order}
            solve(first, inputs)
            moving = list(inputs)

    def ride(self) -> None:
        """Run the riders to the next layer."""
        for group in self._alive(self.riders):
            self._advance(group)

    def _advance(self, group: Group) -> None:
        """Run a group until it pauses or ends."""
        self.turn.group = group
        self.turn.rows = 0, 1
        if self.spool is not None:
            group.bring_back(self.spool)
        site = self._passes[group].switch()
        self._sites[group] = site
        if self.spool is not None and site is None:
            group.put_away(self.spool)

    def close(self) -> None:
        """Unwind groups that were stopped on the way."""
        self.turn.pause = nothing
        self.turn.watch = None
        for run in self._passes.values():
            if run and not run.dead:
                run.throw()
