"""Write to people's terminals and logs: progress, warnings and notes on stderr, a last line with the time, the result of a verification.

Progress is a bar on a terminal, and periodic lines in a log. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TextIO

from streamer.api.calls import Bars, bar_layout, columns, counts
from streamer.errors import printable
from streamer.events import Event
from streamer.tables import Screen, fit
from streamer.units import counted, format_duration, format_size

if TYPE_CHECKING:
    from streamer.api.records import ErrorEntry

Result = tuple[Mapping[str, Any], str]
"""JSON object for `--json`, and text for people."""


def screen(every: bool = False, legend: bool = True) -> Screen:
    """Describe stdout: width from `COLUMNS` or the terminal, unlimited for a pipe or file."""
    width = shutil.get_terminal_size((0, 0)).columns
    return Screen(max(20, width) if width else None, every, legend)


Mode = Literal["auto", "bar", "plain", "none"]

ERASE = "\x1b[K"
"""Erases the rest of a line: tqdm overwrites its own bar, but not the ^C that a terminal echoes after it."""

REDRAWN = 1.0
"""Seconds between two redraws of a bar."""

LOGGED = 30.0
"""Seconds between lines of plain progress; a shorter job prints none."""


def say(text: str) -> None:
    """Print a line on stderr for people, wrapped between words on a terminal."""
    write_line(_fitted(text))


def write_line(line: str) -> None:
    """Write an unchanged line to stderr; a full log or a reader that is gone must not end a job."""
    STDERR.write(f"{line}\n")


def silence(stream: TextIO) -> None:
    """Let a stream's remaining buffer go nowhere when the process ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class _Stderr:
    """Wrapper of stderr that ignores write errors."""

    def write(self, text: str) -> None:
        if sys.stderr is None or sys.stderr.closed:
            return
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:
            # Unwritten text stays in Python's buffer; writing it again at exit would change the exit code.
            with contextlib.suppress(OSError, ValueError):
                silence(sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


STDERR = _Stderr()


class ProgressLines:
    """Writer of events to stderr, for people.

    Parameters
    ----------
    mode
        ``bar``, ``plain``, ``none``; ``auto`` is a bar on a terminal, else plain.
    quiet
        1: no progress, notes or last line; 2: no warnings either.
    command
        The command's name, for the last line.
    logged
        Seconds between lines of plain progress.
    """

    def __init__(
        self, mode: Mode = "auto", quiet: int = 0, command: str = "", logged: float = LOGGED
    ) -> None:
        if mode == "auto":
            mode = "bar" if columns() is not None and os.environ.get("TERM") != "dumb" else "plain"
        self._mode = "none" if quiet else mode
        self._quiet = quiet
        self._command = command
        self._logged = logged
        self._began = time.monotonic()
        self._bars: Bars | None = None
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True, name="streamer progress")

    def __call__(self, event: Event) -> None:
        """Show an event."""
        with self._lock:
            if event.stage in ("warning", "note"):
                if self._quiet < (2 if event.stage == "warning" else 1):
                    self.tell(f"streamer: {event.stage}: {event.name}")
            elif self._mode != "none" and not self._closed.is_set():
                if self._bars is None:
                    self._bars = self._begin()
                self._bars(event)

    def error(self, error: ErrorEntry) -> None:
        """Print an error that ended the run."""
        say(f"streamer: {error['message']}")

    def tell(self, text: str) -> None:
        """Print a line that is not an event, on a clean line."""
        with self._lock:
            if self._mode == "bar" and self._bars is not None and self._bars.bar is not None:
                self._bars.bar.write(f"{ERASE}{_fitted(text)}", file=STDERR)
            else:
                say(text)

    def close(self) -> None:
        """Remove the bar permanently, so that later output starts on a clean line."""
        self._closed.set()
        with self._lock:
            if self._bars is not None:
                self._bars.close()
        if self._ticker.is_alive():
            self._ticker.join()

    def finish(self, summary: str) -> None:
        """Print the last line: how long the command took, and whether its output existed before."""
        if not self._quiet:
            what = f"{summary}, in" if summary else "done in"
            say(
                f"streamer: {self._command}: {what} {format_duration(time.monotonic() - self._began)}"
            )

    def _begin(self) -> Bars:
        """Import tqdm, and start the thread that redraws between events, since a matrix may take minutes."""
        from tqdm import tqdm

        tqdm.set_lock(self._lock)
        tqdm.monitor_interval = 0  # tqdm's monitor thread is needed only for bars that skip redraws
        self._ticker.start()
        if self._mode == "bar":
            return Bars(partial(tqdm, file=STDERR, leave=False), lambda e: bar_layout(e, columns()))
        return Bars(partial(tqdm, delay=float("inf")), self._logged_layout)  # never draws by itself

    def _tick(self) -> None:
        while not self._closed.wait(REDRAWN if self._mode == "bar" else self._logged):
            with self._lock:
                if self._bars is None or self._bars.bar is None:
                    continue
                if self._mode == "bar":
                    self._bars.refresh()
                else:
                    bar = self._bars.bar
                    after = bar.format_interval(time.monotonic() - self._began)
                    say(f"streamer: {self._command}: after {after}, {bar}".removesuffix(", ? left"))

    def _logged_layout(self, event: Event) -> dict[str, Any]:
        """Lay out a line for a log."""
        stage = "" if event.stage == self._command else f"{event.stage} "
        desc = event.name
        bar_format = "{desc}"
        if event.of:
            desc = counts(event, " of ").lstrip()
            bar_format += ", {percentage:.0f}%{postfix}, {remaining} left"
        return {"desc": f"{stage}{desc}", "bar_format": bar_format, "postfix": event.adapter}


def _fitted(text: str) -> str:
    """Wrap a line at the terminal's width, if stderr is one."""
    return fit(printable(text), columns())


def verification_text(verification: Mapping[str, Any]) -> str:
    """State what was compared and recomputed, and what was not and why."""
    totals = verification["totals"]
    files = f"{counted(totals['files'], 'file')}, {format_size(totals['bytes'])}"
    lines = [f"{verification['output']}: {files}, as recorded"]
    if "inputs" not in verification:
        alone = "compared only with its own record; give BASE ADAPTER to compare it with them"
        return "\n".join([*lines, alone])
    lines.append(
        f"{totals['recomputed']} of {totals['matrices']} matrices recomputed, each within its rounding"
    )
    if totals["tensors"]:
        lines.append(
            f"{totals['compared']} of {totals['tensors']} other tensors compared with the inputs'"
        )
    for what in ("not_recomputed", "not_compared"):
        reasons = Counter(skipped["reason"] for skipped in verification[what])
        lines += [
            f"{what.replace('_', ' ')}: {count}: {reason}" for reason, count in reasons.items()
        ]
    return "\n".join([*lines, left_out(verification)])


def left_out(verification: Mapping[str, Any]) -> str:
    """Count the matrices and tensors that were not compared with the inputs."""
    totals = verification["totals"]
    left = {
        "matrix": totals["matrices"] - totals["recomputed"],
        "other tensor": totals["tensors"] - totals["compared"],
    }
    counts = [counted(n, what) for what, n in left.items() if n]
    tried = totals["not_recomputed"] + len(verification["not_compared"]) >= totals["not_compared"]
    return f"not compared: {' and '.join(counts) or 'nothing'}{'' if tried else '; --sample all compares everything'}"


def presence(tree: Mapping[str, Any]) -> str:
    """Say how many of a command's outputs existed before, from its JSON object; nothing if none did."""
    parts = list(tree["adapters"].values()) if "adapters" in tree else [tree]
    present = sum(part.get("state") == "present" for part in parts)
    if not present:
        return ""
    return "exists already" if len(parts) == 1 else f"{present} of {len(parts)} exist already"
