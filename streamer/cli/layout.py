"""Lay out tables that fit a width: names shortened alike, columns left out before a line wraps.

Where the width is not limited, as in a pipe or a file, nothing is shortened or left out, so that scripts find what they look for.
"""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from streamer.errors import printable

NAME_COLUMNS = 24
"""A name is shortened to as few columns before others are left out, and no further unless they all are."""


@dataclass(frozen=True)
class Screen:
    """Screen, pipe or file that a result is shown on.

    Attributes
    ----------
    width
        Columns; None where lines may have any length.
    every
        Whether tables show all rows.
    legend
        Whether a legend stands below a table.
    """

    width: int | None = None
    every: bool = False
    legend: bool = True


def screen(every: bool = False, legend: bool = True) -> Screen:
    """Describe stdout: as wide as `COLUMNS` says, or the terminal is; a pipe or file takes lines of any length."""
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
    """A column of a table.

    Attributes
    ----------
    head
        Its title.
    cells
        One a row.
    about
        What it holds, for the legend; empty where the title says it.
    keep
        Columns with smaller numbers are left out first where there is no room; the first column always stays.
    left
        Whether cells are set flush left.
    names
        Whether cells are names of tensors, which can be shortened.
    foot
        The cell below the last row, of totals.
    among
        Of a column of names: all that there are, where the rows have some; shortened, a name is to be like no other.
    """

    head: str
    cells: Sequence[str]
    about: str = ""
    keep: int = 0
    left: bool = False
    names: bool = False
    foot: str = ""
    among: Sequence[str] = ()

    @property
    def width(self) -> int:
        """Count the columns that it takes."""
        return max(map(len, (self.head, *self.cells, self.foot)))

    @property
    def least(self) -> int:
        """Count the columns that it takes at least, before others are left out."""
        return min(self.width, max(NAME_COLUMNS, len(self.head), len(self.foot))) if self.names else self.width


def table(columns: Sequence[Column], screen: Screen) -> str:
    """Set columns side by side, two spaces apart, and under them a legend of the columns that are shown."""
    width = screen.width
    shown = [replace(c, cells=[printable(text) for text in c.cells]) for c in columns]
    left_out: list[str] = []
    if width is not None:
        while len(shown) > 1 and sum(c.least + 2 for c in shown) - 2 > width:
            least = min(shown[1:], key=lambda c: c.keep)
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
    """Wrap a line at the width, further lines indented; words longer than it, such as paths, stay whole."""
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
    """Shorten names of tensors alike to as many columns, so that they stay different; layer number and projection go last.

    Parameters
    ----------
    among
        All names that they are not to be taken for, themselves among them; by default they alone.
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
    """List the ways of shortening, the mildest first."""
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
    """Keep the start and the end of a name, more of the end."""
    if len(name) <= width:
        return name
    start = (width - 1) // 3
    return f"{name[:start]}…{name[len(name) - (width - 1 - start) :]}"
