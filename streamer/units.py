"""Write sizes, durations and lists of names as text for messages and tables, and read sizes from options."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

MOST_THREADS = 1024
"""Most threads that are accepted: 4,096 took 40 s for nine small matrices on two cores, and 127,673 crashed libgomp."""

MOST_LISTED = 3
"""Most names that a message lists; it only counts the others."""

_PLURALS = {"matrix": "matrices", "pass": "passes"}

_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_size(text: str, unit: int = 1024) -> int:
    """Convert a size like ``600M`` or ``4G``, in powers of the unit, to bytes; ``GiB`` always is 1024³.

    >>> parse_size("600M"), parse_size("1.5 GiB"), parse_size("4096")
    (629145600, 1610612736, 4096)

    Raises
    ------
    ValueError
        If the text is not a size.
    """
    match = _SIZE.fullmatch(re.sub(r"\s", "", text))
    if not match:
        raise ValueError(f"expected a size like 600M or 4G, found {text!r}")
    unit = 1024 if "i" in match[0].lower() else unit
    return int(float(match[1]) * unit ** " KMGT".index(match[2].upper() or " "))


def format_size(nbytes: float) -> str:
    """Write a number of bytes for people, in powers of 1000 as on disks.

    >>> format_size(999), format_size(1_200_000_000)
    ('999 B', '1.2 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def format_sizes(wanted: int, found: int) -> tuple[str, str]:
    """Write two sizes for a message that compares them; in bytes if they would otherwise look equal.

    >>> format_sizes(5_000_000_000, 2_500_000_000)
    ('5.0 GB', '2.5 GB')
    >>> format_sizes(5_000_000_001, 5_000_000_000)
    ('5000000001 B', '5000000000 B')
    """
    texts = format_size(wanted), format_size(found)
    return texts if texts[0] != texts[1] else (f"{wanted} B", f"{found} B")


def format_duration(seconds: float) -> str:
    """Write seconds for people.

    >>> [format_duration(s) for s in (3.21, 45, 125, 1500, 4320)]
    ['3.2 s', '45 s', '2 min 5 s', '25 min', '1 h 12 min']
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    s = round(seconds)
    if s < 120:
        return f"{s} s"
    if s < 600:
        return f"{s // 60} min {s % 60} s"
    return f"{s // 60} min" if s < 3600 else f"{s // 3600} h {s // 60 % 60} min"


def counted(n: int, noun: str) -> str:
    """Write a number with its noun.

    >>> counted(1, "thread"), counted(2, "thread"), counted(2, "matrix")
    ('1 thread', '2 threads', '2 matrices')
    """
    return f"{n} {noun if n == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """Return the plural of a noun."""
    return _PLURALS.get(noun, f"{noun}s")


def quoted(value: object, most: int = 100) -> str:
    """Quote a value in a message, and shorten it if it is long, because it may come from a download.

    >>> quoted("abc"), quoted("abcdefghij", 6)
    ("'abc'", "'abcde…")
    """
    text = repr(value)
    return text if len(text) <= most else text[:most] + "…"


def listed(
    names: Iterable[object], most: int = MOST_LISTED, separator: str = ", ", room: float = math.inf
) -> str:
    """List names in a message: the first, as many others as fit, and the number of the rest.

    >>> listed(["a", "b"]), listed("abcdefghij")
    ('a, b', 'a, b, c and 7 more')
    >>> listed(["a long name", "another long name"], room=20)
    'a long name and 1 more'
    """
    texts = [str(name) for name in names]
    while most > 1 and sum(len(text) + len(separator) for text in texts[:most]) > room:
        most -= 1
    rest = len(texts) - most
    if rest <= 0:
        return separator.join(texts)
    last = " and " if separator == ", " else f"{separator}and "
    return f"{separator.join(texts[:most])}{last}{rest} more"
