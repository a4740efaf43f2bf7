"""Show progress on stderr: a bar on a terminal, a line now and then in a log, warnings and notes between them, and one line at the end."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from typing import Literal

from streamer.cli.layout import fit
from streamer.errors import printable
from streamer.events import Event
from streamer.units import format_duration

Mode = Literal["auto", "bar", "plain", "none"]

REDRAWN = 0.1
"""Seconds between two drawings of the bar at least; it is drawn at least once a second, so that its times run on."""

LOGGED = 30.0
"""Seconds between two lines of plain progress; a job shorter than this prints none."""

NARROW, WIDE = 60, 110
"""Columns below which the line is a count, a bar and a time alone, and from which there is room for all."""

SHORTEST, WIDEST = 8, 24
"""Columns of the bar itself: where there are fewer it is left out."""

ADAPTER = 20
"""Columns of an adapter's name."""

UNITS = {"detect": "matrices", "write": "tensors", "verify": "files", "recompute": "matrices", "evaluate": "passes",
         "fit": "passes"}  # fmt: skip
"""What a stage's `Event.items` are."""


def say(text: str) -> None:
    """Print a line on stderr, for people: on a terminal it is wrapped between words."""
    line = printable(text)
    write_line(fit(line, _columns()) if _is_terminal() else line)


def write_line(line: str) -> None:
    """Write a line as it stands to stderr, if anyone can read it: a log that is full or a reader that has gone does not end a job."""
    _write(f"{line}\n")


def _write(text: str) -> None:
    if sys.stderr is None or sys.stderr.closed:
        return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        # What could not be written stays in Python's buffer, and another try at the end of the process would change its exit code.
        with contextlib.suppress(OSError, ValueError):
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, sys.stderr.fileno())
            os.close(silent)


class Progress:
    """Writer of events to stderr, for people.

    Parameters
    ----------
    mode
        ``bar``, ``plain``, ``none``; ``auto`` is a bar on a terminal, else plain.
    quiet
        1: no progress, notes and last line; 2: no warnings either.
    command
        The command's name, for the last line.
    logged
        Seconds between two lines of plain progress.
    """

    def __init__(self, mode: Mode = "auto", quiet: int = 0, command: str = "", logged: float = LOGGED) -> None:
        if mode == "auto":
            mode = "bar" if _is_terminal() and os.environ.get("TERM") != "dumb" else "plain"
        self._mode = "none" if quiet else mode
        self._quiet, self._command = quiet, command
        self._every = logged if self._mode == "plain" else 1.0
        self._began = time.monotonic()
        self._event: Event | None = None
        self._stage_began = self._event_at = self._drawn_at = self._began
        self._first = Event("probe", "")
        """The stage's first event: an interrupted run begins in the middle."""
        self._drawn = False
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._ticker: threading.Thread | None = None

    def __call__(self, event: Event) -> None:
        """Take an event."""
        with self._lock:
            if event.stage in ("warning", "note"):
                if self._quiet < (2 if event.stage == "warning" else 1):
                    self.tell(f"streamer: {event.stage}: {event.name}")
                return
            if self._mode == "none" or self._closed.is_set():
                return
            now = time.monotonic()
            last = self._event
            if last is None or (event.stage, event.total) != (last.stage, last.total) or event.done < last.done:
                self._stage_began, self._first = now, event
            self._event, self._event_at = event, now
            if event.total and event.done >= event.total:
                self._erase()
                self._event = None
                return
            if self._mode == "bar" and (now - self._drawn_at >= REDRAWN or not self._drawn):
                self._draw(event, now)
            if self._ticker is None:  # a matrix may take minutes, and no event comes then
                self._ticker = threading.Thread(target=self._tick, daemon=True, name="progress")
                self._ticker.start()

    def tell(self, text: str) -> None:
        """Print a line that is no event, on a clean line."""
        with self._lock:
            self._erase()
            say(text)

    def close(self) -> None:
        """Remove the bar, for good: what is printed from now on stands on a clean line."""
        self._closed.set()
        with self._lock:
            self._erase()
            self._event = None
        if self._ticker is not None and self._ticker is not threading.current_thread():
            self._ticker.join()
            self._ticker = None

    def finish(self, summary: str) -> None:
        """Print the last line: what the command did, and how long it took."""
        if not self._quiet:
            what = f"{summary}, in" if summary else "done in"
            say(f"streamer: {self._command}: {what} {format_duration(time.monotonic() - self._began)}")

    def _tick(self) -> None:
        while not self._closed.wait(self._every):
            with self._lock:
                if self._event is None or self._closed.is_set():
                    continue
                if self._mode == "plain":
                    say(f"streamer: {self._plain(self._event, time.monotonic())}")
                else:
                    self._draw(self._event, time.monotonic())

    def _draw(self, event: Event, now: float) -> None:
        _write(f"\r\x1b[K{self._bar(event, now, _columns() - 1)}")
        self._drawn, self._drawn_at = True, now

    def _erase(self) -> None:
        if self._drawn:
            _write("\r\x1b[K")
            self._drawn = False

    def _left(self, event: Event, now: float) -> float | None:
        """Estimate the seconds to the stage's end, at the pace of what was done; None where nothing was, or it goes slower than that."""
        if event.done <= self._first.done or self._event_at <= self._stage_began:
            return None
        pace = (self._event_at - self._stage_began) / (event.done - self._first.done)
        left = pace * (event.total - event.done) - (now - self._event_at)
        return left if left > 0 else None

    def _bar(self, event: Event, now: float, columns: int) -> str:
        """Make the line on a terminal: without room the matrix's name goes first, then rate and share, the bar last."""
        left = self._left(event, now)
        count = f" {event.items:>{len(str(event.of))}}/{event.of}" if event.of else ""
        times = clock(now - self._stage_began) if left is None else f"{clock(left)} left"
        if not event.total:
            line = f"{event.stage}{count} {times}"
        else:
            share = event.done / event.total
            shown = f"{100 * share:4.0f}%" if columns >= NARROW else ""
            rate = f"{self._rate(event)}, " if columns >= NARROW and self._rate(event) else ""
            room = columns - len(f"{event.stage}{count}{shown} || {rate}{times}")
            width = WIDEST if columns > WIDE else min(WIDEST, room if columns < NARROW else max(SHORTEST, room // 4))
            bar = f"|{_filled(share, width)}| " if room >= SHORTEST else ""
            line = f"{event.stage}{count}{shown} {bar}{rate}{times}"
        rest = columns - len(line) - 2
        if rest >= len(event.adapter[:ADAPTER]) + SHORTEST and (not event.total or columns >= NARROW):
            line += f"  {_name(event, rest)}"
        return printable(line)[:columns].rstrip()

    def _rate(self, event: Event) -> str:
        """Measure matrices or megabytes a second, from the stage's beginning to its last event."""
        first, seconds = self._first, self._event_at - self._stage_began
        if seconds < 1:
            return ""
        if event.stage in ("write", "verify"):
            return f"{(event.done - first.done) / seconds / 1e6:.0f} MB/s"
        pace = (event.items - first.items) / seconds
        return f"{pace:.1f}/s" if pace >= 1 else f"{60 * pace:.0f}/min"

    def _plain(self, event: Event, now: float) -> str:
        """Make the line in a log."""
        left = self._left(event, now)
        count = f"{event.items} of {event.of} {UNITS.get(event.stage, '')}".rstrip() if event.of else event.name
        if event.total:
            count += f", {100 * event.done / event.total:.0f}%"
        if event.adapter:
            count += f", {event.adapter}"
        stage = "" if event.stage == self._command else f"{event.stage} "
        rest = "" if left is None else f", {clock(left)} left"
        return f"{self._command}: after {clock(now - self._began)}, {stage}{count}{rest}"


def _is_terminal() -> bool:
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


def _columns() -> int:
    """Count the columns of the terminal that stderr is; 80 where it is none."""
    try:
        return max(8, os.get_terminal_size(sys.stderr.fileno()).columns or 80)
    except (OSError, ValueError, AttributeError):
        return 80


def _filled(share: float, width: int) -> str:
    full = int(share * width)
    block = "█" if "utf" in (getattr(sys.stderr, "encoding", None) or "").lower() else "#"
    return block * full + " " * (width - full)


def _name(event: Event, columns: int) -> str:
    """Shorten the adapter's name and the matrix's to as many columns: of this its end stays."""
    start = f"{event.adapter[:ADAPTER]}: " if event.adapter else ""
    name, room = event.name.removesuffix(".weight"), columns - len(start)
    return start + (name if len(name) <= room else "…" + name[len(name) - room + 1 :].lstrip("."))


def clock(seconds: float) -> str:
    """Format seconds as ``m:ss`` or ``h:mm:ss``."""
    s = round(seconds)
    return f"{s // 3600}:{s // 60 % 60:02}:{s % 60:02}" if s >= 3600 else f"{s // 60}:{s % 60:02}"
