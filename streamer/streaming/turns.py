"""Run functions in turns."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence


class Turns:
    """Functions that run in turns, one at a time, each until it pauses; each has a thread, which keeps its position.

    A round is over when each function has paused once more or ended.
    """

    def __init__(self, runs: Sequence[Callable[[], None]]) -> None:
        self._runs = runs
        self._go = [threading.Semaphore(0) for _ in runs]
        self._back = threading.Semaphore(0)
        self._running, self._stopped = 0, False
        self._error: BaseException | None = None
        self._ended: set[int] = set()

    def run(self, begin: Callable[[int], None], between: Callable[[], None]) -> None:
        """Run all functions to their ends.

        Parameters
        ----------
        begin
            Called with a run's number before each of its turns.
        between
            Called after each round.
        """
        threads = [
            threading.Thread(target=self._thread, args=(i,), name=f"streamer group {i}", daemon=True)
            for i in range(len(self._runs))
        ]
        try:
            for thread in threads:
                thread.start()
            while len(self._ended) < len(threads):
                for number in range(len(threads)):
                    if number not in self._ended:
                        begin(number)
                        self._running = number
                        self._go[number].release()
                        self._back.acquire()
                        if self._error is not None:
                            raise self._error
                between()
        finally:
            self._stopped = True
            for semaphore in self._go:
                semaphore.release()
            for thread in threads:
                if thread.ident is not None:  # the thread was started
                    thread.join()

    def pause(self) -> None:
        """End the turn of the calling function."""
        number = self._running
        self._back.release()
        self._go[number].acquire()
        if self._stopped:
            raise _Stopped

    def _thread(self, number: int) -> None:
        self._go[number].acquire()
        try:
            if not self._stopped:
                self._runs[number]()
        except _Stopped:
            return
        except BaseException as e:  # the main thread raises it
            self._error = e
        finally:
            self._ended.add(number)
            self._back.release()


class _Stopped(BaseException):
    """Ends a function whose turns are over because another failed."""
