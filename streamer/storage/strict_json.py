"""Parse standard JSON as the safetensors library does."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {twice!r} appears twice")
    return out


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in {float("inf"), float("-inf")}:
        raise ValueError(f"number {text[:20]} is out of range")
    return value


def _integer(text: str) -> int | float:
    # As in the library's parser: an integer beyond 64 bits must still fit a double, and −0 is not an integer.
    if len(text) > 20:
        _finite(text)
    return -0.0 if text == "-0" else int(text)


def strict_json(raw: bytes, surrogates: bool = False) -> Any:
    """Parse standard JSON: UTF-8, no duplicate keys, no NaN, nothing beyond a double; every fault is a `ValueError`.

    Parameters
    ----------
    surrogates
        Whether strings may contain lone surrogates, as paths that are not UTF-8 do; Python cannot encode them.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
        if b"\\u" in raw and not surrogates:  # Python's parser accepts them
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value
