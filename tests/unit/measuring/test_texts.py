"""Token ids from arrays, the choice among many sequences, and what is refused before any tokenizer is loaded."""

import builtins
import itertools
from pathlib import Path

import numpy as np
import pytest
from seeds import vary

from streamer.errors import FormatError, MissingInputError, UsageError
from streamer.measuring import texts
from streamer.measuring.sequences import TextSequences, evenly
from streamer.measuring.texts import read_text


def save(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


@pytest.mark.parametrize("kind", [np.uint16, np.int64])
def test_a_stream_is_cut_at_even_distances(kind: type, tmp_path: Path) -> None:
    stream = np.arange(1000, dtype=kind)
    text = read_text(save(tmp_path / "ids.npy", stream), None, sequences=4, length=16)
    assert len(text.ids) == 4
    for i, (ids, counted) in enumerate(zip(text.ids, text.counted, strict=True)):
        start = (62 * i // 4) * 16  # of 62 whole sequences
        assert ids.dtype == np.int64
        assert ids.flags.owndata
        assert ids.tolist() == list(range(start, start + 16))
        assert counted.tolist() == [False, *[True] * 15]
    assert (text.tokens, text.longest) == (60, 16)
    every = read_text(tmp_path / "ids.npy", None, sequences=500, length=16)
    assert np.concatenate(every.ids).tolist() == list(range(992))


def test_the_length_that_is_named_gives_the_least_number_of_sequences(tmp_path: Path) -> None:
    path = save(tmp_path / "ids.npy", np.arange(127))
    with pytest.raises(
        FormatError,
        match=r"expected 4 sequences of 64 tokens at least, found 127 tokens; .*--length 31",
    ):
        read_text(path, None, length=64, least=4)
    assert len(read_text(path, None, length=31, least=4).ids) == 4


@pytest.mark.parametrize("size", [0, 1000, texts.TEXT_SAMPLES * texts.TEXT_SAMPLE_BYTES, 3_000_001])
def test_the_digest_of_a_file_tells_it_from_others(size: int, tmp_path: Path) -> None:
    content = np.random.default_rng(vary(0)).bytes(size)

    def digest(name: str, data: bytes) -> str:
        (tmp_path / name).write_bytes(data)
        return texts.sample_digest(tmp_path / name)

    assert digest("a", content) == digest("b", content)
    others = [content + b" "]
    if size:
        first, last = (bytes([content[i] ^ 1]) for i in (0, -1))
        others += [first + content[1:], content[:-1] + last, content[:-1]]
    assert len({digest("c", other) for other in [content, *others]}) == 1 + len(others)


def test_rows_of_an_array_are_sequences(tmp_path: Path) -> None:
    rows = np.arange(60).reshape(10, 6)
    text = read_text(save(tmp_path / "ids.npy", rows), None, sequences=3, length=4)
    assert [ids.tolist() for ids in text.ids] == [rows[i, :4].tolist() for i in (0, 3, 6)]
    assert [len(ids) for ids in read_text(tmp_path / "ids.npy", None).ids] == [6] * 10


def test_the_digest_is_of_ids_and_of_which_count(tmp_path: Path) -> None:
    path = save(tmp_path / "ids.npy", np.arange(64))
    text = read_text(path, None, length=8)
    assert (
        text.digest() == read_text(save(path, np.arange(64).reshape(8, 8)), None, length=8).digest()
    )
    assert text.digest() != read_text(save(path, np.arange(64)[::-1]), None, length=8).digest()
    assert text.digest() != read_text(save(path, np.arange(64)), None, length=16).digest()
    fewer = tuple(np.where(np.arange(8) > 1, c, False) for c in text.counted)
    assert text.digest() != TextSequences(text.ids, fewer).digest()


@pytest.mark.parametrize(
    ("count", "wanted"), [(0, 3), (1, 3), (3, 3), (10, 3), (1000, 64), (65, 64)]
)
def test_sequences_are_chosen_at_even_distances(count: int, wanted: int) -> None:
    chosen = evenly(count, wanted)
    assert len(chosen) == min(count, wanted)
    assert chosen == sorted(set(chosen))
    assert not chosen or (chosen[0], chosen[-1] < count) == (0, True)
    assert {b - a for a, b in itertools.pairwise(chosen)} <= {count // wanted, count // wanted + 1}


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (
            np.ones(64),
            "expected token ids, integers in 1 dimension (a stream) or 2 (sequences), found float64 in 1",
        ),
        (np.ones((2, 2, 2), int), "found int64 in 3"),
        (np.array(3), "found int64 in 0"),
        (
            np.array([], int),
            "expected 2 sequences of 8 tokens at least, found 0 tokens; give more text",
        ),
        (
            np.arange(15),
            "expected 2 sequences of 8 tokens at least, found 15 tokens; give more text, or --length 7",
        ),
        (
            np.arange(8)[None],
            "expected at least 2 sequences, whose difference gives the error, found 1; give more text",
        ),
        (np.zeros((0, 8), int), "found 0; give more text"),
        (np.arange(8)[:, None], "expected sequences of at least 2 tokens, found 1"),
        (
            np.array([[1, 2], [3, 100]]),
            "expected token ids from 0 to 99, found 100 in sequence 2; it was made with another tokenizer",
        ),
        (
            np.array([[1, -100], [3, 4]]),
            "expected token ids from 0 to 99, found -100 in sequence 1",
        ),
        (np.array(["a"], object), "expected an array as numpy.save writes it"),
    ],
)
def test_arrays_that_are_refused(array: np.ndarray, words: str, tmp_path: Path) -> None:
    path = save(tmp_path / "ids.npy", array)
    with pytest.raises(FormatError) as e:
        read_text(path, None, length=8, vocabulary=100)
    assert str(e.value).startswith(f"{path}: ")
    assert words in str(e.value)
    assert "\n" not in str(e.value)


def test_other_files_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    path.write_bytes(b"no array")
    with pytest.raises(FormatError, match=r"expected an array as numpy\.save writes it"):
        read_text(path, None)
    with path.open("wb") as f:
        np.savez(f, ids=np.arange(9))
    with pytest.raises(FormatError, match="found several"):
        read_text(path, None)
    for name in ("no.npy", "no.txt", "no.jsonl"):
        with pytest.raises(MissingInputError):
            read_text(tmp_path / name, None)
    with pytest.raises(
        UsageError,
        match=r"expected the name of a text to end in \.txt, \.jsonl, \.npy, found '\.md'",
    ):
        read_text(tmp_path / "text.md", None)


def test_a_sequence_longer_than_the_models_positions(tmp_path: Path) -> None:
    path = save(tmp_path / "ids.npy", np.arange(64))
    with pytest.raises(
        UsageError, match="a sequence has 16 tokens, and the model 8 positions; give --length 8"
    ):
        read_text(path, None, length=16, positions=8)
    assert read_text(path, None, length=8, positions=8).longest == 8


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_a_directory_without_a_tokenizer(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"text": "words"}\n')
    with pytest.raises(
        MissingInputError,
        match=rf"has no tokenizer, which {name} needs; .* or give token ids \(\.npy\)",
    ):
        read_text(tmp_path / name, tmp_path)
    with pytest.raises(MissingInputError, match="has no tokenizer"):
        read_text(tmp_path / name, None)


def test_token_ids_need_no_transformers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    imported: list[str] = []
    real = builtins.__import__
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda name, *args, **kwargs: (imported.append(name), real(name, *args, **kwargs))[1],
    )
    read_text(save(tmp_path / "ids.npy", np.arange(64)), None, length=8)
    assert not {"transformers", "tokenizers", "jinja2"} & set(imported)
