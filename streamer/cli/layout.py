"""Lay out tables that fit a width: shorten names consistently, and hide columns before a line would wrap.

If the width is unlimited, as in a pipe or a file, nothing is shortened or hidden, so scripts find what they look for.

Show progress on stderr: a bar on a terminal or periodic lines in a log, warnings and notes between them, and a last line.

Format the result of a verification for people.

Make a command's last line: what it did, in numbers.
"""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TextIO

from streamer.api.progress import Bars, columns, counts, layout
from streamer.errors import printable
from streamer.events import Event
from streamer.units import counted, format_duration, format_size

if TYPE_CHECKING:
    from streamer.api.records import ErrorEntry

Result = tuple[Mapping[str, Any], str]
"""JSON object for `--json`, and text for people."""

NAME_COLUMNS = 24
"""Width to which names are shortened before other columns are hidden; names get shorter only when all those columns are hidden."""


@dataclass(frozen=True)
class Screen:
    """Screen, pipe or file that shows a result.

    Attributes
    ----------
    width
        Width in characters; None for unlimited lines.
    every
        Whether tables show all rows.
    legend
        Whether tables have a legend below them.
    """

    width: int | None = None
    every: bool = False
    legend: bool = True


def screen(every: bool = False, legend: bool = True) -> Screen:
    """Describe stdout: width from `COLUMNS` or the terminal, unlimited for a pipe or file."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return Screen(max(20, int(columns)), every, legend)
    try:
        width = os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError, AttributeError):
        return Screen(None, every, legend)
    return Screen(max(20, width) if width else None, every, legend)


@dataclass(frozen=True)
class Column:
    """Column of a table.

    Attributes
    ----------
    head
        Title.
    cells
        One cell for each row.
    about
        Explanation for the legend; empty if the title is clear.
    priority
        If there is no room, columns with smaller numbers are hidden first. The first column always stays.
    left
        Whether to align cells to the left.
    names
        Whether cells are names of tensors, which can be shortened.
    foot
        Cell below the last row, for totals.
    among
        For a column of names that shows only some rows: all names, so that shortened names stay unique among them.
    """

    head: str
    cells: Sequence[str]
    about: str = ""
    priority: int = 0
    left: bool = False
    names: bool = False
    foot: str = ""
    among: Sequence[str] = ()

    @property
    def width(self) -> int:
        """Return the width that it needs."""
        return max(map(len, (self.head, *self.cells, self.foot)))

    @property
    def least(self) -> int:
        """Return the smallest width before other columns are hidden."""
        return min(self.width, max(NAME_COLUMNS, len(self.head), len(self.foot))) if self.names else self.width


def table(columns: Sequence[Column], screen: Screen) -> str:
    """Place columns side by side, two spaces apart, followed by a legend of the visible columns."""
    width = screen.width
    shown = [replace(c, cells=[printable(text) for text in c.cells]) for c in columns]
    left_out: list[str] = []
    if width is not None:
        while len(shown) > 1 and sum(c.least + 2 for c in shown) - 2 > width:
            least = min(shown[1:], key=lambda c: c.priority)
            shown.remove(least)
            left_out.append(least.head)
        names = [c for c in shown if c.names]
        spare = width - sum(c.least + 2 for c in shown) + 2
        for c in names:
            room = max(8, c.least + spare)
            spare = max(0, spare - (min(c.width, room) - c.least))
            shown[shown.index(c)] = replace(c, head=c.head[:room], cells=shorten(c.cells, room, c.among))
    lines = []
    rows = [[c.head for c in shown], ["-" * c.width for c in shown], *zip(*(c.cells for c in shown), strict=True)]
    if any(c.foot for c in shown):
        rows.append([c.foot for c in shown])
    for row in rows:
        cells = (f"{text:<{c.width}}" if c.left else f"{text:>{c.width}}" for c, text in zip(shown, row, strict=True))
        lines.append("  ".join(cells).rstrip())
    legend = [(c.head, c.about) for c in shown if c.about and screen.legend]
    if legend:
        indent = max(len(head) for head, _ in legend) + 2
        lines += ["", *(fit(f"{head:<{indent}}{about}", width, indent) for head, about in legend)]
    if left_out:
        lines += ["", fit(f"hidden columns: {', '.join(left_out)}", width)]
    return "\n".join(lines)


def fit(text: str, width: int | None, indent: int = 2) -> str:
    """Wrap a line at the width, indenting further lines; longer words, such as paths, stay whole."""
    if width is None:
        return text
    indent = indent if indent < width // 2 else 2
    lines = [
        textwrap.fill(line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False,
                      drop_whitespace=True, replace_whitespace=False)
        if len(line) > width else line
        for line in text.split("\n")
    ]  # fmt: skip
    return "\n".join(lines)


def shorten(names: Sequence[str], width: int, among: Sequence[str] = ()) -> list[str]:
    """Shorten tensor names consistently to fit a width, keeping them distinct; layer number and projection are kept longest.

    Parameters
    ----------
    among
        All names from which the shortened ones must stay distinct, including themselves; by default only themselves.
    """
    if max(map(len, names), default=0) <= width:
        return list(names)
    ways, every = _ways(names), {*names, *among}
    for way in ways:
        short = [way(name) for name in names]
        if max(map(len, short)) <= width and len(set(map(way, every))) == len(every):
            return short
    return [_middle(ways[-1](name), width) for name in names]


def _ways(names: Sequence[str]) -> list[Callable[[str], str]]:
    """List the ways to shorten names, mildest first."""
    tail = ".weight" if all(name.endswith(".weight") for name in names) else ""

    def bare(name: str) -> str:
        return name.removesuffix(tail)

    split = [bare(name).split(".") for name in names]
    alike = 0
    while all(
        len(parts) > alike + 1 and not parts[alike].isdigit() and parts[alike] == split[0][alike] for parts in split
    ):
        alike += 1

    def without_start(name: str, count: int) -> str:
        return "…" + ".".join(bare(name).split(".")[count:])

    def numbers_and_end(name: str, count: int) -> str:
        parts = bare(name).split(".")[count:]
        kept = [p for p in parts[:-1] if p.isdigit()]
        return f"…{'.'.join(kept)}…{parts[-1]}" if kept else f"…{parts[-1]}"

    def letters(name: str, count: int) -> str:
        parts = bare(name).split(".")[alike:]
        return ("…" if alike else "") + ".".join([*(p if p.isdigit() else p[:count] for p in parts[:-1]), parts[-1]])

    starts = [partial(without_start, count=n) for n in range(1, alike + 1)]
    return [bare, *starts, partial(numbers_and_end, count=alike), *(partial(letters, count=n) for n in (8, 4, 3, 1))]


def _middle(name: str, width: int) -> str:
    """Keep the start and the end of a name, with more of the end."""
    if len(name) <= width:
        return name
    start = (width - 1) // 3
    return f"{name[:start]}…{name[len(name) - (width - 1 - start) :]}"


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


class Progress:
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

    def __init__(self, mode: Mode = "auto", quiet: int = 0, command: str = "", logged: float = LOGGED) -> None:
        if mode == "auto":
            mode = "bar" if columns() is not None and os.environ.get("TERM") != "dumb" else "plain"
        self._mode = "none" if quiet else mode
        self._quiet, self._command, self._logged = quiet, command, logged
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
        """Print the last line: what the command did and how long it took."""
        if not self._quiet:
            what = f"{summary}, in" if summary else "done in"
            say(f"streamer: {self._command}: {what} {format_duration(time.monotonic() - self._began)}")

    def _begin(self) -> Bars:
        """Import tqdm, and start the thread that redraws between events, since a matrix may take minutes."""
        from tqdm import tqdm

        tqdm.set_lock(self._lock)
        tqdm.monitor_interval = 0  # tqdm's monitor thread is needed only for bars that skip redraws
        self._ticker.start()
        if self._mode == "bar":
            return Bars(partial(tqdm, file=STDERR, leave=False), lambda e: layout(e, columns()))
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
        desc = counts(event, " of ").lstrip() if event.of else event.name
        bar_format = "{desc}, {percentage:.0f}%{postfix}, {remaining} left" if event.of else "{desc}"
        return {"desc": f"{stage}{desc}", "bar_format": bar_format, "postfix": event.adapter}


def _fitted(text: str) -> str:
    """Wrap a line at the terminal's width, if stderr is one."""
    return fit(printable(text), columns())


def verification_text(found: Mapping[str, Any]) -> str:
    """State what was compared and recomputed, and what was not and why."""
    totals = found["totals"]
    lines = [f"{found['output']}: {counted(totals['files'], 'file')}, {format_size(totals['bytes'])}, as recorded"]
    if "inputs" not in found:
        return "\n".join([*lines, "compared only with its own record; give BASE ADAPTER to compare it with them"])
    lines.append(f"{totals['recomputed']} of {totals['matrices']} matrices recomputed, each within its rounding")
    if totals["tensors"]:
        lines.append(f"{totals['compared']} of {totals['tensors']} other tensors compared with the inputs'")
    for what in ("not_recomputed", "not_compared"):
        reasons = Counter(skipped["reason"] for skipped in found[what])
        lines += [f"{what.replace('_', ' ')}: {count}: {reason}" for reason, count in reasons.items()]
    return "\n".join([*lines, left_out(found)])


def left_out(found: Mapping[str, Any]) -> str:
    """Count the matrices and tensors that were not compared with the inputs."""
    totals = found["totals"]
    matrices, tensors = totals["matrices"] - totals["recomputed"], totals["tensors"] - totals["compared"]
    counts = [counted(n, what) for n, what in ((matrices, "matrix"), (tensors, "other tensor")) if n]
    tried = totals["not_recomputed"] + len(found["not_compared"]) >= totals["not_compared"]
    return f"not compared: {' and '.join(counts) or 'nothing'}{'' if tried else '; --sample all compares everything'}"


def summary(tree: Mapping[str, Any]) -> str:
    """Summarise a result in half a line from its JSON object, including whether it existed before."""
    parts = [tree] if "adapters" not in tree else list(tree["adapters"].values())
    present = sum(part.get("state") == "present" for part in parts)
    if not present:
        return _held(tree)
    return f"{_held(tree)}, {'exists' if len(parts) == 1 else f'{present} of {len(parts)} exist'} already"


def _held(tree: Mapping[str, Any]) -> str:
    schema = str(tree["schema"]).partition("/")[0]
    if schema == "streamer.several":
        parts = list(tree["adapters"].values())
        keys = ("matrices", "intruders", "certified", "changed", "bytes")
        totals = {key: sum(part.get("totals", {}).get(key, 0) for part in parts) for key in keys}
        one = {**parts[0], "totals": totals, "files": [f for part in parts for f in _files(part)]}
        return f"{counted(len(parts), 'adapter')}, {_held(one)}"
    totals = tree.get("totals", {})
    if schema == "streamer.findings":
        return f"{counted(totals['matrices'], 'matrix')}, {counted(totals['intruders'], 'intruder')}, {totals['certified']} certified"
    if schema == "streamer.output":
        from streamer.api.views import takes_findings

        scaled = f"{counted(totals['intruders'], 'intruder')} scaled, " if takes_findings(tree["method"]) else ""
        merged = f"{counted(totals['matrices'], 'matrix')} merged, " if tree["command"] == "merge" else ""
        return (
            f"{merged}{totals['changed']} of {counted(totals['matrices'], 'matrix')} mitigated, {scaled}"
            f"{counted(len(tree['files']), 'file')}, {format_size(totals['bytes'])}"
        )
    if schema == "streamer.verification":
        compared = (
            f", {counted(totals['recomputed'], 'matrix')} recomputed, {left_out(tree)}" if "inputs" in tree else ""
        )
        return f"{counted(totals['files'], 'file')}, {format_size(totals['bytes'])}, nothing differs{compared}"
    if schema == "streamer.evaluation":
        chosen = tree["suggestion"]
        return f"{counted(len(tree['variants']), 'variant')}" + (
            f", {chosen['name']} suggested" if chosen["name"] else ""
        )
    if schema == "streamer.report":
        files = f", {counted(len(tree['files']), 'file')}" if "files" in tree else ""
        return f"{_held(tree['findings'] or tree['record'] or tree['evaluation'])}{files}"
    if schema == "streamer.diff":
        from streamer.api.views import fates_counted

        return fates_counted(totals)
    if schema == "streamer.fit":
        return f"{counted(len(tree['sets']), 'set')} of new factors"
    if schema == "streamer.map":
        return f"{counted(tree['inputs'], 'input')} of {counted(tree['matrices'], 'matrix')}"
    if schema == "streamer.repair":
        return f"{'converted to LoRA, ' if 'lora' in tree else ''}chose the {tree['chosen']}"
    if schema == "streamer.demo":
        return f"{totals['planted']} intruders planted, {totals['found']} found, {totals['gone']} gone"
    if schema == "streamer.dry-run":
        return "nothing written"
    if schema == "streamer.plan":
        return counted(totals["matrices"], "matrix") if "matrices" in totals else counted(totals["tensors"], "tensor")
    return ""


def _files(part: Mapping[str, Any]) -> list[Any]:
    files = part.get("files", [])
    return files if isinstance(files, list) else []  # a dry run has only their number
