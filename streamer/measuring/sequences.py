"""Hold sequences of tokens, and choose among many."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamer.measuring.choices import Question, Questions
from streamer.measuring.statistics import SequenceSums

GENERAL, TASK = "general", "task"
"""Names of the two texts: one of what the base can do, one of what the adapter was trained for."""

EIGHTHS = (0, 4, 2, 6, 1, 5, 3, 7)
"""Remainders by 8 of the numbers of a text's units, eighth by eighth. The first one, two or four eighths are spread evenly over the text,
whose sequences stand in its order."""

ALL = range(len(EIGHTHS))
"""All eighths of a text."""


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
    questions
        Those whose choices the sequences are; None of other texts.
    """

    ids: tuple[NDArray[np.int64], ...]
    counted: tuple[NDArray[np.bool_], ...]
    name: str = ""
    questions: Questions | None = None

    @classmethod
    def of(cls, ids: Iterable[NDArray[np.int64]]) -> TextSequences:
        """Make sequences of which every token counts but the first."""
        taken = tuple(ids)
        return cls(taken, tuple(np.arange(len(own)) > 0 for own in taken))

    @classmethod
    def of_questions(cls, questions: Sequence[Question], name: str) -> TextSequences:
        """Make sequences of all choices, of which their own tokens count."""
        ids, counted = zip(*(choice for question in questions for choice in question.choices), strict=True)
        return cls(ids, counted, name, Questions.of(questions))

    def right(self) -> TextSequences:
        """Return the right choices of questions; other texts as they are."""
        return self if self.questions is None else self.take(self.questions.right)

    def scored(self, sums: SequenceSums) -> SequenceSums:
        """Make the sums of each question of those of each choice; see `Questions.scored`. Of other texts they stay as they are."""
        return sums if self.questions is None else self.questions.scored(sums)

    def take(self, rows: Iterable[int]) -> TextSequences:
        """Take some of the sequences, by number, as those of no questions."""
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
    def units(self) -> Sequence[Sequence[int]]:
        """List the numbers of the sequences that are independent of the others: each alone, or all choices of a question."""
        return [(i,) for i in range(len(self.ids))] if self.questions is None else self.questions.units

    @property
    def tokens(self) -> int:
        """Count the tokens whose losses count."""
        return sum(int(c.sum()) for c in self.right().counted)

    @property
    def longest(self) -> int:
        """Count the tokens of the longest sequence."""
        return max(len(ids) for ids in self.ids)

    def facts(self) -> dict[str, Any]:
        """Say what they are, as JSON."""
        return {
            "name": self.name,
            "sequences": len(self.right().ids),
            **({} if self.questions is None else {"choices": len(self.ids)}),
            "tokens": self.tokens,
            "length": self.longest,
            "sha256": self.digest(),
        }

    def digest(self) -> str:
        """Hash (SHA-256, hex) all sequences: ids, and which of them count."""
        digest = hashlib.sha256()
        for ids, counted in zip(self.ids, self.counted, strict=True):
            digest.update(len(ids).to_bytes(8, "little") + ids.astype("<i8").tobytes() + counted.tobytes())
        digest.update(b"" if self.questions is None else self.questions.digest_bytes())
        return digest.hexdigest()


def evenly(count: int, wanted: int) -> list[int]:
    """Choose at most `wanted` of `count` things at even distances, the first of them among these.

    >>> evenly(10, 4), evenly(3, 4)
    ([0, 2, 5, 7], [0, 1, 2])
    """
    return [i * count // wanted for i in range(wanted)] if count > wanted else list(range(count))


def of_eighths(count: int, eighths: range) -> list[int]:
    """List the numbers of a text's units, which are sequences or questions, that some eighths of it hold.

    >>> of_eighths(17, range(2)), of_eighths(3, range(2))
    ([0, 8, 16, 4, 12], [0])
    """
    return [i for eighth in eighths for i in range(EIGHTHS[eighth], count, len(EIGHTHS))]
