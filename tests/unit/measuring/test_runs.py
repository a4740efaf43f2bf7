"""Sweeps: sequences are divided into groups, and records of their sums are read as the same bits."""

from pathlib import Path

import numpy as np
import pytest
from evaluations import text_of

from streamer.errors import UsageError
from streamer.measuring.batches import (
    MOST_ROWS,
    Limits,
    Work,
    batch_numbers,
    batches,
    longest_padded,
)
from streamer.measuring.prepared import Records
from streamer.measuring.sequences import TextSequences
from streamer.storage.transaction import Journal
from streamer.streaming.size import ModelSize
from streamer.streaming.values import ROOM

LARGE = ModelSize(
    widest=14336,
    hidden=4096,
    vocabulary=128256,
    attention=0,
    dense=0,
    factors=0,
    products={},
    read=0,
)
RESIDENT = 250 << 20


def text(*lengths: int) -> TextSequences:
    return text_of(np.zeros(n, np.int64) for n in lengths)


def divided(
    lengths: tuple[int, ...], tokens: int, short: int | None = None, one_length: bool = False
) -> list[tuple[int, ...]]:
    """Parts of a text; every sequence is in one of them."""
    found = [*batch_numbers(text(*lengths), tokens, short, one_length)]
    assert sorted(i for part in found for i in part) == [*range(len(lengths))]
    return found


def test_long_sequences_go_together() -> None:
    assert divided((10, 500, 20, 490, 30), 512) == [(1,), (3,), (4, 2, 0)]
    assert divided((10, 500, 20, 490, 30), 1000) == [(1, 3), (4, 2, 0)]
    assert divided((7, 7), 3) == [(0,), (1,)], "at least one sequence"


def test_short_sequences_are_not_padded_to_where_rotary_embeddings_are_others() -> None:
    assert divided((10, 40, 16, 17), 1024, short=16) == [(1, 3), (2, 0)]


def test_sequences_of_one_length_go_together_if_padding_changes_the_model() -> None:
    assert divided((10, 40, 10, 40, 16), 1024, one_length=True) == [(1, 3), (4,), (0, 2)]


def test_every_variant_sees_every_sequence_once() -> None:
    texts = {"general": text(*[512] * 3), "task": text(64, 30)}
    found = batches(texts, 3, LARGE, 1024, False)
    assert [(part.name, part.numbers) for part in found] == [
        ("general", (0, 1)),
        ("general", (2,)),
        ("task", (0, 1)),
    ]
    for part in found:
        assert [group.variant for group in part.groups] == [0, 1, 2]
        assert all(
            group.stream is None and group.rows == part.text.longest * len(part.numbers)
            for group in part.groups
        )


def test_the_longest_padded_sequence_shows_what_padding_does() -> None:
    groups = [text(64), text(40, 40), text(30, 12, 28, 28), text(9, 50, 3), text(50, 4)]
    found = longest_padded(groups)
    assert found is not None
    assert (len(found[0]), found[1]) == (50, 9)
    assert longest_padded(groups[:2]) is None


def test_a_budget_limits_a_sweep() -> None:
    """First what groups share goes, then states to a spool, then the number of tokens that run together."""
    work = Work(fitted=2048, riding=40960, length=512)
    unlimited = work.limits(LARGE, RESIDENT, None)
    least = work.nbytes(LARGE, RESIDENT, Limits(512, 0, True))
    assert unlimited == (MOST_ROWS, ROOM, False)
    found = [work.limits(LARGE, RESIDENT, least + more) for more in range(0, 8 << 30, 64 << 20)]
    assert [
        work.nbytes(LARGE, RESIDENT, one) <= least + i * (64 << 20) for i, one in enumerate(found)
    ] == [True] * len(found)
    kinds = [(one.rows, one.spools) for one in found]
    assert list(dict.fromkeys(kinds)) == [(512, True), (MOST_ROWS, True), (MOST_ROWS, False)]
    assert (found[0].room, found[-1]) == (0, unlimited)


def test_a_budget_for_no_group_names_the_smallest() -> None:
    work = Work(fitted=0, riding=3 * 576, length=512)
    least = work.nbytes(LARGE, RESIDENT, Limits(512, 0, True))
    with pytest.raises(
        UsageError, match=rf"max_memory: 400M is not enough .* it needs {-(-least >> 20)}M"
    ):
        work.limits(LARGE, RESIDENT, 400 << 20)
    work.limits(LARGE, RESIDENT, least)


ARRAYS = {
    "sums": np.array([0.1 + 0.2, np.pi]),
    "loss": np.array([[1e-300, -0.0], [np.nextafter(1, 2), 5e-324]]),
}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return list(a) == list(b) and all(
        a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a
    )


def opened(path: Path) -> tuple[Journal, Records]:
    journal = Journal(path)
    if not len(journal):
        journal.append(b'{"threads": 3}')
    return journal, Records(journal)


def test_a_journal_keeps_them(tmp_path: Path) -> None:
    journal, records = opened(tmp_path / "j")
    assert records.find("0.0 a") is None
    records.add("0.0 a", ARRAYS)
    records.add("0.1 a", {"sums": np.zeros(1)})
    found = records.find("0.0 a")
    assert found is not None
    assert same(dict(found), ARRAYS)
    journal.close()
    with (tmp_path / "j").open("r+b") as file:  # a torn record is none
        file.truncate(file.seek(0, 2) - 1)
    journal, records = opened(tmp_path / "j")
    assert records.threads == 3
    assert records.find("0.1 a") is None
    again = records.find("0.0 a")
    assert again is not None
    assert same(dict(again), ARRAYS)
    journal.close()
