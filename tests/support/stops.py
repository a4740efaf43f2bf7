"""Monitors that ask a run to stop."""

from __future__ import annotations

import signal

from streamer.events import Event, Monitor


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
