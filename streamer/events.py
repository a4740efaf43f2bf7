"""Report what a run does while it works, and take requests to stop."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from streamer.errors import Interrupted, StreamerWarning, one_line
from streamer.units import plural


@dataclass(frozen=True)
class Event:
    """One step of progress.

    Attributes
    ----------
    stage
        ``probe`` measures this machine, in steps; ``detect`` counts in units of cost (see `detection.cost.cost`), ``write`` and
        ``verify`` in bytes, ``download`` in bytes (from the hub in files), ``recompute`` in matrices, ``evaluate`` in multiplications for
        a token, ``fit`` and ``map`` in multiplications;
        ``warning`` and ``note`` do not count.
    name
        The matrix or file that the run has just begun, or the text of a warning or note.
    done, total
        Units done before it, and in all.
    items, of
        Matrices (``detect``, ``recompute``), tensors and other files (``write``), files (``download``, ``verify``), or passes
        (``evaluate``, ``fit``, ``map``), done before it, and in all; 0 of 0 where they are not counted.
    adapter
        The name of its adapter where there are several, else empty.
    """

    stage: Literal[
        "download", "probe", "detect", "write", "verify", "recompute", "evaluate", "fit", "map", "warning", "note"
    ]
    name: str
    done: int = 0
    total: int = 0
    items: int = 0
    of: int = 0
    adapter: str = ""


OnEvent = Callable[[Event], None]

OutputState = Literal["written", "resumed", "present"]
"""What a run did about an output: wrote it, finished what an interrupted run had begun, or found it there."""


def warn(event: Event) -> None:
    """Issue warnings through the `warnings` module, in the name of the line that called the library; pass over other events."""
    if event.stage == "warning":
        level, frame = 1, sys._getframe()
        while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "streamer":
            level, frame = level + 1, frame.f_back
        warnings.warn(one_line(event.name), StreamerWarning, stacklevel=level)


class Monitor:
    """Carries events out and a request to stop in. Signal handlers call `request_stop`; the run polls `checkpoint`.

    Attributes
    ----------
    outputs
        What the run did about each finished output, by its path.
    """

    def __init__(self, on_event: OnEvent | None = None) -> None:
        self._on_event = on_event
        self._signum: int | None = None
        self.outputs: dict[Path, OutputState] = {}

    def emit(self, event: Event) -> None:
        """Hand an event to the caller."""
        if self._on_event is not None:
            self._on_event(event)

    def warn(self, warnings: Iterable[str]) -> None:
        """Hand warnings to the caller, each once."""
        for warning in dict.fromkeys(warnings):
            self.emit(Event("warning", warning))

    def resuming(self, done: int, of: int, noun: str) -> None:
        """Tell the caller how much of an interrupted run this one takes up.

        Parameters
        ----------
        done, of
            Items that are done, and items in all.
        noun
            One of them.
        """
        self.emit(Event("note", f"resuming: {done} of {of} {plural(noun)} are done"))

    def told(self, output: Path, state: OutputState) -> None:
        """Note what the run did about an output that is finished.

        Parameters
        ----------
        output
            Where it stands.
        state
            What was done about it.
        """
        self.outputs[output] = state

    def request_stop(self, signum: int) -> None:
        """Ask for a stop at the next safe point."""
        self._signum = signum

    def checkpoint(self) -> None:
        """Raise `Interrupted` if a stop was asked for; called at safe points."""
        if self._signum is not None:
            raise Interrupted(self._signum)
