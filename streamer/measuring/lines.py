"""Read JSON lines as sequences of tokens: documents, prompts with completions, conversations, and tokens that an adapter wrote."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from streamer.errors import FormatError, UsageError
from streamer.json_types import JsonObject
from streamer.measuring.sequences import TokenSequence, evenly, unexpected
from streamer.measuring.tokenizer import Tokenizer
from streamer.storage.files import open_regular, read_regular, strict_json
from streamer.units import listed, quoted

LINE_KEYS = ({"text"}, {"prompt", "completion"}, {"messages"})
"""Keys that make a line a document, a prompt with a completion, or a conversation; a line has the keys of one kind."""

AS_CHAT = "as_chat"
"""Key of a document's messages in the built-in text: they replace the document if the tokenizer has a chat template."""

PROMPT_KEYS = ("tools", "documents", "chat_template_kwargs")
"""Keys beside ``messages`` that would make the chat template write a different prompt."""


def read_json_lines(
    path: Path, tokenizer: Callable[[], Tokenizer], sequences: int, length: int
) -> Iterator[TokenSequence]:
    """Read at most `sequences` nonempty lines, at even distances; those with token ids need no tokenizer.

    Keys in neither `LINE_KEYS` nor `PROMPT_KEYS`, such as ``id`` and ``source``, are ignored.

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
        return _read_drawn(where, tree, length)
    if not isinstance(tree, dict) or tree.keys() & set().union(*LINE_KEYS) not in LINE_KEYS:
        found = f"a {type(tree).__name__}"
        if isinstance(tree, dict):
            found = f"the keys {listed(map(quoted, tree))}"
        raise FormatError(
            f"{where}: expected an object with 'text', with 'prompt' and 'completion', or with 'messages', one kind alone, found {found}"
        )
    tokenizer = load()
    text, spans, is_chat = _text_of(where, tree, tokenizer)
    ids, offsets = tokenizer.encode(text)
    # A token with characters of both sides, such as a space that ends the prompt and the next word, belongs to the answer.
    marks = [any(end > first and begin < last for first, last in spans) for begin, end in offsets]
    if not (is_chat or tokenizer.starts(ids)):  # else the template or the text has the start tokens
        ids = [*tokenizer.start, *ids]
        marks = [*(False for _ in tokenizer.start), *marks]
    _shorten_prompt(ids, marks, tokenizer, length)
    if not any(marks[1:length]):
        hint = f"; it has {len(ids)}: raise --length" if len(ids) > length else ""
        found = f"none that counts among its first {min(len(ids), length)}{hint}"
        raise unexpected(where, "tokens to predict", found)
    return np.array(ids[:length], np.int64), np.array(marks[:length], bool)


def _text_of(where: str, tree: JsonObject, tokenizer: Tokenizer) -> tuple[str, Spans, bool]:
    """Return a line's text, the ranges of it that count, and whether the chat template wrote it."""
    if "messages" in tree:
        if prompt_keys := [key for key in PROMPT_KEYS if tree.get(key)]:
            raise FormatError(
                f"{where}: has {listed(map(quoted, prompt_keys))}, which the chat template is not given; give 'prompt' and 'completion'"
            )
        return *written_conversation(where, tree["messages"], tokenizer), True
    for key in ("text", "prompt", "completion"):
        if not isinstance(tree.get(key, ""), str):
            raise unexpected(where, f"{key!r} to be a string", quoted(tree[key]))
    if "text" in tree:
        chat = _as_chat(tree[AS_CHAT], tokenizer) if tree.keys() == {"text", AS_CHAT} else ""
        text = chat or tree["text"]
        return text, [(0, len(text))], bool(chat)
    prompt = tree["prompt"]
    text = prompt + tree["completion"]
    return text, [(len(prompt), len(text))], False


def _shorten_prompt(ids: list[int], marks: list[bool], tokenizer: Tokenizer, length: int) -> None:
    """Let a long prompt lose its beginning, but no start token, so that up to half of the sequence is answer."""
    first = next((i for i, counts in enumerate(marks) if counts and i), 0)
    if first >= length:
        begin = len(tokenizer.start) if tokenizer.starts(ids) else 0
        end = begin + min(first - max(begin, length // 2), len(ids) - length)
        del ids[begin:end]
        del marks[begin:end]


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
    keys = {"ids", "start"}
    return isinstance(tree, dict) and keys <= tree.keys() <= {*keys, "text", "facts"}


def drawn_texts(path: Path, is_own: Callable[[Any], bool]) -> list[str] | None:
    """Return the texts of a file that has been read, if the adapter wrote all of its lines; the first other line answers.

    Parameters
    ----------
    is_own
        Tells from the first line's ``facts`` whether the adapter in question wrote it.
    """
    texts = list[str]()
    known = False
    with path.open("rb") as file:
        for line in filter(bytes.strip, file):
            tree: Any = strict_json(line.removeprefix(codecs.BOM_UTF8))
            known = known or (is_drawn(tree) and is_own(tree.get("facts")))
            if not (known and is_drawn(tree)):
                return None
            if "text" in tree:
                texts.append(str(tree["text"]))
    return texts


def _read_drawn(where: str, tree: JsonObject, length: int) -> TokenSequence:
    """Read tokens of which those from ``start`` on count; see `measuring.own_text`."""
    ids = tree["ids"]
    start = tree["start"]
    are_ids = isinstance(ids, list) and all(type(i) is int and 0 <= i < 1 << 63 for i in ids)
    if not (are_ids and type(start) is int):
        wanted = "'ids' to be a list of token ids and 'start' a count"
        raise unexpected(where, wanted, quoted(str(tree)))
    cut = np.array(ids[:length], np.int64)
    if not 0 < start < len(cut):
        raise unexpected(where, "'start' to leave tokens to predict", f"{start} of {len(cut)}")
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
    lines = read_regular(path, "prompts").removeprefix(codecs.BOM_UTF8).splitlines()
    prompts = [
        _read_prompt(f"{path}: line {number}", line, path.suffix, tokenizer)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not prompts:
        raise unexpected(path, "prompts, one a line", "none")
    return prompts


def _read_prompt(where: str, raw: bytes, suffix: str, tokenizer: Tokenizer) -> list[int]:
    wanted = "text in UTF-8" if suffix == ".txt" else "a JSON object"
    try:
        tree = {"prompt": raw.decode()} if suffix == ".txt" else strict_json(raw)
    except ValueError as e:
        raise unexpected(where, wanted, f"other bytes: {e}") from e
    keys = tree if isinstance(tree, dict) else {}
    prompt = keys.get("prompt")
    messages: Any = keys.get("messages")
    is_chat = isinstance(messages, list)
    if is_chat:
        prompt = _Conversation(where, messages, tokenizer).rendered(messages, True)
    if not isinstance(prompt, str):
        raise unexpected(where, "an object with 'prompt' or 'messages'", quoted(str(tree)))
    ids, _ = tokenizer.encode(prompt)
    if not (is_chat or tokenizer.starts(ids)):
        ids = [*tokenizer.start, *ids]
    if not ids:
        raise unexpected(where, "a prompt", "an empty one")
    return ids


Spans = list[tuple[int, int]]
"""Ranges of characters: begin, end."""

CALLS = ("tool_calls", "function_call")
"""Keys under which a message holds tool calls."""

MARK = "[content of this answer]"
"""Text that stands in for content, to find where a template writes it."""


def written_conversation(where: str, messages: Any, tokenizer: Tokenizer) -> tuple[str, Spans]:
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
    conversation = _Conversation(where, messages, tokenizer)
    whole = conversation.rendered(messages)
    conversation.check_written(whole)
    return whole, list(conversation.answers(whole))


@dataclass(frozen=True)
class _Conversation:
    """The messages of a line, and the tokenizer whose template writes them."""

    where: str
    messages: list[JsonObject]
    tokenizer: Tokenizer

    def rendered(self, messages: list[Any], with_prompt: bool = False) -> str:
        """Write messages by the chat template, whose errors name the line."""
        try:
            return self.tokenizer.render(messages, with_prompt)
        except Exception as e:  # a template is the user's program and may raise anything
            raise FormatError(
                f"{self.where}: the chat template refuses it: {quoted(str(e))}"
            ) from e

    def answers(self, whole: str) -> Iterator[tuple[int, int]]:
        """Find the assistant's answers in the whole text."""
        roles = [message["role"] for message in self.messages]
        answers = [i for i, role in enumerate(roles) if role == "assistant"]
        for number, i in enumerate(answers, 1):
            answered = self.rendered(self.messages[: i + 1]).rstrip("\n")
            prompt = self._before(i, answered)
            if not (answered.startswith(prompt) and whole.startswith(answered)):
                raise FormatError(
                    f"{self.where}: the chat template writes the beginning of this conversation differently once more messages follow, so "
                    f"that answer {number} cannot be found; give one line for each answer, with the messages up to it"
                )
            yield len(prompt), len(answered)

    def _before(self, i: int, answered: str) -> str:
        """Return the text before the answer that is message i; with the answer it is `answered`."""
        before = self.messages[:i]
        prompt = self.rendered(before, True) if before else ""
        plain = self.rendered(before) if before else ""
        # Some templates have no generation prompt. In others, it opens a thought that the rendered answer lacks.
        if prompt == plain or not answered.startswith(prompt):
            return self._header(before, self.messages[i].get("content"), plain) or prompt
        return prompt

    def _header(self, before: list[Any], content: Any, plain: str) -> str | None:
        """Return the text up to an answer's content, if more than spaces follows `plain`, the text of the messages before."""
        marked = [{"type": "text", "text": MARK}] if isinstance(content, list) else MARK
        try:
            text = self.tokenizer.render([*before, {"role": "assistant", "content": marked}], False)
        except Exception:  # a template may raise anything, here at the mark: the user's own message was rendered before
            return None
        header, mark, _ = text.removeprefix(plain).partition(MARK)
        return plain + header if mark and text.startswith(plain) and header.strip() else None

    def _replaced(self, i: int, message: JsonObject) -> str:
        """Write the messages with another one in place of message i."""
        return self.rendered([*self.messages[:i], message, *self.messages[i + 1 :]])

    def check_written(self, whole: str) -> None:
        """Refuse messages of which the template writes something else, or nothing: the model would be measured on another text."""
        for i, message in enumerate(self.messages):
            if isinstance(message.get("content"), list):
                self._check_parts(i, message, message["content"])
            for call in CALLS:
                if message.get(call) and self._ignores(i, message, call, whole):
                    raise FormatError(
                        f"{self.where}: the chat template ignores {call!r}; give 'prompt' and 'completion'"
                    )

    def _check_parts(self, i: int, message: JsonObject, parts: list[Any]) -> None:
        """Refuse parts that are no text, and a template that does not write the text of each."""
        if other := next((part for part in parts if not _is_text(part)), None):
            wanted = "only parts of type 'text' in 'content'"
            raise unexpected(self.where, wanted, f"{quoted(other)}; give 'prompt' and 'completion'")
        for at, part in enumerate(parts):
            marked = {**part, "text": MARK}
            content = [*parts[:at], marked, *parts[at + 1 :]]
            text = self._replaced(i, {**message, "content": content})
            # A tool's result may be written as JSON, as Llama 3.1's template does.
            as_data = str(marked) in text or json.dumps(marked) in text
            if MARK not in text or (as_data and message["role"] != "tool"):
                raise FormatError(
                    f"{self.where}: the chat template does not support 'content' as a list of parts; give it as one string"
                )

    def _ignores(self, i: int, message: JsonObject, call: str, whole: str) -> bool:
        """Test whether the template writes the same text without a message's calls."""
        without = {key: value for key, value in message.items() if key != call}
        try:
            return self._replaced(i, without) == whole
        except FormatError:
            return False  # a message without content needs its calls


def _is_text(part: Any) -> bool:
    """Test whether a part of a message's content is text."""
    if not (isinstance(part, dict) and isinstance(part.get("text"), str)):
        return False
    return "type" not in part or part["type"] == "text"
