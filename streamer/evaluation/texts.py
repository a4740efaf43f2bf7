"""Read a user's text as sequences of tokens, with the tokens whose loss counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Ids = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class Sequence:
    """Tokens that a model reads together.

    Attributes
    ----------
    ids
        Numbers of the tokens, (length,).
    judged
        Tokens whose loss counts, (length,) bool; never the first, which nothing predicts.
    """

    ids: Ids
    judged: np.ndarray[tuple[int], np.dtype[np.bool_]]

    @classmethod
    def all_judged(cls, ids: Ids) -> Sequence:
        """Make a sequence of which every token counts but the first."""
        return cls(ids, np.arange(len(ids)) > 0)
