"""Monitors that ask a run to stop."""

import signal
from collections.abc import Sequence

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


def check_resuming(events: Sequence[Event], stage: str, items: str) -> None:
    """Check that a resumed run says how much it takes up, which is where its progress begins."""
    first = next(e for e in events if e.stage == stage)
    said = [e.name for e in events if e.stage == "note" and e.name.startswith("resuming")]
    assert said == ([f"resuming: {first.items} of {first.of} {items} are done"] if first.items else [])
