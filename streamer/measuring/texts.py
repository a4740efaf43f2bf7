"""Read texts as sequences of tokens, from running text, JSON lines or token ids.

If a text has more sequences than requested, they are taken at even distances from its beginning to its end. Thus every run makes the same
choice, and no part of the text dominates, such as the first chapter or the first source of a sorted collection. Distant sequences also
depend less on each other; the standard errors assume independence.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from streamer.errors import FormatError, UsageError
from streamer.events import Monitor
from streamer.measuring.facts import identities
from streamer.measuring.lines import drawn_texts, read_json_lines
from streamer.measuring.sequences import (
    GENERAL,
    TASK,
    TextSequences,
    TokenSequence,
    evenly,
    same_input,
    unexpected,
)
from streamer.measuring.tokenizer import Tokenizer, load_tokenizer, tokenizer_directory
from streamer.storage.files import open_regular, read_bytes, storage_errors
from streamer.streaming.model import LoadedModel
from streamer.units import counted, quoted

SUFFIXES = (".txt", ".jsonl", ".npy")

OWN_NAME = "own.jsonl"
"""Name of a text that the adapter wrote, in records: its file is called after the output, on which no result depends."""

SHOWN_SAMPLES = 3
"""Texts that an adapter wrote that are shown."""

BYTES_PER_TOKEN = 8
"""Bytes of text read at first for each token needed; if they are too few, more are read."""

TEXT_SAMPLES = 256
TEXT_SAMPLE_BYTES = 4096
"""Number of evenly spaced pieces of a file that its digest covers, and bytes of each; a smaller file is covered completely."""

LONGEST_WORD = 100
"""Bytes searched for the beginning of a word; in text without spaces, a sequence begins at a character."""


def read_text(
    path: Path,
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
    if path.suffix not in SUFFIXES:
        raise UsageError(
            f"{path}: expected the name of a text to end in {', '.join(SUFFIXES)}, found {quoted(path.suffix)}"
        )
    tokenizer = cache(lambda: load_tokenizer(path, tokenizer_directory))
    drawn = None
    with storage_errors(path, "read"):
        if path.suffix == ".npy":
            found = [*_read_ids(path, sequences, length, least)]
        elif path.suffix == ".txt":
            found = [*_cut_text(path, tokenizer(), sequences, length, least)]
        else:
            found = [*read_json_lines(path, tokenizer, sequences, length)]
            drawn = drawn_texts(path, is_own)
    for _, marks in found:
        marks[0] = False
    text = TextSequences(
        tuple(ids for ids, _ in found),
        tuple(marks for _, marks in found),
        path.name if drawn is None else OWN_NAME,
        drawn is not None,
        tuple(drawn or ())[:SHOWN_SAMPLES],
    )
    _check(path, text, vocabulary, positions)
    return text


def sample_digest(path: Path) -> str:
    """Hash (SHA-256, hex) the size of a text's file and a sample of its bytes, which identify it however it is cut into sequences."""
    fd, status = open_regular(path, "text")
    size = status.st_size
    with storage_errors(path, "read"), open(fd, "rb"):
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        if size <= TEXT_SAMPLES * TEXT_SAMPLE_BYTES:
            digest.update(read_bytes(fd, size, 0))
        else:
            for i in range(TEXT_SAMPLES):
                at = i * (size - TEXT_SAMPLE_BYTES) // (TEXT_SAMPLES - 1)
                digest.update(read_bytes(fd, TEXT_SAMPLE_BYTES, at))
    return digest.hexdigest()


def _check(path: Path, text: TextSequences, vocabulary: int | None, positions: int | None) -> None:
    """Refuse a text with too few sequences to estimate errors, or with sequences that the model cannot process."""
    count = len(text.ids)
    if count < 2:
        wanted = "at least 2 sequences, whose difference gives the error"
        raise unexpected(path, wanted, f"{count}; give more text")
    if positions is not None and text.longest > positions:
        raise UsageError(
            f"{path}: a sequence has {text.longest} tokens, and the model {positions} positions; give --length {positions}"
        )
    limit = np.inf if vocabulary is None else vocabulary
    for number, ids in enumerate(text.ids, 1):
        wrong = ids[(ids < 0) | (ids >= limit)]
        if len(wrong):
            most = "" if vocabulary is None else f" to {vocabulary - 1}"
            found = wrong.min() if wrong.min() < 0 else wrong.max()
            raise FormatError(
                f"{path}: expected token ids from 0{most}, found {found} in sequence {number}; it was made with another tokenizer than "
                "the model's"
            )


def _read_ids(path: Path, sequences: int, length: int, least: int) -> Iterator[TokenSequence]:
    fd, _ = open_regular(path, "token ids")
    os.close(fd)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as e:
        raise FormatError(f"{path}: expected an array as numpy.save writes it: {e}") from e
    if not isinstance(array, np.ndarray):
        raise unexpected(path, "an array as numpy.save writes it", "several (numpy.savez)")
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        wanted = "token ids, integers in 1 dimension (a stream) or 2 (sequences)"
        raise unexpected(path, wanted, f"{array.dtype} in {array.ndim}")
    if array.ndim == 1:
        _check_stream(path, len(array), length, least)
        array = array[: len(array) // length * length].reshape(-1, length)
    _, tokens = array.shape
    if tokens < 2:
        raise unexpected(path, "sequences of at least 2 tokens", tokens)
    for i in evenly(len(array), sequences):
        ids = np.array(array[i, :length], np.int64)
        yield ids, np.ones(len(ids), bool)


def _check_stream(path: Path, tokens: int, length: int, least: int) -> None:
    """Refuse a stream with too few tokens for the fewest sequences; name a length that would do."""
    if tokens < least * length:
        enough = tokens // least
        hint = f"give more text, or --length {enough}" if enough >= 2 else "give more text"
        wanted = f"{least} sequences of {length} tokens at least"
        raise unexpected(path, wanted, f"{counted(tokens, 'token')}; {hint}")


def _cut_text(
    path: Path, tokenizer: Tokenizer, sequences: int, length: int, least: int
) -> Iterator[TokenSequence]:
    """Take sequences from text at even distances in bytes, or one directly after another if the text is too short for that."""
    wanted = length - len(tokenizer.start)
    if wanted <= 0:
        raise UsageError(
            f"--length: expected more than the {len(tokenizer.start)} tokens that the tokenizer puts before a text, found {length}"
        )
    fd, status = open_regular(path, "text")
    end = 0
    with open(fd, "rb"):
        for i in range(sequences):
            even = i * status.st_size // sequences
            at = _next_word(fd, even) if even > end else end
            ids, size = _tokenize_from(path, fd, at, tokenizer, wanted)
            if len(ids) < wanted:
                if i < least:
                    _check_stream(path, i * length + len(ids), length, least)
                return
            yield (
                np.array([*tokenizer.start, *ids], np.int64),
                np.arange(length) >= len(tokenizer.start),
            )
            end = at + size


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
        return isinstance(facts, dict) and all(
            isinstance(facts.get(what), dict) and same_input(identity, facts[what])
            for what, identity in identities(plan).items()
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
    name_of = {digests.pop(TASK): TASK, digests.pop(GENERAL): GENERAL}
    if len(name_of) == 1:
        same = "the general and the task's text are the same"
        monitor.warn([f"{same}: kept and forgetting are then one figure; give two texts"])
    for name, digest in digests.items():
        if digest in name_of:
            monitor.warn(
                [f"{name} is the same as the {name_of[digest]} text: it adds no information"]
            )
    return sequences_of
