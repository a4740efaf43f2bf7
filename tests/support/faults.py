"""System calls that go wrong."""

import os
import signal
from collections.abc import Callable

from streamer.events import Event, Monitor


def failing(number: int) -> Callable[..., int]:
    """A system call that fails with this errno, each time."""

    def call(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    return call


def stopping_at(number: int, stage: str = "") -> Monitor:
    """Asks for a stop at the n-th event, or at the n-th of a stage."""
    seen: list[Event] = []

    def on_event(event: Event) -> None:
        if stage in ("", event.stage):
            seen.append(event)
        if len(seen) == number:
            monitor.request_stop(signal.SIGINT)

    monitor = Monitor(on_event)
    return monitor
