"""Read a user's text as sequences of tokens: running text, JSON lines, or token ids.

If a text has more sequences than requested, they are taken at even distances from its beginning to its end. Thus every run makes the same
choice, and no part of the text dominates, such as the first chapter or the first source of a sorted collection. Distant sequences also
depend less on each other; the standard errors assume independence.

Read sequences of tokens from JSON lines: documents, prompts with completions, conversations, or questions with choices.

Read texts for a model, and answer questions about it that measuring needs.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamer.errors import FormatError, UnsupportedError, UsageError
from streamer.events import Monitor
from streamer.measuring.sequences import (
    GENERAL,
    TASK,
    Question,
    TextSequences,
    Tokenizer,
    evenly,
    load_tokenizer,
    read_question,
    tokenizer_directory,
)
from streamer.plan.plan import Plan
from streamer.storage.files import open_regular, read_bytes, storage_errors, strict_json
from streamer.streaming.model import LoadedModel
from streamer.units import counted as count_of
from streamer.units import listed, quoted

KEYS = ({"text"}, {"prompt", "completion"}, {"messages"}, {"choices"}, {"choices", "prompt"})
"""Keys that make a line a document, a prompt with a completion, a conversation, or a question; a line has the keys of one kind."""

PROMPT_KEYS = ("tools", "documents", "chat_template_kwargs")
"""Keys beside ``messages`` that would make the chat template write a different prompt."""

TokenSequence = tuple[NDArray[np.int64], NDArray[np.bool_]]
"""Token ids (t,), and which of them count (t,)."""

Spans = list[tuple[int, int]]
"""Ranges of characters: begin, end."""


def read_json_lines(
    path: Path, tokenizer: Tokenizer, sequences: int, length: int
) -> Iterator[TokenSequence | Question]:
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


def _read_line(where: str, raw: bytes, tokenizer: Tokenizer, length: int) -> TokenSequence | Question:
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


SUFFIXES = (".txt", ".jsonl", ".npy")

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
) -> TextSequences:
    """Read sequences of tokens from a file.

    ``.txt``
        Running text in UTF-8. A sequence begins at a word and has `length` tokens, including the tokens that the tokenizer puts before a
        text, which do not count. Sequences do not overlap; the rest at the end is dropped.
    ``.jsonl``
        One JSON object per line, which becomes one sequence, truncated to `length` tokens. With ``text``, all tokens count; with
        ``prompt`` and ``completion``, the completion's tokens; with ``messages``, the tokens of the assistant's answers. With ``question``
        (or ``prompt``), ``choices`` and ``answer``, each choice becomes a sequence that is never truncated; see `read_question`. Other
        keys are ignored.
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
    taken: Sequence[tuple[NDArray[np.int64], NDArray[np.bool_]] | Question]
    with storage_errors(path, "read"):
        if path.suffix == ".npy":
            taken = [(ids, np.ones(len(ids), bool)) for ids in _read_ids(path, sequences, length, least)]
        else:
            tokenizer = load_tokenizer(path, tokenizer_directory)
            if path.suffix == ".txt":
                own = np.arange(length) >= len(tokenizer.start)
                taken = [(ids, own.copy()) for ids in _cut_text(path, tokenizer, sequences, length, least)]
            else:
                taken = list(read_json_lines(path, tokenizer, sequences, length))
    questions = [one for one in taken if isinstance(one, Question)]
    plain = [one for one in taken if not isinstance(one, Question)]
    if questions and plain:
        raise FormatError(
            f"{path}: expected 'choices' on every line or on none, found them on {len(questions)} of {len(taken)}"
        )
    for _, counted in plain:
        counted[0] = False
    text = TextSequences(tuple(ids for ids, _ in plain), tuple(counted for _, counted in plain), path.name)
    text = TextSequences.of_questions(questions, path.name) if questions else text
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
                digest.update(read_bytes(fd, SAMPLE_BYTES, i * (status.st_size - SAMPLE_BYTES) // (SAMPLES - 1)))
    return digest.hexdigest()


def _check(path: Path, text: TextSequences, vocabulary: int | None, positions: int | None) -> None:
    """Refuse a text with too few sequences to estimate errors, or with sequences that the model cannot process."""
    if (count := len(text.right().ids)) < 2:
        raise FormatError(
            f"{path}: expected at least 2 sequences, whose difference gives the error, found {count}; give more text"
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
        raise FormatError(f"{path}: expected an array as numpy.save writes it, found several (numpy.savez)")
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        raise FormatError(
            f"{path}: expected token ids, integers in 1 dimension (a stream) or 2 (sequences), found {array.dtype} in {array.ndim}"
        )
    if array.ndim == 1:
        _check_stream(path, len(array), length, least)
        for i in evenly(len(array) // length, sequences):
            yield np.array(array[i * length : (i + 1) * length], np.int64)
        return
    if array.shape[1] < 2:
        raise FormatError(f"{path}: expected sequences of at least 2 tokens, found {array.shape[1]}")
    for i in evenly(len(array), sequences):
        yield np.array(array[i, :length], np.int64)


def _check_stream(path: Path, tokens: int, length: int, least: int) -> None:
    """Refuse a stream with too few tokens for the fewest sequences; name a length that would do."""
    if tokens < least * length:
        hint = f"give more text, or --length {tokens // least}" if tokens >= 2 * least else "give more text"
        raise FormatError(
            f"{path}: expected {least} sequences of {length} tokens at least, found {count_of(tokens, 'token')}; {hint}"
        )


def _cut_text(path: Path, tokenizer: Tokenizer, sequences: int, length: int, least: int) -> Iterator[NDArray[np.int64]]:
    """Take sequences from text at even distances in bytes, or one directly after another if the text is too short for that."""
    if length <= len(tokenizer.start):
        raise UsageError(
            f"--length: expected more than the {len(tokenizer.start)} tokens that the tokenizer puts before a text, found {length}"
        )
    fd, status = open_regular(path, "text")
    wanted, end, found = length - len(tokenizer.start), 0, 0
    try:
        for i in range(sequences):
            even = i * status.st_size // sequences
            at = _next_word(fd, even) if even > end else end
            ids, size = _tokenize_from(path, fd, at, tokenizer, wanted)
            if len(ids) < wanted:
                if found < least:
                    _check_stream(path, found * length + len(ids), length, least)
                return
            yield np.array([*tokenizer.start, *ids], np.int64)
            end, found = at + size, found + 1
    finally:
        os.close(fd)


def _next_word(fd: int, at: int) -> int:
    """Find where the next word begins, or the next character if no word begins within `LONGEST_WORD` bytes."""
    near = read_bytes(fd, LONGEST_WORD, at)
    for i, byte in enumerate(near):
        if bytes([byte]).isspace():
            return at + i + 1
    return at + next((i for i, byte in enumerate(near) if byte & 0xC0 != 0x80), 0)


def _tokenize_from(path: Path, fd: int, at: int, tokenizer: Tokenizer, wanted: int) -> tuple[list[int], int]:
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
        return raw.decode()
    except UnicodeDecodeError as e:
        if not whole and e.start > len(raw) - 4 and e.reason == "unexpected end of data":
            return raw[: e.start].decode()
        raise FormatError(f"{path}: expected text in UTF-8, found another byte at {at + e.start}; convert it") from e


def refuse_new_tokens(plan: Plan) -> None:
    """Refuse an adapter that changes the size of the vocabulary."""
    if plan.edits.vocabulary is not None:
        raise UnsupportedError(
            f"{plan.adapter.path}: changes the vocabulary to {plan.edits.vocabulary} tokens; evaluate and fit need an adapter that keeps "
            "the base's vocabulary"
        )


def chooses_keys(model: LoadedModel, texts: Mapping[str, TextSequences]) -> bool:
    """Test whether, according to the model's config, attention selects only some of the keys in a sequence of these texts."""
    keys = model.size.keys
    return keys is not None and any(text.longest > keys for text in texts.values())


def read_texts(
    model: LoadedModel, texts: Mapping[str, Path], sequences: int, length: int, monitor: Monitor, least: int = 2
) -> dict[str, TextSequences]:
    """Read texts with a model's tokenizer, and warn if two are the same; see `read_text`."""
    directory = tokenizer_directory(model.job.plan)
    read = {
        name: read_text(path, directory, sequences=sequences, length=length, least=least,
                        vocabulary=model.vocabulary, positions=model.positions)
        for name, path in texts.items()
    }  # fmt: skip
    if read[GENERAL].digest() == read[TASK].digest():
        monitor.warn(
            ("the general and the task's text are the same: kept and forgetting are then one figure; give two texts",)
        )
    for name, text in read.items():
        same = [one for one in (GENERAL, TASK) if name not in (GENERAL, TASK) and read[one].digest() == text.digest()]
        if same:
            monitor.warn((f"{name} is the same as the {same[0]} text: it adds no information",))
    return read
