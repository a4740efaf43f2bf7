"""Lay out tables from columns: as text that fits a width, or as HTML.

The module of a record declares its columns. Names that do not fit are shortened, and columns are hidden before a line would wrap. If the
width is unlimited, as in a pipe or a file, nothing is shortened or hidden, so scripts find what they look for.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile

from streamer.errors import printable

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

    def join(self, *parts: str | Sequence[str]) -> str:
        """Join texts, and lists of lines, which are wrapped, with empty lines between them; empty ones are left out."""
        texts = [
            p if isinstance(p, str) else "\n".join(fit(line, self.width) for line in p if line)
            for p in parts
        ]
        return "\n\n".join(text for text in texts if text)


NO_LIMIT = Screen()


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
        if self.names:
            return min(self.width, max(NAME_COLUMNS, len(self.head), len(self.foot)))
        return self.width


def table(columns: Sequence[Column], screen: Screen = NO_LIMIT) -> str:
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
            shown[shown.index(c)] = replace(
                c, head=c.head[:room], cells=shorten(c.cells, room, c.among)
            )
    lines = []
    rows = [
        [c.head for c in shown],
        ["-" * c.width for c in shown],
        *zip(*(c.cells for c in shown), strict=True),
    ]
    if any(c.foot for c in shown):
        rows.append([c.foot for c in shown])
    for row in rows:
        cells = (
            f"{text:<{c.width}}" if c.left else f"{text:>{c.width}}"
            for c, text in zip(shown, row, strict=True)
        )
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
        textwrap.fill(
            line,
            width,
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
            drop_whitespace=True,
            replace_whitespace=False,
        )
        if len(line) > width
        else line
        for line in text.split("\n")
    ]
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
    ways = _ways(names)
    every = {*names, *among}
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

    columns = zip(*(bare(name).split(".")[:-1] for name in names), strict=False)
    alike = sum(
        1 for _ in takewhile(lambda parts: len({*parts}) == 1 and not parts[0].isdigit(), columns)
    )

    def without_start(name: str, count: int) -> str:
        return "…" + ".".join(bare(name).split(".")[count:])

    def numbers_and_end(name: str, count: int) -> str:
        parts = bare(name).split(".")[count:]
        kept = [p for p in parts[:-1] if p.isdigit()]
        return f"…{'.'.join(kept)}…{parts[-1]}" if kept else f"…{parts[-1]}"

    def letters(name: str, count: int) -> str:
        parts = bare(name).split(".")[alike:]
        return ("…" if alike else "") + ".".join(
            [*(p if p.isdigit() else p[:count] for p in parts[:-1]), parts[-1]]
        )

    starts = [partial(without_start, count=n) for n in range(1, alike + 1)]
    return [
        bare,
        *starts,
        partial(numbers_and_end, count=alike),
        *(partial(letters, count=n) for n in (8, 4, 3, 1)),
    ]


def _middle(name: str, width: int) -> str:
    """Keep the start and the end of a name, with more of the end."""
    if len(name) <= width:
        return name
    start = (width - 1) // 3
    return f"{name[:start]}…{name[len(name) - (width - 1 - start) :]}"
