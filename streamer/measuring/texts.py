"""Read a user's text as sequences of tokens: running text, JSON lines, or token ids.

If a text has more sequences than requested, they are taken at even distances from its beginning to its end. Thus every run makes the same
choice, and no part of the text dominates, such as the first chapter or the first source of a sorted collection. Distant sequences also
depend less on each other; the standard errors assume independence.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streamer.errors import FormatError, UsageError
from streamer.measuring.choices import Question
from streamer.measuring.json_lines import read_json_lines
from streamer.measuring.sequences import TextSequences, evenly
from streamer.measuring.tokenizer import Tokenizer, load_tokenizer
from streamer.storage.files import open_regular, read_bytes, storage_errors
from streamer.units import counted as count_of
from streamer.units import quoted

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
