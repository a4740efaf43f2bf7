"""Report a run's progress over texts, in multiplications, and act on requests to stop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from streamer.events import Event, Monitor
from streamer.measuring.sequences import TextSequences
from streamer.streaming.model import ModelSize
from streamer.streaming.run_time import RunTimeTensor

READING = 64
"""Number of rows whose products with a weight take as long as reading the weight."""

CALL = 5_000_000
"""Multiplications that take as long as the fixed cost of a module's call, about half a millisecond."""


def pass_cost(size: ModelSize, text: TextSequences, times: int, readings: int = 1) -> int:
    """Count the multiplications of running sequences, padded to the longest, `times` times, for example under that many variants.

    Parameters
    ----------
    readings
        Number of times that each weight is read; a reading counts as the multiplications that take equally long.
    """
    rows = times * len(text.ids) * text.longest
    return sum(size.products.values()) * (rows + readings * READING) + readings * CALL * len(size.products)


class RunProgress:
    """Progress over all passes of a run.

    Parameters
    ----------
    size
        Size of the model.
    stage
        Stage of the events: ``evaluate``, ``fit`` or ``map``.
    """

    def __init__(self, monitor: Monitor, size: ModelSize, stage: Literal["evaluate", "fit", "map"]) -> None:
        self._monitor, self.size, self._stage = monitor, size, stage
        self._done = self._total = self._items = self._of = self._resumed = 0

    def expect(self, costs: list[int]) -> None:
        """Set the costs of all passes still to come."""
        self._total = self._done + sum(costs)
        self._of = self._items + len(costs)

    def resume(self, passes: int) -> None:
        """Set the number of passes that an interrupted run recorded; a note reports it before the first event, when the total is known."""
        self._resumed = passes

    def reading(self, cost: int, times: int) -> Callable[[RunTimeTensor], None]:
        """Make the hook of a pass that reads each parameter `times` times; before each reading it reports the multiplications done.

        The hook also acts on requests to stop.
        """
        return self.readings([cost], [times])[0]

    def readings(self, costs: Sequence[int], times: Sequence[int]) -> list[Callable[[RunTimeTensor], None]]:
        """Make the hooks of passes that run in turns; each hook reports the progress of all of them."""
        products, parts = self.size.products, [0] * len(costs)
        whole = sum(products.values())

        def hook(number: int) -> Callable[[RunTimeTensor], None]:
            begun, done = Counter[str](), 0

            def on_read(tensor: RunTimeTensor) -> None:
                nonlocal done
                self._monitor.checkpoint()
                name = tensor.name
                if name in products and begun[name] < times[number]:
                    self._emit(name, self._done + sum(parts))
                    begun[name] += 1
                    done += products[name]
                    parts[number] = costs[number] * done // (whole * times[number])

            return on_read

        return [hook(number) for number in range(len(costs))]

    def begin(self, name: str) -> None:
        """Report which pass is running, for passes that run on workers."""
        self._emit(name, self._done)

    def advance(self, cost: int) -> None:
        """Count a pass as done."""
        self._done += cost
        self._items += 1

    def finish(self) -> None:
        """Report that everything is done."""
        self._total, self._of = self._done, self._items
        self._emit("", self._done)

    def _emit(self, name: str, done: int) -> None:
        total, of = max(self._total, done + 1 if name else done), max(self._of, self._items)
        if self._resumed:
            self._monitor.resuming(self._resumed, max(of, self._resumed), "pass")
            self._resumed = 0
        self._monitor.emit(Event(self._stage, name, done, total, self._items, of))
