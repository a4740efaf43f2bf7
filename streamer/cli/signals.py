"""Treat SIGINT and SIGTERM as requests to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from streamer.events import Monitor


@contextlib.contextmanager
def stop_on_signals(monitor: Monitor, tell: Callable[[str], None], close: Callable[[], None]) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into an announced stop at the next safe point, and the second into an immediate exit.

    A thread waits for the signals: Python runs handlers only in the main thread, which may be inside LAPACK for a minute.

    Parameters
    ----------
    tell
        Prints a line on stderr.
    close
        Removes the bar.
    """
    watched = {signal.SIGINT, signal.SIGTERM}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)

    def watch() -> None:
        first = signal.sigwait(watched)
        monitor.request_stop(first)
        tell(f"streamer: signal {int(first)}: stopping at the next safe point; once more to stop at once")
        second = signal.sigwait(watched)
        closing = threading.Thread(target=close, daemon=True, name="streamer close")
        closing.start()
        closing.join(0.5)  # an unresponsive terminal must not keep the process alive
        os._exit(128 + second)

    threading.Thread(target=watch, daemon=True, name="streamer signals").start()
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
