"""Match the regular expressions of an adapter's config as PEFT does, refusing those that might never finish."""

from __future__ import annotations

import re
from collections.abc import Iterable

from streamer.units import quoted

MAX_REPEATS = 4
"""Most open-ended repeats (``*``, ``+``, ``{2,}``) in one pattern: each may multiply the time by the name's length."""

_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{\d*,?\d*\}|.", re.DOTALL)


def first_match(patterns: Iterable[str], module: str) -> str | None:
    """Find the first pattern, in the config's order, that matches a tail of the module's path, as PEFT does.

    Raises
    ------
    ValueError
        If a pattern is not a regular expression, or might never finish (`_may_explode`): configs are downloaded and not trusted.
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
    """Test whether backtracking may cost more than a small power of the name's length.

    It does if a repeated group can match one text in many ways, as in ``(a+)+``, and it may if there are many repeats in a row.
    """
    parts: list[str] = _TOKEN.findall(pattern)
    repeats = 0
    ambiguous = [False]  # one entry for each open group, outermost first
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
