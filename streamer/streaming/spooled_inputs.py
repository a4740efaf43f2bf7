"""Keep the inputs of a module in a temporary file, and compute their second moments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from streamer.linalg.second_moments import Moments, OneHotMoments, RowMoments
from streamer.streaming.spool import Spool, Spooled

ROWS = 512
"""Number of inputs to write or read at a time."""


@dataclass(frozen=True)
class Written:
    """Inputs (t, n) in a spool, their number t, and the sum of their squares."""

    places: list[Spooled]
    rows: int
    squares: float

    @classmethod
    def to(cls, spool: Spool, x: Tensor) -> Written:
        """Write inputs."""
        squares = float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
        return cls([spool.write([x[i : i + ROWS]]) for i in range(0, len(x), ROWS)], len(x), squares)


class Inputs:
    """Inputs of a module on one text, in a spool; for one-hot inputs, the count of each value."""

    def __init__(self, spool: Spool) -> None:
        self.spool, self.places = spool, list[Spooled]()
        self.squares = 0.0
        """Sum of the squares of all inputs."""
        self.rows = 0
        self.counts: Tensor | None = None

    def add(self, x: Written) -> None:
        """Add inputs (t, n)."""
        self.places += x.places
        self.rows += x.rows
        self.squares += x.squares

    def count(self, ids: Tensor, size: int) -> None:
        """Add one-hot inputs by their indices, of `size` possible ones."""
        counts = torch.bincount(ids.flatten(), minlength=size).double()
        self.counts = counts if self.counts is None else self.counts + counts
        self.squares += ids.numel()

    def moments(self, tokens: int) -> Moments:
        """Return the moments as means over this many tokens; they can be read as long as the spool holds the inputs."""
        if self.counts is not None:
            return OneHotMoments(self.counts / tokens)
        return self.row_moments(tokens)

    def row_moments(self, tokens: int) -> RowMoments:
        """Return the moments of inputs that are not one-hot."""
        (shape, _, device), *_ = self.places[0].tensors
        return RowMoments(shape[1], tokens, self.squares / tokens, self._read, device)

    def _read(self) -> Iterator[Tensor]:
        """Read the inputs; small pieces, such as an expert's, are joined up to `ROWS` at a time."""
        rows, count = list[Tensor](), 0
        for place in self.places:
            if count + place.tensors[0][0][0] > ROWS:
                yield torch.cat(rows)
                rows, count = [], 0
            rows.append(self.spool.read(place, again=True)[0])
            count += len(rows[-1])
        yield torch.cat(rows)
