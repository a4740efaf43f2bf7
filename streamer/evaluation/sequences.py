"""Hold sequences of tokens, and choose among many."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TextSequences:
    """Sequences of tokens, and the tokens among them whose losses count.

    Attributes
    ----------
    ids
        Token ids of each sequence: (t,), t ≥ 2.
    counted
        Of each sequence (t,): whether the loss of predicting this token, from those before it, counts. The first token of a sequence is
        predicted from nothing and never counts; at least one does.
    name
        Name of the file that they were read from.
    """

    ids: tuple[NDArray[np.int64], ...]
    counted: tuple[NDArray[np.bool_], ...]
    name: str = ""

    @classmethod
    def of(cls, ids: Iterable[NDArray[np.int64]]) -> TextSequences:
        """Make sequences of which every token counts but the first."""
        taken = tuple(ids)
        return cls(taken, tuple(np.arange(len(own)) > 0 for own in taken))

    def take(self, rows: Iterable[int]) -> TextSequences:
        """Take some of the sequences, by number."""
        chosen = tuple(rows)
        return TextSequences(tuple(self.ids[i] for i in chosen), tuple(self.counted[i] for i in chosen), self.name)

    def padded(self, length: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Put all sequences into one batch, with zeros at their ends, where no token that counts sees them.

        Returns
        -------
        ids, counted
            (sequences, length): tokens, and whether the loss of predicting the token after each of them counts.
        """
        ids = np.zeros((len(self.ids), length), np.int64)
        counted = np.zeros((len(self.ids), length), np.bool_)
        for row, (own, counts) in enumerate(zip(self.ids, self.counted, strict=True)):
            ids[row, : len(own)] = own
            counted[row, : len(own) - 1] = counts[1:]
        return ids, counted

    @property
    def tokens(self) -> int:
        """Count the tokens whose losses count."""
        return sum(int(c.sum()) for c in self.counted)

    @property
    def longest(self) -> int:
        """Count the tokens of the longest sequence."""
        return max(len(ids) for ids in self.ids)

    def facts(self) -> dict[str, Any]:
        """Say what they are, as JSON."""
        return {
            "name": self.name,
            "sequences": len(self.ids),
            "tokens": self.tokens,
            "length": self.longest,
            "sha256": self.digest(),
        }

    def digest(self) -> str:
        """Hash (SHA-256, hex) all sequences: ids, and which of them count."""
        digest = hashlib.sha256()
        for ids, counted in zip(self.ids, self.counted, strict=True):
            digest.update(len(ids).to_bytes(8, "little") + ids.astype("<i8").tobytes() + counted.tobytes())
        return digest.hexdigest()


def evenly(count: int, wanted: int) -> list[int]:
    """Choose at most `wanted` of `count` things at even distances, the first of them among these.

    >>> evenly(10, 4), evenly(3, 4)
    ([0, 2, 5, 7], [0, 1, 2])
    """
    return [i * count // wanted for i in range(wanted)] if count > wanted else list(range(count))
