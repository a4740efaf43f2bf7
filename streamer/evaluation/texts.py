"""Read a user's text as sequences of tokens, with the tokens whose loss counts.

``.txt`` is cut into sequences that do not overlap; ``.jsonl`` has a sequence a line, as ``text``, ``prompt`` and ``completion``, or
``messages``; ``.npy`` has numbers of tokens, in one stream or a sequence a row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from streamer.errors import FormatError, MissingInputError, UsageError
from streamer.evaluation.skeleton import quiet_transformers, require_transformers
from streamer.storage.files import open_regular

Ids = np.ndarray[tuple[int], np.dtype[np.int64]]
Judged = np.ndarray[tuple[int], np.dtype[np.bool_]]

CHARACTERS = 32
"""Of a text, as many characters are read for each token that is needed."""

KINDS = (".txt", ".jsonl", ".npy")


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """Tokens that a model reads together.

    Attributes
    ----------
    ids
        Numbers of the tokens, (length,).
    judged
        Tokens whose loss counts, (length,) bool; never the first, which nothing predicts.
    """

    ids: Ids
    judged: Judged

    @classmethod
    def all_judged(cls, ids: Ids) -> TokenSequence:
        """Make a sequence of which every token counts but the first."""
        return cls(ids, np.arange(len(ids)) > 0)


@dataclass(frozen=True, eq=False)
class Text:
    """A text, in tokens.

    Attributes
    ----------
    name
        Name of its file.
    """

    name: str
    sequences: tuple[TokenSequence, ...]

    @property
    def tokens(self) -> int:
        """Count the tokens whose loss counts."""
        return sum(int(s.judged.sum()) for s in self.sequences)

    @cached_property
    def sha256(self) -> str:
        """Digest the tokens, and which of them count."""
        digest = hashlib.sha256()
        for s in self.sequences:
            digest.update(len(s.ids).to_bytes(8, "little") + s.ids.tobytes() + s.judged.tobytes())
        return digest.hexdigest()


class TokenizerOf:
    """The tokenizer of a model's directory, loaded when a text needs it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @cached_property
    def tokenizer(self) -> Any:
        """Load it.

        Raises
        ------
        MissingInputError
            If the directory has none that transformers can load.
        """
        transformers = require_transformers()
        try:
            with quiet_transformers():
                return transformers.AutoTokenizer.from_pretrained(
                    self.directory, local_files_only=True, trust_remote_code=False
                )
        except Exception as e:  # of whatever class: each tokenizer fails in its own way
            why = next(iter(str(e).splitlines()), type(e).__name__)
            raise MissingInputError(
                f"{self.directory}: transformers finds no tokenizer there ({why[:120]}); put the model's beside its config.json, or give "
                "texts as .npy files of token ids",
                self.directory,
            ) from None

    @cached_property
    def start(self) -> list[int]:
        """Tokens that it puts at the beginning of every text."""
        alone = self.plain("a")
        whole = list(self.tokenizer("a").input_ids)
        at = next((i for i in range(len(whole)) if whole[i : i + len(alone)] == alone), 0)
        return whole[:at]

    def plain(self, text: str) -> list[int]:
        """Tokenize without special tokens at the beginning or the end."""
        with quiet_transformers():
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def chat(self, messages: Sequence[Any], prompt: bool) -> list[int]:
        """Tokenize messages by the chat template; `prompt` appends what an answer begins with."""
        with quiet_transformers():
            ids = self.tokenizer.apply_chat_template(
                list(messages), tokenize=True, add_generation_prompt=prompt, return_dict=False
            )
        return list(ids)


def read_text(path: Path, tokenizer: TokenizerOf, sequences: int, length: int) -> Text:
    """Read the first sequences of a text.

    Parameters
    ----------
    sequences
        At most as many are read.
    length
        Tokens of a sequence, at most.

    Raises
    ------
    UsageError
        If the file's name does not say what it is.
    MissingInputError, FormatError
        If it is not there, is not what its name says, or has no token whose loss counts.
    """
    readers: dict[str, Callable[[Path, TokenizerOf, int, int], Iterator[TokenSequence]]] = {
        ".txt": _plain_text, ".jsonl": _lines, ".npy": _token_ids,
    }  # fmt: skip
    if path.suffix not in readers:
        raise UsageError(f"{path}: expected a text whose name ends in {', '.join(KINDS)}; give it the name of its kind")
    found: list[TokenSequence] = []
    for sequence in readers[path.suffix](path, tokenizer, sequences, length):
        if sequence.judged.any():
            found.append(sequence)
        if len(found) == sequences:
            break
    if not found:
        raise FormatError(
            f"{path}: has no token whose loss could be taken: at least two tokens in a sequence are needed, give more text"
        )
    return Text(path.name, tuple(found))


def check_tokens(text: Text, path: Path, vocabulary: int, positions: int | None) -> None:
    """Refuse tokens that a model does not have, and sequences that are longer than it takes.

    Raises
    ------
    FormatError
        If a number is not one of its vocabulary.
    UsageError
        If a sequence has more tokens than the model has positions.
    """
    for number, sequence in enumerate(text.sequences):
        if sequence.ids.min() < 0 or sequence.ids.max() >= vocabulary:
            bad = sequence.ids.min() if sequence.ids.min() < 0 else sequence.ids.max()
            raise FormatError(
                f"{path}: sequence {number} has token {bad}, and the model's vocabulary has {vocabulary}; is it tokenized for this model?"
            )
        if positions is not None and len(sequence.ids) > positions:
            raise UsageError(
                f"length: expected at most the {positions} positions of the model, found a sequence of {len(sequence.ids)} tokens"
            )


def _plain_text(path: Path, tokenizer: TokenizerOf, sequences: int, length: int) -> Iterator[TokenSequence]:
    """Cut the beginning of a text into sequences that do not overlap, each begun as the tokenizer begins a text."""
    start = tokenizer.start
    step = length - len(start)
    ids = tokenizer.plain(_read(path, CHARACTERS * sequences * length))
    for i in range(0, len(ids), step):
        yield TokenSequence.all_judged(_array(start + ids[i : i + step]))


def _lines(path: Path, tokenizer: TokenizerOf, sequences: int, length: int) -> Iterator[TokenSequence]:
    """Take a sequence a line, cut at the end where it is too long."""
    fd, _ = open_regular(path, "a text")
    with open(fd, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}: line {number}"
            try:
                tree = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise FormatError(f"{where}: bad JSON: {e}; write one object a line") from None
            ids, judged = _line(tree, tokenizer, where)
            judged[:1] = [False]
            yield TokenSequence(_array(ids[:length]), np.array(judged[:length], bool))


def _line(tree: Any, tokenizer: TokenizerOf, where: str) -> tuple[list[int], list[bool]]:
    """Tokenize the object of a line: its tokens, and which of them count."""
    if isinstance(tree, dict) and isinstance(tree.get("text"), str):
        ids = tokenizer.start + tokenizer.plain(tree["text"])
        return ids, [True] * len(ids)
    if isinstance(tree, dict) and isinstance(tree.get("prompt"), str) and isinstance(tree.get("completion"), str):
        prompt = tokenizer.start + tokenizer.plain(tree["prompt"])
        completion = tokenizer.plain(tree["completion"])
        return prompt + completion, [False] * len(prompt) + [True] * len(completion)
    if isinstance(tree, dict) and isinstance(tree.get("messages"), list):
        return _chat(tree["messages"], tokenizer, where)
    raise FormatError(
        f"{where}: expected an object with 'text', with 'prompt' and 'completion', or with 'messages'; write it as one of them"
    )


def _chat(messages: Sequence[Any], tokenizer: TokenizerOf, where: str) -> tuple[list[int], list[bool]]:
    """Tokenize a conversation; what the assistant says counts."""
    ids: list[int] = []
    judged: list[bool] = []
    try:
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked, answered = tokenizer.chat(messages[:i], True), tokenizer.chat(messages[: i + 1], False)
            if asked[: len(ids)] != ids or answered[: len(asked)] != asked:
                raise FormatError(
                    f"{where}: the chat template does not write an answer after what it was asked, so that its tokens cannot be told; give "
                    "prompt and completion"
                )
            judged += [False] * (len(asked) - len(judged)) + [True] * (len(answered) - len(asked))
            ids = answered
    except FormatError:
        raise
    except Exception as e:  # a template is a program of the model's author, and may raise anything
        why = next(iter(str(e).splitlines()), type(e).__name__)
        raise FormatError(
            f"{where}: the chat template cannot write these messages ({why[:120]}); give prompt and completion"
        ) from None
    return ids, judged


def _token_ids(path: Path, tokenizer: TokenizerOf, sequences: int, length: int) -> Iterator[TokenSequence]:
    """Take token ids: a stream that is cut, or a sequence a row."""
    fd, _ = open_regular(path, "token ids")
    try:
        with open(fd, "rb") as file:
            ids = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as e:
        raise FormatError(f"{path}: cannot be read as a NumPy array: {e}; write it with numpy.save") from None
    if not isinstance(ids, np.ndarray) or ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
        shape = f"{ids.ndim} dimensions of {ids.dtype}" if isinstance(ids, np.ndarray) else "an archive"
        raise FormatError(
            f"{path}: expected whole numbers in 1 dimension (a stream) or 2 (a sequence a row), found {shape}"
        )
    rows = ids[:, :length] if ids.ndim == 2 else (ids[i : i + length] for i in range(0, len(ids), length))
    for row in rows:
        yield TokenSequence.all_judged(_array(row))


def _read(path: Path, characters: int) -> str:
    fd, _ = open_regular(path, "a text")
    with open(fd, encoding="utf-8", errors="strict", newline="") as file:
        try:
            return file.read(characters)
        except UnicodeDecodeError as e:
            raise FormatError(f"{path}: is not UTF-8 at byte {e.start}; convert it") from None


def _array(ids: Any) -> Ids:
    return np.array(ids, np.int64).reshape(-1)
