"""Match regular expressions of an adapter's config as PEFT does; those that could take for ever are refused."""

from __future__ import annotations

import re
from collections.abc import Iterable

from streamer.units import quoted

MAX_REPEATS = 4
"""Open-ended repeats (``*``, ``+``, ``{2,}``) in one pattern: each may multiply the time by the name's length."""

_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{\d*,?\d*\}|.", re.DOTALL)


def first_match(patterns: Iterable[str], module: str) -> str | None:
    """Find the first pattern, in the config's order, that matches a tail of the module's path, as PEFT takes it.

    Raises
    ------
    ValueError
        If a pattern is not a regular expression, or may take for ever (`_may_explode`): a config comes from a download.
    """
    for pattern in patterns:
        if _may_explode(pattern):
            raise ValueError(
                f"pattern {quoted(pattern)} may never finish matching: it repeats a group that repeats or branches, or has over "
                f"{MAX_REPEATS} repeats; write it without"
            )
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return pattern
        except (re.error, OverflowError, RecursionError) as e:
            raise ValueError(f"pattern {quoted(pattern)} is not a regular expression: {e}") from None
    return None


def _may_explode(pattern: str) -> bool:
    """Say whether backtracking may cost more than a modest power of the name's length.

    It does where a group that can match one text in many ways is repeated, as in ``(a+)+``, and it may where many repeats stand in a row.
    """
    parts: list[str] = _TOKEN.findall(pattern)
    repeats = 0
    ambiguous = [False]  # of each open group, the whole pattern outermost
    for i, part in enumerate(parts):
        following = parts[i + 1] if i + 1 < len(parts) else ""
        repeated = following in ("*", "+") or (following.startswith("{") and len(following) > 1)
        if part == "(":
            ambiguous.append(False)
        elif part == ")" and len(ambiguous) > 1:
            inner = ambiguous.pop()
            if inner and repeated:
                return True
            ambiguous[-1] |= inner
        if repeated or part in {"|", "?"}:
            ambiguous[-1] = True
        repeats += following in ("*", "+") or following.endswith(",}")
    return repeats > MAX_REPEATS
