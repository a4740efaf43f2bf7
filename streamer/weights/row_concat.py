"""Weights one below the other: a matrix whose rows stand in several tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from streamer.weights.base import Weight


@dataclass(frozen=True)
class Below(Weight):
    """Matrices of one width, encoded in the same way."""

    pieces: tuple[Weight, ...]

    @classmethod
    def of(cls, name: str, pieces: Sequence[Weight]) -> Self:
        """The matrix of these rows."""
        first = pieces[0]
        tensors = {f"{at}.{role}": stored for at, piece in enumerate(pieces) for role, stored in piece.tensors.items()}
        shape = (sum(piece.shape[0] for piece in pieces), *first.shape[1:])
        return cls(name, shape, tensors, first.label, first.compute, first.encoding, tuple(pieces))

    def load(self) -> Self:
        """The same with its bytes read ahead."""
        return replace(self, pieces=tuple(piece.load() for piece in self.pieces))

    def at_hand(self) -> Self:
        """The same, for a loop over its rows."""
        return replace(self, pieces=tuple(piece.at_hand() for piece in self.pieces))

    def rows(self, i: int, j: int) -> Tensor:
        """Rows i to j, from as many pieces as they stand in."""
        found, start = [], 0
        for piece in self.pieces:
            stop = start + piece.shape[0]
            if i < stop and start < j:
                found.append(piece.rows(max(i, start) - start, min(j, stop) - start))
            start = stop
        return found[0] if len(found) == 1 else torch.cat(found)
