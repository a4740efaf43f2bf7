"""Save the states of a sweep between two layers, and go on from there after a kill."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from streamer.errors import InputError
from streamer.methods.files import SealedKind
from streamer.streaming.groups import Group
from streamer.streaming.spool import Spool
from streamer.streaming.values import Values

SECONDS = 60.0
"""Least time between two saves of states."""

STATES_FILE = SealedKind("streamer.states", "streamer.states/1", "states of a sweep", "start again")


Name = TypeVar("Name")
Value = TypeVar("Value")


@dataclass(frozen=True)
class OnDemand(Mapping[Name, Value]):
    """Values by name, each read or made when it is asked for."""

    names: Collection[Name]
    read: Callable[[Name], Value]

    def __getitem__(self, name: Name) -> Value:
        return self.read(name)

    def __iter__(self) -> Iterator[Name]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass
class States:
    """States of all groups between two layers, in a file from which a killed sweep resumes.

    Attributes
    ----------
    path
        The file.
    sweep
        Text that distinguishes the sweep from others.
    factors
        Returns what a fit has found so far, by name.
    restore
        Receives it again.
    resumed
        Receives the number of layers that an earlier run completed.
    """

    path: Path
    sweep: str
    factors: Callable[[], Mapping[str, Tensor]] = dict
    restore: Callable[[Mapping[str, Tensor]], None] = lambda factors: None
    resumed: Callable[[int], None] = lambda layers: None
    _saved: float = field(default_factory=time.monotonic)

    def save(
        self, values: Values, groups: Sequence[Group], layer: int, spool: Spool | None
    ) -> None:
        """Save the states with which groups enter a layer, if it is time to and they consist of tensors."""
        plain = all(group.is_plain for group in groups)
        if time.monotonic() - self._saved < SECONDS or not plain:
            return
        tree = {
            "sweep": self.sweep,
            "layer": layer,
            "applied": sorted(values.applied),
            "read": sorted(values.read),
            "whole": sorted(values.otherwise_used),
            "outs": [isinstance(group.out, Tensor) or len(group.out) for group in groups],
        }
        factors = self.factors()
        leaves: dict[str, tuple[Group, Tensor]] = {
            f"{number}.{i}": (group, leaf)
            for number, group in enumerate(groups)
            for i, leaf in enumerate(group.leaves)
            if leaf is not None
        }

        def read(name: str) -> Tensor:
            if name not in leaves:
                return factors[name]
            group, leaf = leaves[name]
            with group.at_hand(spool):
                return leaf.cpu().clone()

        STATES_FILE.save(self.path, tree, OnDemand([*factors, *leaves], read), overwrite=True)
        self._saved = time.monotonic()

    def load(self, values: Values, groups: Sequence[Group]) -> int:
        """Restore the states, and return the number of layers that all groups skip; 0 if there are none of this sweep."""
        try:
            tree, arrays = STATES_FILE.read(self.path)
        except (InputError, OSError):
            return 0
        if tree["sweep"] != self.sweep:
            return 0
        layer = int(tree["layer"])
        for number, (group, outs) in enumerate(zip(groups, tree["outs"], strict=True)):
            group.skips = layer
            if outs is True:
                group.out = arrays.pop(f"{number}.0")
            else:
                group.out = tuple(arrays.pop(f"{number}.{i}", None) for i in range(outs))
        values.applied.update(tree["applied"])
        values.read.update(tree["read"])
        values.otherwise_used.update(tree["whole"])
        self.restore(arrays)
        self.resumed(layer)
        return layer
