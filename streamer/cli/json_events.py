"""Write progress, warnings and errors to stderr as JSON, one object on each line, for programs that watch a run."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from streamer.cli.progress import write_line
from streamer.events import Event

if TYPE_CHECKING:
    from streamer.api.event_records import ErrorEntry

SCHEMA = "streamer.event/1"


class JsonEvents:
    """Writes events, and Python's warnings, as complete lines of JSON."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._show = warnings.showwarning
        warnings.showwarning = lambda message, *_args, **_more: self.say("warning", message=str(message))

    def __call__(self, event: Event) -> None:
        """Write an event."""
        if event.stage in ("warning", "note"):
            self.say(event.stage, message=event.name)
        else:
            self.say("progress", **asdict(event))

    def tell(self, text: str) -> None:
        """Write a message that is not an event of the library."""
        self.say("note", message=text.removeprefix("streamer: "))

    def error(self, error: ErrorEntry) -> None:
        """Write the error that ended the run, as described by `cli.errors_json.error_entry`."""
        self.say("error", **error)

    def finish(self, summary: str) -> None:
        """Write that the command has finished."""
        self.say("done", message=summary)

    def close(self) -> None:
        """Restore Python's own display of warnings."""
        warnings.showwarning = self._show

    def say(self, event: str, **more: Any) -> None:
        """Write one line."""
        seconds = round(time.monotonic() - self._began, 3)
        write_line(json.dumps({"schema": SCHEMA, "event": event, "seconds": seconds, **more}))
