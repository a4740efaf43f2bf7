"""Progress, warnings and errors as JSON on stderr, one object a line, for programs that watch a run."""

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
    """Write events as lines of JSON, each complete when it is written; what Python warns of as well."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._show = warnings.showwarning
        warnings.showwarning = lambda message, *_args, **_more: self.say("warning", message=str(message))

    def __call__(self, event: Event) -> None:
        """Take an event."""
        if event.stage in ("warning", "note"):
            self.say(event.stage, message=event.name)
        else:
            self.say("progress", **asdict(event))

    def tell(self, text: str) -> None:
        """Take a line for stderr that is no event of the library."""
        self.say("note", message=text.removeprefix("streamer: "))

    def error(self, error: ErrorEntry) -> None:
        """Take what `cli.errors_json.error_entry` says of the error that ended the run."""
        self.say("error", **error)

    def finish(self, summary: str) -> None:
        """Say that the command has done what it was asked for."""
        self.say("done", message=summary)

    def close(self) -> None:
        """Leave Python's warnings as they were."""
        warnings.showwarning = self._show

    def say(self, event: str, **more: Any) -> None:
        """Write one line."""
        seconds = round(time.monotonic() - self._began, 3)
        write_line(json.dumps({"schema": SCHEMA, "event": event, "seconds": seconds, **more}))
