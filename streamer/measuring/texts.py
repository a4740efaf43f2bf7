"""Read texts as sequences of tokens, from running text, JSON lines or token ids.

If a text has more sequences than requested, they are taken at even distances from its beginning to its end. Thus every run makes the same
choice, and no part of the text dominates, such as the first chapter or the first source of a sorted collection. Distant sequences also
depend less on each other; the standard errors assume independence.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from streamer.errors import FormatError, MissingInputError, UnsupportedError, UsageError
from streamer.events import Monitor
from streamer.plan.plan import Plan
from streamer.plan.side_files import VOCABULARIES, with_tokenizer
from streamer.storage.files import open_regular, read_bytes, storage_errors, strict_json
from streamer.streaming.model import (
    LoadedModel,
    quiet_transformers,
    require_transformers,
    unreadable,
)
from streamer.units import counted as count_of
from streamer.units import listed, quoted


def unexpected(where: object, wanted: str, found: object) -> FormatError:
    """Make the error for contents other than wanted; what was found may say what to do."""
    return FormatError(f"{where}: expected {wanted}, found {found}")


TEMPLATE_TIME = datetime(2024, 7, 26, 12)
"""Time given to chat templates that write the current time, so that a text has the same tokens every day. Llama 3's templates write this
date if they cannot ask for the current one."""

NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
"""Call by which a chat template asks transformers for the current time; the groups are the quote and the format."""


ENCODING = {
    "add_special_tokens": False,
    "return_offsets_mapping": True,
    "return_attention_mask": False,
    "return_token_type_ids": False,
}


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
        encoding = self.loaded(text, verbose=False, **ENCODING)
        return encoding["input_ids"], encoding["offset_mapping"]

    def render(self, messages: Sequence[Any], with_prompt: bool) -> str:
        """Write messages by the chat template, at the time `TEMPLATE_TIME`; a faulty template or message may raise any exception."""

        def now(call: re.Match[str]) -> str:
            return f"{call[1]}{TEMPLATE_TIME.strftime(call[2])}{call[1]}"

        template = NOW.sub(now, self.loaded.get_chat_template())
        kinds = {"tokenize": False, "add_generation_prompt": with_prompt}
        return cast(
            str, self.loaded.apply_chat_template(list(messages), chat_template=template, **kinds)
        )


def tokenizer_directory(plan: Plan) -> Path | None:
    """Choose the directory of the tokenizer and chat template: the adapter's if a merge would use them, else the base's."""
    adapter = plan.adapter.path
    if plan.adapter.describes_model:
        return (
            adapter
            if any((adapter / name).is_file() for name in VOCABULARIES)
            else plan.base.directory
        )
    chosen = with_tokenizer(
        [], plan.adapter, plan.base.directory, plan.config, plan.edits.vocabulary
    ).tokenizer
    return adapter if chosen == "adapter" else plan.base.directory


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
            f"{where}: has no tokenizer, which {text.name} needs; put its files there, or give token ids (.npy)",
            where,
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
    start = takewhile(
        lambda token: token[1], zip(text_a.input_ids, text_a.special_tokens_mask, strict=True)
    )
    return Tokenizer(directory, tuple(i for i, _ in start), loaded)


TokenSequence = tuple[NDArray[np.int64], NDArray[np.bool_]]
"""Token ids (t,), and which of them count (t,)."""

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
    drawn
        Whether an adapter drew the tokens from its own distribution.
    samples
        Some of what it drew, as text.
    """

    ids: tuple[NDArray[np.int64], ...]
    counted: tuple[NDArray[np.bool_], ...]
    name: str = ""
    drawn: bool = False
    samples: tuple[str, ...] = ()

    def take(self, rows: Iterable[int]) -> TextSequences:
        """Take some of the sequences, by number."""
        chosen = tuple(rows)
        return replace(
            self,
            ids=tuple(self.ids[i] for i in chosen),
            counted=tuple(self.counted[i] for i in chosen),
        )

    def padded(self) -> tuple[Tensor, Tensor]:
        """Put all sequences into one batch, with zeros at their ends, where no counted token attends to them.

        Returns
        -------
        ids, counted
            (sequences, length): tokens, and whether the loss of predicting the next token counts.
        """
        ids = map(torch.from_numpy, self.ids)
        counted = (torch.from_numpy(np.append(counts[1:], False)) for counts in self.counted)
        return pad_sequence([*ids], batch_first=True), pad_sequence([*counted], batch_first=True)

    @property
    def padded_ids(self) -> Tensor:
        """Return all sequences in one batch, (sequences, length); see `padded`."""
        return self.padded()[0]

    @property
    def tokens(self) -> int:
        """Count the tokens whose losses count."""
        return sum(int(c.sum()) for c in self.counted)

    @property
    def longest(self) -> int:
        """Count the tokens of the longest sequence."""
        return max(len(ids) for ids in self.ids)

    def facts(self) -> dict[str, Any]:
        """Describe the sequences as JSON: `TextFacts`."""
        return {
            "name": self.name,
            "sequences": len(self.ids),
            "tokens": self.tokens,
            "length": self.longest,
            "sha256": self.digest(),
            **({"drawn": True, "samples": list(self.samples)} if self.drawn else {}),
        }

    def digest(self) -> str:
        """Hash (SHA-256, hex) all sequences: the ids, which of them count, and whether they were drawn."""
        digest = hashlib.sha256(b"drawn" if self.drawn else b"")
        for ids, counted in zip(self.ids, self.counted, strict=True):
            digest.update(
                len(ids).to_bytes(8, "little") + ids.astype("<i8").tobytes() + counted.tobytes()
            )
        return digest.hexdigest()


Texts = Mapping[str, TextSequences]
"""Texts by name."""


def evenly(count: int, wanted: int) -> list[int]:
    """Choose at most `wanted` of `count` things at even distances, including the first.

    >>> evenly(10, 4), evenly(3, 4)
    ([0, 2, 5, 7], [0, 1, 2])
    """
    return [i * count // wanted for i in range(wanted)] if count > wanted else list(range(count))


KEYS = ({"text"}, {"prompt", "completion"}, {"messages"})
"""Keys that make a line a document, a prompt with a completion, or a conversation; a line has the keys of one kind."""

AS_CHAT = "as_chat"
"""Key of a document's messages in the built-in text: they replace the document if the tokenizer has a chat template."""

PROMPT_KEYS = ("tools", "documents", "chat_template_kwargs")
"""Keys beside ``messages`` that would make the chat template write a different prompt."""

Spans = list[tuple[int, int]]
"""Ranges of characters: begin, end."""


def read_json_lines(
    path: Path, tokenizer: Callable[[], Tokenizer], sequences: int, length: int
) -> Iterator[TokenSequence]:
    """Read at most `sequences` nonempty lines, at even distances; those with token ids need no tokenizer.

    Keys in neither `KEYS` nor `PROMPT_KEYS`, such as ``id`` and ``source``, are ignored.

    Raises
    ------
    FormatError
        If a line is not JSON, has the keys of no kind or of two kinds, has keys that the chat template would write into the prompt, or has
        no counted token.
    """
    fd, _ = open_regular(path, "JSON lines")
    with os.fdopen(fd, "rb") as file:
        wanted = {*evenly(sum(1 for line in file if line.strip()), sequences)}
        file.seek(0)
        filled = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for i, (number, line) in enumerate(filled):
            if i in wanted:
                yield _read_line(f"{path}: line {number}", line, tokenizer, length)


def _read_line(where: str, raw: bytes, load: Callable[[], Tokenizer], length: int) -> TokenSequence:
    try:
        tree = strict_json(raw.removeprefix(codecs.BOM_UTF8))  # of a file's first line
    except ValueError as e:
        raise unexpected(where, "a JSON object", f"other text: {e}") from e
    if is_drawn(tree):
        return _read_ids_line(where, tree, length)
    if not isinstance(tree, dict) or (kind := set(tree) & set().union(*KEYS)) not in KEYS:
        found = (
            f"the keys {listed(map(quoted, tree))}"
            if isinstance(tree, dict)
            else f"a {type(tree).__name__}"
        )
        raise FormatError(
            f"{where}: expected an object with 'text', with 'prompt' and 'completion', or with 'messages', one kind alone, found {found}"
        )
    tokenizer = load()
    start = tokenizer.start
    if "messages" in kind:
        if prompt_keys := [key for key in PROMPT_KEYS if tree.get(key)]:
            raise FormatError(
                f"{where}: has {listed(map(quoted, prompt_keys))}, which the chat template is not given; give 'prompt' and 'completion'"
            )
        text, spans = _conversation(where, tree["messages"], tokenizer)
        start = ()  # the template writes the start tokens itself
    else:
        for key in sorted(kind, reverse=True):
            if not isinstance(tree[key], str):
                raise unexpected(where, f"{key!r} to be a string", quoted(tree[key]))
        text = tree["text"] if "text" in kind else tree["prompt"] + tree["completion"]
        if tree.keys() == {"text", AS_CHAT} and (chat := _as_chat(tree[AS_CHAT], tokenizer)):
            text, start = chat, ()
        spans = [(len(tree["prompt"]) if "prompt" in kind else 0, len(text))]
    ids, offsets = tokenizer.encode(text)
    if tuple(ids[: len(start)]) == start:
        start = ()  # the text contains them
    # A token with characters of both sides, such as a space that ends the prompt and the next word, belongs to the answer.
    marks = [any(end > first and begin < last for first, last in spans) for begin, end in offsets]
    ids, marks = [*start, *ids], [*(False for _ in start), *marks]
    first = next((i for i, counts in enumerate(marks) if counts and i), 0)
    # A long prompt loses its beginning, but no start token, so that up to half of the sequence is answer.
    if first >= length:
        begin = len(tokenizer.start) if tuple(ids[: len(tokenizer.start)]) == tokenizer.start else 0
        end = begin + min(first - max(begin, length // 2), len(ids) - length)
        del ids[begin:end], marks[begin:end]
    if not any(marks[1:length]):
        hint = f"; it has {len(ids)}: raise --length" if len(ids) > length else ""
        raise unexpected(
            where,
            "tokens to predict",
            f"none that counts among its first {min(len(ids), length)}{hint}",
        )
    return np.array(ids[:length], np.int64), np.array(marks[:length], bool)


def _as_chat(messages: list[Any], tokenizer: Tokenizer) -> str:
    """Write a conversation by the chat template; return an empty text if there is none, or if it refuses, such as a system's message."""
    if not tokenizer.loaded.chat_template:
        return ""
    try:
        return tokenizer.render(messages, False)
    except Exception:  # a template is the user's program and may raise anything
        return ""


def is_drawn(tree: Any) -> bool:
    """Test whether a line holds tokens that an adapter wrote: it has no keys but those of `measuring.own_text`."""
    return isinstance(tree, dict) and {"ids", "start"} <= tree.keys() <= {
        "ids",
        "start",
        "text",
        "facts",
    }


def _drawn_texts(path: Path, is_own: Callable[[Any], bool]) -> list[str] | None:
    """Return the texts of a file that has been read, if the adapter wrote all of its lines; the first other line answers.

    Parameters
    ----------
    is_own
        Tells from the first line's ``facts`` whether the adapter in question wrote it.
    """
    texts, known = list[str](), False
    with path.open("rb") as file:
        for line in filter(bytes.strip, file):
            tree: Any = strict_json(line.removeprefix(codecs.BOM_UTF8))
            known = known or (is_drawn(tree) and is_own(tree.get("facts")))
            if not (known and is_drawn(tree)):
                return None
            texts += [str(tree["text"])] if "text" in tree else []
    return texts


def _read_ids_line(where: str, tree: Mapping[str, Any], length: int) -> TokenSequence:
    """Read tokens of which those from ``start`` on count; see `measuring.own_text`."""
    ids, start = tree["ids"], tree["start"]
    if not (
        isinstance(ids, list)
        and all(type(i) is int and 0 <= i < 1 << 63 for i in ids)
        and type(start) is int
    ):
        raise unexpected(
            where, "'ids' to be a list of token ids and 'start' a count", quoted(str(tree))
        )
    if not 0 < start < min(len(ids), length):
        raise unexpected(
            where, "'start' to leave tokens to predict", f"{start} of {min(len(ids), length)}"
        )
    cut = np.array(ids[:length], np.int64)
    return cut, np.arange(len(cut)) >= start


def read_prompts(path: Path, tokenizer: Tokenizer) -> list[list[int]]:
    """Read the prompts in a file: the lines of a ``.txt``; of a ``.jsonl`` each ``prompt``, or ``messages`` up to an answer.

    Raises
    ------
    UsageError, FormatError
        If the name has another suffix, or a line is not a prompt.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise UsageError(
            f"{path}: expected the name of a file of prompts to end in .txt or .jsonl, found {quoted(path.suffix)}"
        )
    fd, _ = open_regular(path, "prompts")
    with storage_errors(path, "read"), os.fdopen(fd, "rb") as file:
        lines = [
            (number, line)
            for number, line in enumerate(file.read().removeprefix(codecs.BOM_UTF8).splitlines(), 1)
            if line.strip()
        ]
    if not lines:
        raise unexpected(path, "prompts, one a line", "none")
    return [
        _read_prompt(f"{path}: line {number}", line, path.suffix, tokenizer)
        for number, line in lines
    ]


def _read_prompt(where: str, raw: bytes, suffix: str, tokenizer: Tokenizer) -> list[int]:
    try:
        tree = {"prompt": raw.decode()} if suffix == ".txt" else strict_json(raw)
    except ValueError as e:
        raise unexpected(
            where, "text in UTF-8" if suffix == ".txt" else "a JSON object", f"other bytes: {e}"
        ) from e
    prompt, start = tree.get("prompt") if isinstance(tree, dict) else None, tokenizer.start
    if isinstance(tree, dict) and isinstance(tree.get("messages"), list):
        prompt, start = _rendered(where, tree["messages"], tokenizer, True), ()
    if not isinstance(prompt, str):
        raise unexpected(where, "an object with 'prompt' or 'messages'", quoted(str(tree)))
    ids, _ = tokenizer.encode(prompt)
    ids = ids if tuple(ids[: len(start)]) == start else [*start, *ids]
    if not ids:
        raise unexpected(where, "a prompt", "an empty one")
    return ids


def _rendered(where: str, messages: list[Any], tokenizer: Tokenizer, with_prompt: bool) -> str:
    """Write messages by the chat template, whose errors name the line."""
    try:
        return tokenizer.render(messages, with_prompt)
    except Exception as e:  # a template is the user's program and may raise anything
        raise FormatError(f"{where}: the chat template refuses it: {quoted(str(e))}") from e


CALLS = ("tool_calls", "function_call")
"""Keys under which a message holds tool calls."""

MARK = "[content of this answer]"
"""Text that stands in for content, to find where a template writes it."""


def _conversation(where: str, messages: Any, tokenizer: Tokenizer) -> tuple[str, Spans]:
    """Write a conversation by the chat template, and find the assistant's answers.

    An answer is the text after the template's generation prompt; without such a prompt, the text from its content on. It includes the
    template's end mark, but not the line feeds after it.
    """
    objects = isinstance(messages, list) and all(isinstance(m, dict) for m in messages)
    if not (objects and all(isinstance(m.get("role"), str) for m in messages)):
        raise FormatError(
            f"{where}: expected 'messages' to be a list of objects with 'role' and 'content'"
        )
    if not tokenizer.loaded.chat_template:
        raise FormatError(
            f"{where}: has 'messages', and the tokenizer in {tokenizer.directory} no chat template; give 'prompt' and 'completion'"
        )

    def rendered(some: list[Any], with_prompt: bool = False) -> str:
        return _rendered(where, some, tokenizer, with_prompt)

    spans: Spans = []
    whole = rendered(messages)
    _check_written(where, messages, whole, rendered)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = messages[:i]
            prompt, plain = (rendered(before, True), rendered(before)) if before else ("", "")
            answered = rendered(messages[: i + 1]).rstrip("\n")
            # Some templates have no generation prompt. In others, it opens a thought that the rendered answer lacks.
            if prompt == plain or not answered.startswith(prompt):
                prompt = _header(tokenizer, before, message.get("content"), plain) or prompt
            if not (answered.startswith(prompt) and whole.startswith(answered)):
                raise FormatError(
                    f"{where}: the chat template writes the beginning of this conversation differently once more messages follow, so that "
                    f"answer {len(spans) + 1} cannot be found; give one line for each answer, with the messages up to it"
                )
            spans.append((len(prompt), len(answered)))
    return whole, spans


def _check_written(
    where: str, messages: list[Any], whole: str, rendered: Callable[[list[Any]], str]
) -> None:
    """Refuse messages of which the template writes something else, or nothing: the model would be measured on another text."""

    def is_text(part: Any) -> bool:
        return (
            isinstance(part, dict)
            and part.get("type", "text") == "text"
            and isinstance(part.get("text"), str)
        )

    def written(i: int, other: dict[str, Any]) -> str:
        return rendered([*messages[:i], other, *messages[i + 1 :]])

    for i, message in enumerate(messages):
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if other := next((part for part in parts if not is_text(part)), None):
            raise unexpected(
                where,
                "only parts of type 'text' in 'content'",
                f"{quoted(other)}; give 'prompt' and 'completion'",
            )
        for at, part in enumerate(parts):
            marked = {**part, "text": MARK}
            text = written(i, {**message, "content": [*parts[:at], marked, *parts[at + 1 :]]})
            # A tool's result may be written as JSON, as Llama 3.1's template does.
            as_data = message["role"] != "tool" and any(
                data in text for data in (str(marked), json.dumps(marked))
            )
            if MARK not in text or as_data:
                raise FormatError(
                    f"{where}: the chat template does not support 'content' as a list of parts; give it as one string"
                )
        for call in (key for key in CALLS if message.get(key)):
            without = {key: value for key, value in message.items() if key != call}
            try:
                ignored = written(i, without) == whole
            except FormatError:
                ignored = False  # a message without content needs its calls
            if ignored:
                raise FormatError(
                    f"{where}: the chat template ignores {call!r}; give 'prompt' and 'completion'"
                )


def _header(tokenizer: Tokenizer, before: list[Any], content: Any, plain: str) -> str | None:
    """Return the text up to an answer's content, if more than spaces follows `plain`, the text of the messages before."""
    mark = [{"type": "text", "text": MARK}] if isinstance(content, list) else MARK
    try:
        text = tokenizer.render([*before, {"role": "assistant", "content": mark}], False)
    except Exception:  # a template may raise anything, here at the mark: the user's own message was rendered before
        return None
    at = text.find(MARK, len(plain))
    return text[:at] if text.startswith(plain) and text[len(plain) : max(at, 0)].strip() else None


SUFFIXES = (".txt", ".jsonl", ".npy")

OWN_NAME = "own.jsonl"
"""Name of a text that the adapter wrote, in records: its file is called after the output, on which no result depends."""

SHOWN = 3
"""Texts that an adapter wrote that are shown."""

BYTES_PER_TOKEN = 8
"""Bytes of text read at first for each token needed; if they are too few, more are read."""

SAMPLES, SAMPLE_BYTES = 256, 4096
"""Number of evenly spaced pieces of a file that its digest covers, and bytes of each; a smaller file is covered completely."""

LONGEST_WORD = 100
"""Bytes searched for the beginning of a word; in text without spaces, a sequence begins at a character."""


def read_text(
    path: str | Path,
    tokenizer_directory: Path | None,
    *,
    sequences: int = 64,
    length: int = 512,
    least: int = 2,
    vocabulary: int | None = None,
    positions: int | None = None,
    is_own: Callable[[Any], bool] = lambda facts: True,
) -> TextSequences:
    """Read sequences of tokens from a file.

    ``.txt``
        Running text in UTF-8. A sequence begins at a word and has `length` tokens, including the tokens that the tokenizer puts before a
        text, which do not count. Sequences do not overlap; the rest at the end is dropped.
    ``.jsonl``
        One JSON object per line, which becomes one sequence, truncated to `length` tokens; a prompt that alone is longer loses its
        beginning. With ``text``, all tokens count; with ``prompt`` and ``completion``, the completion's tokens; with
        ``messages``, the tokens of the assistant's answers. Other keys are ignored.
    ``.npy``
        Token ids: (n,), a stream that is cut into sequences of `length`, or (n, t), one sequence per row, truncated to `length`.

    Parameters
    ----------
    tokenizer_directory
        Directory of the tokenizer and its chat template; ``.npy`` needs none.
    sequences
        Number of sequences to take, at least `least`; a shorter text gives fewer.
    length
        Tokens per sequence, at least 2.
    least
        Fewest sequences that running text or a stream must give, at least 2.
    vocabulary
        Size of the vocabulary; all ids must be smaller.
    positions
        Most tokens per sequence that the model permits.
    is_own
        Tells from the facts of a text that an adapter wrote whether it is the adapter in question; else it is a text like any other.

    Raises
    ------
    UsageError
        If the name has another suffix, or a sequence exceeds the model's positions or has no room beside the tokens that the tokenizer
        puts before a text.
    FormatError
        If the file breaks its format, has fewer than two sequences or than `least`, or has an id outside the vocabulary.
    MissingInputError, MissingPackageError
        If the file, the tokenizer or transformers is missing.
    StorageError
        If the system cannot read the file.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UsageError(
            f"{path}: expected the name of a text to end in {', '.join(SUFFIXES)}, found {quoted(path.suffix)}"
        )
    with storage_errors(path, "read"):
        if path.suffix == ".npy":
            pairs = [
                (ids, np.ones(len(ids), bool)) for ids in _read_ids(path, sequences, length, least)
            ]
        else:
            tokenizer = cache(lambda: load_tokenizer(path, tokenizer_directory))
            if path.suffix == ".txt":
                counted = np.arange(length) >= len(tokenizer().start)
                pairs = [
                    (ids, counted.copy())
                    for ids in _cut_text(path, tokenizer(), sequences, length, least)
                ]
            else:
                pairs = list(read_json_lines(path, tokenizer, sequences, length))
    for _, counted in pairs:
        counted[0] = False
    drawn = _drawn_texts(path, is_own) if path.suffix == ".jsonl" else None
    name = path.name if drawn is None else OWN_NAME
    text = TextSequences(
        tuple(ids for ids, _ in pairs),
        tuple(counted for _, counted in pairs),
        name,
        drawn is not None,
        tuple(drawn or ())[:SHOWN],
    )
    _check(path, text, vocabulary, positions)
    return text


def sample_digest(path: str | Path) -> str:
    """Hash (SHA-256, hex) the size of a text's file and a sample of its bytes, which identify it however it is cut into sequences."""
    fd, status = open_regular(Path(path), "text")
    with storage_errors(Path(path), "read"), open(fd, "rb"):
        digest = hashlib.sha256(status.st_size.to_bytes(8, "little"))
        if status.st_size <= SAMPLES * SAMPLE_BYTES:
            digest.update(read_bytes(fd, status.st_size, 0))
        else:
            for i in range(SAMPLES):
                digest.update(
                    read_bytes(
                        fd, SAMPLE_BYTES, i * (status.st_size - SAMPLE_BYTES) // (SAMPLES - 1)
                    )
                )
    return digest.hexdigest()


def _check(path: Path, text: TextSequences, vocabulary: int | None, positions: int | None) -> None:
    """Refuse a text with too few sequences to estimate errors, or with sequences that the model cannot process."""
    if (count := len(text.ids)) < 2:
        raise unexpected(
            path,
            "at least 2 sequences, whose difference gives the error",
            f"{count}; give more text",
        )
    if positions is not None and text.longest > positions:
        raise UsageError(
            f"{path}: a sequence has {text.longest} tokens, and the model {positions} positions; give --length {positions}"
        )
    for i, ids in enumerate(text.ids):
        least, most = int(ids.min()), int(ids.max())
        if least < 0 or (vocabulary is not None and most >= vocabulary):
            below = "" if vocabulary is None else f" to {vocabulary - 1}"
            raise FormatError(
                f"{path}: expected token ids from 0{below}, found {least if least < 0 else most} in sequence {i + 1}; it was made with "
                "another tokenizer than the model's"
            )


def _read_ids(path: Path, sequences: int, length: int, least: int) -> Iterator[NDArray[np.int64]]:
    fd, _ = open_regular(path, "token ids")
    os.close(fd)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as e:
        raise FormatError(f"{path}: expected an array as numpy.save writes it: {e}") from e
    if not isinstance(array, np.ndarray):
        raise unexpected(path, "an array as numpy.save writes it", "several (numpy.savez)")
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        raise unexpected(
            path,
            "token ids, integers in 1 dimension (a stream) or 2 (sequences)",
            f"{array.dtype} in {array.ndim}",
        )
    if array.ndim == 1:
        _check_stream(path, len(array), length, least)
        array = array[: len(array) // length * length].reshape(-1, length)
    elif array.shape[1] < 2:
        raise unexpected(path, "sequences of at least 2 tokens", array.shape[1])
    for i in evenly(len(array), sequences):
        yield np.array(array[i, :length], np.int64)


def _check_stream(path: Path, tokens: int, length: int, least: int) -> None:
    """Refuse a stream with too few tokens for the fewest sequences; name a length that would do."""
    if tokens < least * length:
        hint = (
            f"give more text, or --length {tokens // least}"
            if tokens >= 2 * least
            else "give more text"
        )
        raise unexpected(
            path,
            f"{least} sequences of {length} tokens at least",
            f"{count_of(tokens, 'token')}; {hint}",
        )


def _cut_text(
    path: Path, tokenizer: Tokenizer, sequences: int, length: int, least: int
) -> Iterator[NDArray[np.int64]]:
    """Take sequences from text at even distances in bytes, or one directly after another if the text is too short for that."""
    if length <= len(tokenizer.start):
        raise UsageError(
            f"--length: expected more than the {len(tokenizer.start)} tokens that the tokenizer puts before a text, found {length}"
        )
    fd, status = open_regular(path, "text")
    wanted, end, count = length - len(tokenizer.start), 0, 0
    with open(fd, "rb"):
        for i in range(sequences):
            even = i * status.st_size // sequences
            at = _next_word(fd, even) if even > end else end
            ids, size = _tokenize_from(path, fd, at, tokenizer, wanted)
            if len(ids) < wanted:
                if count < least:
                    _check_stream(path, count * length + len(ids), length, least)
                return
            yield np.array([*tokenizer.start, *ids], np.int64)
            end, count = at + size, count + 1


def _next_word(fd: int, at: int) -> int:
    """Find where the next word begins, or the next character if no word begins within `LONGEST_WORD` bytes."""
    near = read_bytes(fd, LONGEST_WORD, at)
    if (space := re.search(rb"\s", near)) is not None:
        return at + space.end()
    return at + next((i for i, byte in enumerate(near) if byte & 0xC0 != 0x80), 0)


def _tokenize_from(
    path: Path, fd: int, at: int, tokenizer: Tokenizer, wanted: int
) -> tuple[list[int], int]:
    """Tokenize text from an offset on.

    Returns
    -------
    ids, size
        The number of tokens wanted, or fewer at the end of the text, and the bytes that they represent.
    """
    room = BYTES_PER_TOKEN * (wanted + LONGEST_WORD)
    while True:
        raw = read_bytes(fd, room, at)
        text = _decode(path, raw, at, whole=len(raw) < room)
        ids, offsets = tokenizer.encode(text.lstrip(" "))
        # The last word of a part may be cut and would then become other tokens.
        if len(raw) < room or len(ids) > wanted + LONGEST_WORD:
            break
        room *= 2
    ids = ids[:wanted]
    spaces = len(text) - len(text.lstrip(" "))
    last = offsets[len(ids) - 1][1] if ids else 0
    return ids, len(text[: spaces + last].encode())


def _decode(path: Path, raw: bytes, at: int, whole: bool) -> str:
    """Decode UTF-8; if a part ends within a character, leave that character out."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(raw, whole)
    except UnicodeDecodeError as e:
        raise unexpected(
            path, "text in UTF-8", f"another byte at {at + e.start}; convert it"
        ) from e


BUILT_IN = Path(__file__).with_name("built-in.jsonl")
"""General text for want of a given one: prose, chat and code in a hundred documents; ``built-in.md`` states their sources."""


IDENTIFYING = (
    "architecture",
    "files",
    "weights_sha256",
    "base_is_residual",
    "lora_b_layout",
    "ignored_keys",
)
"""Keys that identify a base or an adapter, in findings and in evaluations, besides its config."""


def read_texts(
    model: LoadedModel,
    texts: Mapping[str, Path],
    sequences: Mapping[str, int],
    length: int,
    monitor: Monitor,
    least: int = 2,
) -> dict[str, TextSequences]:
    """Read texts with a model's tokenizer, and warn if two are the same; `sequences` has a number for each, see `read_text`."""
    plan = model.job.plan
    directory = tokenizer_directory(plan)

    def is_own(facts: Any) -> bool:
        inputs = {"base": plan.base_identity, "adapter": plan.adapter_identity}
        return isinstance(facts, dict) and all(
            isinstance(facts.get(what), dict) and identity.get(key) == facts[what].get(key)
            for what, identity in inputs.items()
            for key in IDENTIFYING
        )

    sequences_of = {
        name: read_text(
            path,
            directory,
            sequences=sequences[name],
            length=length,
            least=least,
            vocabulary=model.vocabulary,
            positions=model.positions,
            is_own=is_own,
        )
        for name, path in texts.items()
    }
    digests = {name: text.digest() for name, text in sequences_of.items()}
    general, task = digests.pop(GENERAL), digests.pop(TASK)
    if general == task:
        what = "the general and the task's text are the same"
        monitor.warn((f"{what}: kept and forgetting are then one figure; give two texts",))
    for name, digest in digests.items():
        if digest in (general, task):
            same = GENERAL if digest == general else TASK
            monitor.warn((f"{name} is the same as the {same} text: it adds no information",))
    return sequences_of
