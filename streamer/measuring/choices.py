"""Read questions with choices, and score them as lm-evaluation-harness 0.4.13 scores ``multiple_choice``.

A choice's log-likelihood is the sum over its tokens after the question. Question and choice are encoded together, with a space between
them; white space at the end of the question belongs to the choice. For ``acc`` the answer is the choice with the highest log-likelihood,
for ``acc_norm`` the choice with the highest log-likelihood per character. The loss of a text of questions is the loss of the right choices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamer.errors import FormatError
from streamer.measuring.statistics import MEASURES, SequenceSums
from streamer.measuring.tokenizer import Tokenizer
from streamer.units import quoted

CONTEXTS = ("question", "prompt")
"""Keys for the text before the choices; a line has one of them."""

DELIMITER = " "
"""Text between a question and a choice."""


@dataclass(frozen=True)
class Question:
    """A question: for each choice its token ids and which of them count, the number of the right choice, and each choice's characters."""

    choices: tuple[tuple[NDArray[np.int64], NDArray[np.bool_]], ...]
    right: int
    characters: tuple[int, ...]


@dataclass(frozen=True)
class Questions:
    """Questions whose choices are the sequences of a text, in order.

    Attributes
    ----------
    first
        Sequence number of each question's first choice, followed by the number of sequences: (Q + 1,).
    right
        Sequence number of each question's right choice: (Q,).
    characters
        Characters of each choice: (S,).
    """

    first: NDArray[np.int64]
    right: NDArray[np.int64]
    characters: NDArray[np.int64]

    @classmethod
    def of(cls, questions: Iterable[Question]) -> Questions:
        """Join questions in order."""
        taken = list(questions)
        first = np.cumsum([0, *(len(q.choices) for q in taken)])
        right = first[:-1] + [q.right for q in taken]
        return cls(first, right, np.concatenate([q.characters for q in taken]))

    @property
    def units(self) -> list[range]:
        """List the sequence numbers of each question's choices."""
        return [range(i, j) for i, j in zip(self.first[:-1], self.first[1:], strict=True)]

    def scored(self, sums: SequenceSums) -> SequenceSums:
        """Make the sums of each question from the sums of each choice: the right choice's sums, and whether the answers are right."""
        own = SequenceSums(sums.tokens[self.right], *(getattr(sums, name)[:, self.right] for name in MEASURES))
        found = self._answered(sums.loss), self._answered(sums.loss / self.characters)
        acc, acc_norm = (np.where(np.isfinite(own.loss), one, np.nan) for one in found)
        return replace(own, acc=acc, acc_norm=acc_norm)

    def _answered(self, losses: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return 1 if the choice of least loss is the right one, else 0: (V, Q)."""
        found = np.array([losses[:, unit].argmin(1) + unit[0] for unit in self.units]).T
        return np.asarray(found == self.right, np.float64)

    def digest_bytes(self) -> bytes:
        """Return bytes that distinguish these questions from others on the same sequences."""
        return b"".join(a.astype("<i8").tobytes() for a in (self.first, self.right, self.characters))


def read_question(where: str, tree: dict[str, Any], tokenizer: Tokenizer, length: int) -> Question:
    """Read the question in a line with ``choices``.

    Raises
    ------
    FormatError
        Unless the line has one question, at least two different choices, and an answer that names one of them; or if a question with its
        choice is longer than `length`, or if there are no tokens before or in the choice.
    """
    keys = [key for key in CONTEXTS if key in tree]
    if len(keys) != 1:
        raise FormatError(f"{where}: expected 'choices' beside 'question' or 'prompt', found {quoted(list(tree))}")
    context, choices = tree[keys[0]], tree["choices"]
    if not isinstance(context, str):
        raise FormatError(f"{where}: expected {keys[0]!r} to be a string, found {quoted(context)}")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(c, str) and c for c in choices)
        or len(set(choices)) < len(choices)
    ):
        raise FormatError(
            f"{where}: expected 'choices' to be a list of two different strings or more, found {quoted(choices)}"
        )
    if "answer" not in tree:
        raise FormatError(
            f"{where}: 'answer' is missing: the number of the right choice, from 0, its text, or its letter"
        )
    right = _right(where, choices, tree["answer"])
    encoded = tuple(_encoded(where, context, DELIMITER + c, tokenizer) for c in choices)
    sizes = [len(ids) for ids, _ in encoded]
    if (longest := max(sizes)) > length:
        raise FormatError(
            f"{where}: the question with the choice {quoted(choices[sizes.index(longest)])} has {longest} tokens; give --length {longest}"
        )
    return Question(encoded, right, tuple(map(len, choices)))


def _right(where: str, choices: list[str], answer: Any) -> int:
    """Find the number of the right choice, which the answer gives as a number from 0, as a text, or as a letter from A."""
    found = set()
    if type(answer) is int and 0 <= answer < len(choices):
        found.add(answer)
    elif isinstance(answer, str):
        letters = [chr(ord("A") + i) for i in range(min(26, len(choices)))]
        found |= {own.index(answer) for own in (choices, letters) if answer in own}
    if len(found) == 1:
        return found.pop()
    what = "two choices by letter and by text" if found else quoted(answer)
    if isinstance(answer, str) and answer.strip().isdecimal():
        what += "; write a number without quotes, counted from 0"
    raise FormatError(
        f"{where}: expected 'answer' to be the number of a choice, from 0, its text, or its letter, found {what}"
    )


def _encoded(
    where: str, context: str, continuation: str, tokenizer: Tokenizer
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Encode a question with a choice, whose tokens count."""
    stripped = context.rstrip()
    if context:
        before, ids = (tokenizer.started(text) for text in (stripped, context + continuation))
    else:
        ids = tokenizer.encode(continuation)[0]
        before = [] if tokenizer.prefix is None else [tokenizer.prefix]
        ids = ids if ids[:1] == before else [*before, *ids]
    if not before or len(ids) <= len(before):
        raise FormatError(
            f"{where}: expected tokens {'in' if before else 'before'} the choice {quoted(continuation[1:])}, found none"
        )
    return np.array(ids, np.int64), np.arange(len(ids)) >= len(before)
