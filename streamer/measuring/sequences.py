"""Hold sequences of tokens, and choose some of many."""

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
"""Names of the two texts: what the base can do, and what the adapter was trained for."""


@dataclass(frozen=True)
class TextSequences:
    """Sequences of tokens, and which tokens' losses count.

    Attributes
    ----------
    ids
        Token ids of each sequence: (t,), t ≥ 2.
    counted
        For each sequence (t,): whether the loss of predicting this token from the tokens before it counts. The first token has nothing
        before it and never counts; at least one token counts.
    name
        Name of the file from which they were read.
    questions
        Questions whose choices are these sequences; None for other texts.
    """

    ids: tuple[NDArray[np.int64], ...]
    counted: tuple[NDArray[np.bool_], ...]
    name: str = ""
    questions: Questions | None = None

    @classmethod
    def of(cls, ids: Iterable[NDArray[np.int64]]) -> TextSequences:
        """Make sequences in which every token except the first counts."""
        taken = tuple(ids)
        return cls(taken, tuple(np.arange(len(own)) > 0 for own in taken))

    @classmethod
    def of_questions(cls, questions: Sequence[Question], name: str) -> TextSequences:
        """Make one sequence for each choice, in which the choice's own tokens count."""
        ids, counted = zip(*(choice for question in questions for choice in question.choices), strict=True)
        return cls(ids, counted, name, Questions.of(questions))

    def right(self) -> TextSequences:
        """Return the right choices if these are questions, else this text unchanged."""
        return self if self.questions is None else self.take(self.questions.right)

    def scored(self, sums: SequenceSums) -> SequenceSums:
        """Turn sums of each choice into sums of each question (see `Questions.scored`); return the sums of other texts unchanged."""
        return sums if self.questions is None else self.questions.scored(sums)

    def take(self, rows: Iterable[int]) -> TextSequences:
        """Take some of the sequences, by number, without their questions."""
        chosen = tuple(rows)
        return TextSequences(tuple(self.ids[i] for i in chosen), tuple(self.counted[i] for i in chosen), self.name)

    def padded(self, length: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Put all sequences into one batch, with zeros at their ends, where no counted token attends to them.

        Returns
        -------
        ids, counted
            (sequences, length): tokens, and whether the loss of predicting the next token counts.
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
        return sum(int(c.sum()) for c in self.right().counted)

    @property
    def longest(self) -> int:
        """Count the tokens of the longest sequence."""
        return max(len(ids) for ids in self.ids)

    def facts(self) -> dict[str, Any]:
        """Describe the sequences as JSON: `TextFacts`."""
        return {
            "name": self.name,
            "sequences": len(self.right().ids),
            **({} if self.questions is None else {"choices": len(self.ids)}),
            "tokens": self.tokens,
            "length": self.longest,
            "sha256": self.digest(),
        }

    def digest(self) -> str:
        """Hash (SHA-256, hex) all sequences: the ids, and which of them count."""
        digest = hashlib.sha256()
        for ids, counted in zip(self.ids, self.counted, strict=True):
            digest.update(len(ids).to_bytes(8, "little") + ids.astype("<i8").tobytes() + counted.tobytes())
        digest.update(b"" if self.questions is None else self.questions.digest_bytes())
        return digest.hexdigest()


def evenly(count: int, wanted: int) -> list[int]:
    """Choose at most `wanted` of `count` things at even distances, including the first.

    >>> evenly(10, 4), evenly(3, 4)
    ([0, 2, 5, 7], [0, 1, 2])
    """
    return [i * count // wanted for i in range(wanted)] if count > wanted else list(range(count))
