"""Progress on stderr."""

from __future__ import annotations

import sys
from typing import Any

from streamer.events import Event


class Progress:
    """Draws events on stderr: bars on a terminal only, warnings and notes always, nothing if quiet."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._stage = ""

    def __call__(self, event: Event) -> None:
        """Take an event."""
        if self._quiet:
            return
        if event.stage in ("warning", "note"):
            print(f"streamer: {event.stage}: {event.name}", file=sys.stderr)
            return
        if not sys.stderr.isatty():
            return
        from tqdm import tqdm

        if self._bar is None or event.stage != self._stage or event.total != self._bar.total:
            self.close()
            self._stage = event.stage
            self._bar = tqdm(total=event.total, initial=event.done, desc=event.stage, file=sys.stderr, leave=False, smoothing=0,
                             bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} left {remaining} {postfix}")  # fmt: skip
        self._bar.set_postfix_str(event.name, refresh=False)
        self._bar.update(event.done - self._bar.n)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
