"""Weights concatenated by rows: one matrix whose rows are in several tensors.

Before → after: ``experts.3.gate_proj.weight`` (I, H) and ``experts.3.up_proj.weight`` (I, H) → ``experts.gate_up_proj[3]`` (2I, H).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from streamer.weights.base import Weight


@dataclass(frozen=True)
class RowConcat(Weight):
    """Matrices of one width and encoding, concatenated by rows."""

    pieces: tuple[Weight, ...]

    @classmethod
    def of(cls, name: str, pieces: Sequence[Weight]) -> Self:
        """Concatenate weights of one width and encoding."""
        first = pieces[0]
        tensors = {f"{at}.{role}": stored for at, piece in enumerate(pieces) for role, stored in piece.tensors.items()}
        shape = (sum(piece.shape[0] for piece in pieces), *first.shape[1:])
        return cls(name, shape, tensors, first.label, first.compute, first.encoding, tuple(pieces))

    def load(self) -> Self:
        """Read the bytes of all pieces ahead."""
        return replace(self, pieces=tuple(piece.load() for piece in self.pieces))

    def at_hand(self) -> Self:
        """Prepare all pieces for a loop over the rows."""
        return replace(self, pieces=tuple(piece.at_hand() for piece in self.pieces))

    def rows(self, i: int, j: int) -> Tensor:
        """Read rows i to j from the pieces that hold them."""
        found, start = [], 0
        for piece in self.pieces:
            stop = start + piece.shape[0]
            if i < stop and start < j:
                found.append(piece.rows(max(i, start) - start, min(j, stop) - start))
            start = stop
        return found[0] if len(found) == 1 else torch.cat(found)
