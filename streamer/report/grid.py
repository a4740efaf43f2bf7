"""Lay out matrices as a map: layers from left to right, parts of a layer from top to bottom."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamer.report.packing import NUMBER


@dataclass(frozen=True)
class Grid:
    """Position of each matrix in a map.

    Attributes
    ----------
    parts
        Names of the rows: tensor names with a star for each number, without the part before the layer if they stay distinct.
    layers
        Numbers of the columns; None for names without a number, such as the head's.
    row, column
        Position of each matrix.
    """

    parts: tuple[str, ...]
    layers: tuple[int | None, ...]
    row: tuple[int, ...]
    column: tuple[int, ...]

    def sums(self, values: Sequence[float]) -> NDArray[np.float64]:
        """Sum a value of the matrices over each cell, which contains several for a stack of experts: (rows, columns), NaN if empty."""
        out, seen = np.zeros((len(self.parts), len(self.layers))), np.zeros((len(self.parts), len(self.layers)), bool)
        np.add.at(out, (self.row, self.column), values)
        seen[self.row, self.column] = True
        return np.where(seen, out, np.nan)


def make_grid(names: Sequence[str]) -> Grid:
    """Lay out matrices by tensor name, with rows in order of first appearance.

    >>> make_grid(["model.layers.0.q.weight", "model.layers.1.q.weight"]).parts
    ('q',)
    """
    patterns = [NUMBER.sub("*", name) for name in names]
    numbers = [int(found[0]) if (found := NUMBER.search(name)) else None for name in names]
    rows = list(dict.fromkeys(patterns))
    layers = sorted(set(numbers), key=lambda n: -1 if n is None else n)
    short = [re.sub(r"\.?weight$", "", re.sub(r"^[^*]*?\*\.", "", pattern)) or pattern for pattern in rows]
    parts = short if len(set(short)) == len(short) else rows
    return Grid(tuple(parts), tuple(layers), tuple(map(rows.index, patterns)), tuple(map(layers.index, numbers)))
