"""Read sequences of tokens from JSON lines: documents, prompts with completions, conversations, or questions with choices."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamer.errors import FormatError
from streamer.measuring.choices import Question, read_question
from streamer.measuring.sequences import evenly
from streamer.measuring.tokenizer import Tokenizer
from streamer.storage.files import open_regular
from streamer.storage.strict_json import strict_json
from streamer.units import listed, quoted

KEYS = ({"text"}, {"prompt", "completion"}, {"messages"}, {"choices"}, {"choices", "prompt"})
"""Keys that make a line a document, a prompt with a completion, a conversation, or a question; a line has the keys of one kind."""

PROMPT_KEYS = ("tools", "documents", "chat_template_kwargs")
"""Keys beside ``messages`` that would make the chat template write a different prompt."""

Sequence = tuple[NDArray[np.int64], NDArray[np.bool_]]
"""Token ids (t,), and which of them count (t,)."""

Spans = list[tuple[int, int]]
"""Ranges of characters: begin, end."""


def read_json_lines(path: Path, tokenizer: Tokenizer, sequences: int, length: int) -> Iterator[Sequence | Question]:
    """Read at most `sequences` nonempty lines, at even distances.

    Keys in neither `KEYS` nor `PROMPT_KEYS`, such as ``id`` and ``source``, are ignored.

    Raises
    ------
    FormatError
        If a line is not JSON, has the keys of no kind or of two kinds, has keys that the chat template would write into the prompt, or has
        no counted token.
    """
    fd, _ = open_regular(path, "JSON lines")
    with os.fdopen(fd, "rb") as file:
        count = sum(1 for line in file if line.strip())
        file.seek(0)
        wanted = iter(evenly(count, sequences))
        found, following = 0, next(wanted, None)
        for number, line in enumerate(file, 1):
            if following is None:
                return
            if line.strip():
                if found == following:
                    yield _read_line(f"{path}: line {number}", line, tokenizer, length)
                    following = next(wanted, None)
                found += 1


def _read_line(where: str, raw: bytes, tokenizer: Tokenizer, length: int) -> Sequence | Question:
    try:
        tree = strict_json(raw.removeprefix(codecs.BOM_UTF8))  # of a file's first line
    except ValueError as e:
        raise FormatError(f"{where}: expected a JSON object, found other text: {e}") from e
    if not isinstance(tree, dict) or (kind := set(tree) & set().union(*KEYS)) not in KEYS:
        found = f"the keys {listed(map(quoted, tree))}" if isinstance(tree, dict) else f"a {type(tree).__name__}"
        raise FormatError(
            f"{where}: expected an object with 'text', with 'prompt' and 'completion', with 'messages', or with 'choices', one kind alone, "
            f"found {found}"
        )
    if "choices" in kind:
        return read_question(where, tree, tokenizer, length)
    start = tokenizer.start
    if "messages" in kind:
        if given := [key for key in PROMPT_KEYS if tree.get(key)]:
            raise FormatError(
                f"{where}: has {listed(map(quoted, given))}, which the chat template is not given; give 'prompt' and 'completion'"
            )
        text, spans = _conversation(where, tree["messages"], tokenizer)
        start = ()  # the template writes the start tokens itself
    else:
        for key in sorted(kind, reverse=True):
            if not isinstance(tree[key], str):
                raise FormatError(f"{where}: expected {key!r} to be a string, found {quoted(tree[key])}")
        text = tree["text"] if "text" in kind else tree["prompt"] + tree["completion"]
        spans = [(len(tree["prompt"]) if "prompt" in kind else 0, len(text))]
    ids, offsets = tokenizer.encode(text)
    if tuple(ids[: len(start)]) == start:
        start = ()  # the text contains them
    # A token with characters of both sides, such as a space that ends the prompt and the next word, belongs to the answer.
    marks = [any(end > first and begin < last for first, last in spans) for begin, end in offsets]
    ids, marks = [*start, *ids][:length], [*(False for _ in start), *marks][:length]
    if not any(marks[1:]):
        whole = len(start) + len(offsets)
        hint = f"; it has {whole} tokens: raise --length" if whole > length else ""
        raise FormatError(
            f"{where}: expected tokens to predict, found none that counts among its first {len(ids)}{hint}"
        )
    return np.array(ids, np.int64), np.array(marks, bool)


CALLS = ("tool_calls", "function_call")
"""Keys under which a message holds tool calls."""

MARK = "[content of this answer]"
"""Text that stands in for content, to find where a template writes it."""


def _conversation(where: str, messages: Any, tokenizer: Tokenizer) -> tuple[str, Spans]:
    """Write a conversation by the chat template, and find the assistant's answers.

    An answer is the text after the template's generation prompt; without such a prompt, the text from its content on. It includes the
    template's end mark, but not the line feeds after it.
    """
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    ):
        raise FormatError(f"{where}: expected 'messages' to be a list of objects with 'role' and 'content'")
    if not tokenizer.has_chat_template:
        raise FormatError(
            f"{where}: has 'messages', and the tokenizer in {tokenizer.directory} no chat template; give 'prompt' and 'completion'"
        )

    def rendered(some: list[Any], with_prompt: bool = False) -> str:
        try:
            return tokenizer.render(some, with_prompt)
        except Exception as e:  # a template is the user's program and may raise anything
            raise FormatError(f"{where}: the chat template refuses it: {quoted(str(e))}") from e

    spans: Spans = []
    whole = rendered(messages)
    _check_written(where, messages, whole, rendered)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = messages[:i]
            prompt, plain = (rendered(before, True), rendered(before)) if before else ("", "")
            behind = rendered(messages[: i + 1]).rstrip("\n")
            # Some templates have no generation prompt. In others, it opens a thought that the rendered answer lacks.
            if prompt == plain or not behind.startswith(prompt):
                prompt = _header(tokenizer, before, message.get("content"), plain) or prompt
            if not (behind.startswith(prompt) and whole.startswith(behind)):
                raise FormatError(
                    f"{where}: the chat template writes the beginning of this conversation differently once more messages follow, so that "
                    f"answer {len(spans) + 1} cannot be found; give one line for each answer, with the messages up to it"
                )
            spans.append((len(prompt), len(behind)))
    return whole, spans


def _check_written(where: str, messages: list[Any], whole: str, rendered: Callable[[list[Any]], str]) -> None:
    """Refuse messages of which the template writes something else, or nothing: the model would be measured on another text."""
    for i, message in enumerate(messages):
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if other := next((part for part in parts if not _is_text(part)), None):
            raise FormatError(
                f"{where}: expected only parts of type 'text' in 'content', found {quoted(other)}; give 'prompt' and 'completion'"
            )
        for at, part in enumerate(parts):
            marked = {**part, "text": MARK}
            text = rendered(
                [*messages[:i], {**message, "content": [*parts[:at], marked, *parts[at + 1 :]]}, *messages[i + 1 :]]
            )
            # A tool's result may be written as JSON, as Llama 3.1's template does.
            as_data = message["role"] != "tool" and any(data in text for data in (str(marked), json.dumps(marked)))
            if MARK not in text or as_data:
                raise FormatError(
                    f"{where}: the chat template does not support 'content' as a list of parts; give it as one string"
                )
        for call in (key for key in CALLS if message.get(key)):
            without = {key: value for key, value in message.items() if key != call}
            try:
                ignored = rendered([*messages[:i], without, *messages[i + 1 :]]) == whole
            except FormatError:
                ignored = False  # a message without content needs its calls
            if ignored:
                raise FormatError(f"{where}: the chat template ignores {call!r}; give 'prompt' and 'completion'")


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)


def _header(tokenizer: Tokenizer, before: list[Any], content: Any, plain: str) -> str | None:
    """Return the text up to an answer's content, if more than spaces follows `plain`, the text of the messages before."""
    mark = [{"type": "text", "text": MARK}] if isinstance(content, list) else MARK
    try:
        text = tokenizer.render([*before, {"role": "assistant", "content": mark}], False)
    except Exception:  # a template may raise anything, here at the mark: the user's own message was rendered before
        return None
    at = text.find(MARK, len(plain))
    return text[:at] if text.startswith(plain) and text[len(plain) : max(at, 0)].strip() else None
