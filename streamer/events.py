"""Report a run's progress, and accept requests to stop it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from streamer.errors import Interrupted, StreamerWarning, one_line
from streamer.units import plural

Stage = Literal[
    "download",
    "probe",
    "detect",
    "write",
    "verify",
    "recompute",
    "generate",
    "evaluate",
    "fit",
    "map",
    "warning",
    "note",
]


@dataclass(frozen=True)
class Event:
    """One step of progress.

    Attributes
    ----------
    stage
        ``probe`` measures this machine; ``detect`` counts units of cost (see `detection.solvers.cost`), ``write`` and ``verify``
        bytes, ``download`` bytes (files, from the hub), ``recompute`` matrices, ``evaluate`` multiplications for a token, ``generate``,
        ``fit`` and ``map`` multiplications; ``warning`` and ``note`` count nothing.
    name
        The matrix or file that the run has just begun, or the text of a warning or note.
    done, total
        Units done before this step, and in total.
    items, of
        Items done before this step, and in total: matrices (``detect``, ``recompute``), tensors and other files (``write``), files
        (``download``, ``verify``), tokens of each sequence (``generate``), or layers (``evaluate``, ``fit``, ``map``); 0 of 0 if they are
        not counted.
    adapter
        Name of the adapter if there are several, else empty.
    """

    stage: Stage
    name: str
    done: int = 0
    total: int = 0
    items: int = 0
    of: int = 0
    adapter: str = ""


OnEvent = Callable[[Event], None]

OutputState = Literal["written", "resumed", "present"]
"""What a run did with an output: wrote it, finished an interrupted run, or found it complete."""


def warn(event: Event) -> None:
    """Issue warnings through the `warnings` module, attributed to the line that called the library; ignore other events."""
    if event.stage == "warning":
        level = 1
        frame = sys._getframe()
        while (
            frame.f_back is not None
            and frame.f_globals.get("__name__", "").partition(".")[0] == "streamer"
        ):
            level += 1
            frame = frame.f_back
        warnings.warn(one_line(event.name), StreamerWarning, stacklevel=level)


class Monitor:
    """Pass events to the caller, and requests to stop to the run. Signal handlers call `request_stop`; the run polls `checkpoint`.

    Attributes
    ----------
    outputs
        What the run did with each finished output, by path.
    """

    def __init__(self, on_event: OnEvent | None = None) -> None:
        self._on_event = on_event
        self._signum: int | None = None
        self._warned: set[str] = set()
        self.outputs: dict[Path, OutputState] = {}

    def emit(self, event: Event) -> None:
        """Pass an event to the caller."""
        if self._on_event is not None:
            self._on_event(event)

    def note(self, text: str) -> None:
        """Pass a note to the caller."""
        self.emit(Event("note", text))

    def warn(self, warnings: Iterable[str]) -> None:
        """Pass warnings to the caller, each once in a run: plans of the same inputs repeat theirs."""
        for warning in warnings:
            if warning not in self._warned:
                self._warned.add(warning)
                self.emit(Event("warning", warning))

    def resuming(self, done: int, of: int, noun: str) -> None:
        """Tell the caller how much an interrupted run had finished.

        Parameters
        ----------
        done, of
            Number of finished items, and of all items.
        noun
            Word for one item.
        """
        self.note(f"resuming: {done} of {of} {plural(noun)} are done")

    def request_stop(self, signum: int) -> None:
        """Ask the run to stop at its next safe point."""
        self._signum = signum

    def checkpoint(self) -> None:
        """Raise `Interrupted` if a stop was requested; runs call this at safe points."""
        if self._signum is not None:
            raise Interrupted(self._signum)


class Progress:
    """Units and items that a stage of a run has done, reported at each step.

    Attributes
    ----------
    total, of
        Units and items in total.
    done, items
        Units and items done.
    """

    def __init__(self, monitor: Monitor, stage: Stage, total: int = 0, of: int = 0) -> None:
        self.total = total
        self.of = of
        self.done = 0
        self.items = 0
        self.monitor = monitor
        self._stage = stage

    def begin(self, name: str, adapter: str = "") -> None:
        """Report that a step begins, unless a stop was requested."""
        self.monitor.checkpoint()
        self._report(name, adapter)

    def add(self, units: int, items: int = 1) -> None:
        """Count what a step has done."""
        self.done += units
        self.items += items

    def end(self) -> None:
        """Report the end of the stage."""
        self.done = self.total
        self.items = self.of
        self._report("")

    def _report(self, name: str, adapter: str = "") -> None:
        self.monitor.emit(
            Event(self._stage, name, self.done, self.total, self.items, self.of, adapter)
        )
