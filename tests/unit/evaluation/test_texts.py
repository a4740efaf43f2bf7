"""Token ids as a user gives them; texts that take a tokenizer are in the tests of parity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from streamer.errors import FormatError, MissingInputError, UsageError
from streamer.evaluation.texts import Text, TokenizerOf, check_tokens, read_text

NONE = TokenizerOf(Path("nowhere"))


def read(path: Path, values: object, sequences: int = 4, length: int = 8) -> Text:
    np.save(path, values)
    return read_text(path, NONE, sequences, length)


def test_a_stream_is_cut(tmp_path: Path) -> None:
    found = read(tmp_path / "a.npy", np.arange(20, dtype=np.int32))
    assert [s.ids.tolist() for s in found.sequences] == [list(range(8)), list(range(8, 16)), list(range(16, 20))]
    assert [s.judged.tolist() for s in found.sequences] == [[False] + [True] * (n - 1) for n in (8, 8, 4)]
    assert (found.name, found.tokens) == ("a.npy", 17)


def test_rows_are_sequences(tmp_path: Path) -> None:
    found = read(tmp_path / "a.npy", np.arange(60).reshape(6, 10))
    assert [s.ids.tolist() for s in found.sequences] == [list(range(10 * i, 10 * i + 8)) for i in range(4)]


def test_a_single_token_is_left_out(tmp_path: Path) -> None:
    assert [len(s.ids) for s in read(tmp_path / "a.npy", np.arange(17)).sequences] == [8, 8]


def test_the_digest_is_of_the_tokens(tmp_path: Path) -> None:
    one, same, other = (read(tmp_path / f"{i}.npy", np.arange(16) + (i == 2)) for i in range(3))
    assert one.sha256 == same.sha256 != other.sha256


@pytest.mark.parametrize("values", [np.zeros(4), np.zeros((2, 2, 2), int), np.array(3)])
def test_what_is_not_token_ids(values: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="expected whole numbers in 1 dimension"):
        read(tmp_path / "a.npy", values)


def test_a_text_of_no_tokens(tmp_path: Path) -> None:
    for values in (np.array([], int), np.array([5]), np.zeros((3, 1), int)):
        with pytest.raises(FormatError, match=r"has no token whose loss could be taken"):
            read(tmp_path / "a.npy", values)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected a text whose name ends in \.txt, \.jsonl, \.npy"):
        read_text(tmp_path / "a.parquet", NONE, 1, 8)
    with pytest.raises(MissingInputError, match="no such file"):
        read_text(tmp_path / "a.npy", NONE, 1, 8)
    (tmp_path / "a.npy").write_bytes(b"text")
    with pytest.raises(FormatError, match="cannot be read as a NumPy array"):
        read_text(tmp_path / "a.npy", NONE, 1, 8)
    np.savez(tmp_path / "b.npz", a=np.arange(3))
    (tmp_path / "b.npz").rename(tmp_path / "b.npy")
    with pytest.raises(FormatError, match="found an archive"):
        read_text(tmp_path / "b.npy", NONE, 1, 8)


def test_tokens_that_the_model_does_not_have(tmp_path: Path) -> None:
    found, path = read(tmp_path / "a.npy", np.arange(16)), tmp_path / "a.npy"
    check_tokens(found, path, 16, 8)
    with pytest.raises(FormatError, match="sequence 1 has token 15, and the model's vocabulary has 15"):
        check_tokens(found, path, 15, 8)
    with pytest.raises(FormatError, match="sequence 0 has token -1"):
        check_tokens(read(path, np.arange(-1, 9)), path, 15, 8)
    with pytest.raises(
        UsageError, match="length: expected at most the 7 positions of the model, found a sequence of 8"
    ):
        check_tokens(found, path, 16, 7)
