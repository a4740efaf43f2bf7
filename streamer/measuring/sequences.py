"""Hold sequences of tokens, and choose some of many.

Load a model's tokenizer, which also reports where each token is in the text.

Read questions with choices, and score them as lm-evaluation-harness 0.4.13 scores ``multiple_choice``.

A choice's log-likelihood is the sum over its tokens after the question. Question and choice are encoded together, with a space between
them; white space at the end of the question belongs to the choice. For ``acc`` the answer is the choice with the highest log-likelihood,
for ``acc_norm`` the choice with the highest log-likelihood per character. The loss of a text of questions is the loss of the right choices.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamer.errors import FormatError, MissingInputError, UnsupportedError
from streamer.measuring.statistics import MEASURES, SequenceSums
from streamer.plan.plan import Plan
from streamer.plan.side_files import VOCABULARIES, with_tokenizer
from streamer.streaming.model import quiet_transformers, require_transformers, unreadable
from streamer.units import quoted

TEMPLATE_TIME = datetime(2024, 7, 26, 12)
"""Time given to chat templates that write the current time, so that a text has the same tokens every day. Llama 3's templates write this
date if they cannot ask for the current one."""

NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
"""Call by which a chat template asks transformers for the current time; the groups are the quote and the format."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of transformers.

    Attributes
    ----------
    directory
        Directory from which it was read.
    start
        Tokens that it puts before a text, such as ``<s>``, or ``[gMASK]`` and ``<sop>``; often none.
    loaded
        The tokenizer object of transformers.
    """

    directory: Path
    start: tuple[int, ...]
    loaded: Any

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Split a text into tokens without adding any; special tokens in the text are recognised.

        Returns
        -------
        ids, offsets
            Each token's id, and the range of characters (begin, end) that it represents.
        """
        found = self.loaded(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return found["input_ids"], found["offset_mapping"]

    def started(self, text: str) -> list[int]:
        """Split a text into tokens, and put the tokenizer's start tokens before them unless the text contains them."""
        ids, _ = self.encode(text)
        return ids if tuple(ids[: len(self.start)]) == self.start else [*self.start, *ids]

    @property
    def prefix(self) -> int | None:
        """Return the token from which a text is predicted if nothing precedes it: the begin-of-text token, else the end-of-text token."""
        begin, end = self.loaded.bos_token_id, self.loaded.eos_token_id
        found: int | None = end if begin is None else begin
        return found

    def render(self, messages: Sequence[Any], with_prompt: bool) -> str:
        """Write messages by the chat template, at the time `TEMPLATE_TIME`; a faulty template or message may raise any exception."""
        text: str = self.loaded.apply_chat_template(
            list(messages),
            chat_template=NOW.sub(_at_template_time, self.loaded.get_chat_template()),
            tokenize=False,
            add_generation_prompt=with_prompt,
        )
        return text

    @property
    def has_chat_template(self) -> bool:
        """Test whether the tokenizer has a chat template."""
        return bool(self.loaded.chat_template)


def _at_template_time(call: re.Match[str]) -> str:
    """Replace a call for the current time by the string that it returns at `TEMPLATE_TIME`."""
    return f"{call[1]}{TEMPLATE_TIME.strftime(call[2])}{call[1]}"


def tokenizer_directory(plan: Plan) -> Path | None:
    """Choose the directory of the tokenizer and chat template: the adapter's if a merge would use them, else the base's."""
    own = plan.adapter.path
    if plan.adapter.describes_model:
        return own if any((own / name).is_file() for name in VOCABULARIES) else plan.base.directory
    return (
        own
        if with_tokenizer([], plan.adapter, plan.base.directory, plan.config, plan.edits.vocabulary)[1] == "adapter"
        else plan.base.directory
    )


def load_tokenizer(text: Path, directory: Path | None) -> Tokenizer:
    """Load the tokenizer in a directory, without running code from there.

    Parameters
    ----------
    text
        File that needs the tokenizer, named in messages.

    Raises
    ------
    MissingInputError, FormatError, StorageError
        If there is no tokenizer, or transformers or the system cannot read it.
    UnsupportedError
        If it does not report the positions of tokens in the text.
    MissingPackageError
        If transformers is not installed.
    """
    if directory is None or not any((directory / name).is_file() for name in VOCABULARIES):
        where = text if directory is None else directory
        raise MissingInputError(
            f"{where}: has no tokenizer, which {text.name} needs; put its files there, or give token ids (.npy)", where
        )
    transformers = require_transformers()
    with quiet_transformers():
        try:
            loaded = transformers.AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
            text_a = loaded("a", return_special_tokens_mask=True)
        except Exception as e:  # the tokenizers library raises Exception itself
            raise unreadable(directory, "transformers cannot read its tokenizer", e) from e
    if not loaded.is_fast:
        raise UnsupportedError(
            f"{directory}: its tokenizer ({type(loaded).__name__}) does not report positions in the text; give token ids (.npy)"
        )
    start = takewhile(lambda token: token[1], zip(text_a.input_ids, text_a.special_tokens_mask, strict=True))
    return Tokenizer(directory, tuple(i for i, _ in start), loaded)


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
    def padded_ids(self) -> Tensor:
        """Return all sequences in one batch, (sequences, length); see `padded`."""
        return torch.from_numpy(self.padded(self.longest)[0])

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
