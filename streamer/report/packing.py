"""Pack whole numbers and tensor names into short texts for a page's script, so that 36,000 matrices fit into 5 MB.

A number is written with base64's digits, most significant first; all numbers of a column have the same number of digits. Similarities use
two digits, steps of 1/4095, which is finer than a screen shows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

DIGITS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
"""Digits of base 64, 0 first."""

NUMBER = re.compile(r"(?<![^.\[])\d+(?![^.\]])")
"""A number that is a whole part of a name, such as a layer's or an expert's."""

LONGEST = 15
"""Most decimal digits of a number that JavaScript represents exactly."""


class Packed(TypedDict):
    """Column of whole numbers: digits of each number, and all numbers concatenated."""

    digits: int
    codes: str


def pack(values: ArrayLike, digits: int | None = None) -> Packed:
    """Write nonnegative whole numbers in base 64.

    Parameters
    ----------
    values
        Numbers of any shape, below ``64^digits``.
    digits
        Digits of each number; by default as many as the largest needs.

    >>> pack([0, 1, 63])
    {'digits': 1, 'codes': 'AB/'}
    >>> pack([64, 4095])
    {'digits': 2, 'codes': 'BA//'}
    """
    numbers = np.asarray(values, np.int64).ravel()
    most = int(numbers.max(initial=0))
    width = digits or max(1, -(-most.bit_length() // 6))
    if most >= 64**width or numbers.min(initial=0) < 0:
        raise ValueError(f"{width} digits do not hold {most}")
    shifts = 6 * np.arange(width - 1, -1, -1)
    table = np.frombuffer(DIGITS, np.uint8)
    return {"digits": width, "codes": table[(numbers[:, None] >> shifts) & 63].tobytes().decode("ascii")}


def pack_share(values: NDArray[np.float64], digits: int, up: bool = False) -> Packed:
    """Write shares from 0 to 1 in steps of ``1 / (64^digits - 1)``, rounded down or `up`, so that intervals stay valid."""
    steps = np.clip(values, 0.0, 1.0) * (64**digits - 1)
    return pack(np.ceil(steps) if up else np.floor(steps), digits)


def pack_ratio(values: NDArray[np.float64], digits: int, least: float) -> Packed:
    """Write ratios from `least` to 1 by their logarithms: code 0 is ratio 1, the largest code is `least` or less."""
    steps = np.log(np.clip(values, least, 1.0)) / np.log(least) * (64**digits - 1)
    return pack(np.rint(steps), digits)


def pack_names(names: Sequence[str]) -> dict[str, Any]:
    """Write names as forms and numbers; a name that this would not reproduce is stored whole after an equals sign.

    >>> pack_names(["layers.0.q.weight", "layers.1.q.weight"])
    {'forms': ['layers.*.q.weight'], 'form': {'digits': 1, 'codes': 'AA'}, 'numbers': [0, 1]}
    """
    forms: dict[str, int] = {}
    form: list[int] = []
    numbers: list[int] = []
    for name in names:
        found = NUMBER.findall(name)
        plain = "*" not in name and name[:1] != "=" and all(len(n) <= LONGEST and str(int(n)) == n for n in found)
        form.append(forms.setdefault(NUMBER.sub("*", name) if plain else f"={name}", len(forms)))
        numbers += map(int, found) if plain else ()
    return {"forms": list(forms), "form": pack(form), "numbers": numbers}
