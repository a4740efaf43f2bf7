"""Tell how far a fit is, in multiplications, and heed requests to stop."""

from __future__ import annotations

from collections.abc import Callable

from streamer.evaluation.passes import Reading
from streamer.events import Event, Monitor
from streamer.streaming.model import ModelSize
from streamer.streaming.run_time import RunTimeTensor


class FitProgress:
    """Progress over all chunks of a fit.

    Parameters
    ----------
    size
        Of the model.
    """

    def __init__(self, monitor: Monitor, size: ModelSize) -> None:
        self._monitor, self._products = monitor, size.products
        self._pace = sum(size.products.values())
        self._done = self._total = self._items = self._of = 0

    def expect(self, costs: list[int]) -> None:
        """Take the costs of chunks that are to come."""
        self._total += sum(costs)
        self._of += len(costs)

    def reading(self, cost: int, times: int) -> Callable[[RunTimeTensor], None]:
        """Make the hook of a chunk that reads each parameter so many times."""

        def tell(name: str, done: int) -> None:
            self._emit(name, self._done + cost * done // (self._pace * times))

        return Reading(self._monitor, self._products, tell, times)

    def advance(self, cost: int) -> None:
        """Take a chunk as done."""
        self._done += cost
        self._items += 1

    def finish(self) -> None:
        """Say that all is done."""
        self._total, self._of = self._done, self._items
        self._emit("", self._done)

    def _emit(self, name: str, done: int) -> None:
        self._monitor.emit(
            Event(
                "fit", name, done, max(self._total, done + 1 if name else done), self._items, max(self._of, self._items)
            )
        )
