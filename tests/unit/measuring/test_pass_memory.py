"""Passes: sequences and variants are divided, and records of their sums are read as the same bits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from streamer.errors import UsageError
from streamer.measuring.passes import checked_tokens, longest_padded
from streamer.measuring.result_file import JournalRecords, Records, pack, unpack
from streamer.measuring.sequences import TextSequences
from streamer.measuring.task import Pass, measured_bytes, pass_bytes, plan_passes
from streamer.storage.journal import Journal
from streamer.streaming.model import ModelSize

LARGE = ModelSize(widest=14336, hidden=4096, vocabulary=128256, attention=0, dense=0, factors=0, products={}, read=0)
RESIDENT = 250 << 20


def text(*lengths: int) -> TextSequences:
    return TextSequences.of(np.zeros(n, np.int64) for n in lengths)


def check_complete(passes: list[Pass], variants: int, texts: dict[str, TextSequences]) -> None:
    """Every variant sees every sequence once."""
    seen = [(p.text, s, v) for p in passes for s in p.sequences for v in p.variants]
    assert len(seen) == len(set(seen))
    assert set(seen) == {(n, s, v) for n, t in texts.items() for s in range(len(t.ids)) for v in range(1, variants)}


def test_long_sequences_go_together() -> None:
    texts = {"general": text(10, 500, 20, 490, 30), "task": text(100)}
    passes = plan_passes(texts, 8, LARGE, RESIDENT, None, False)
    check_complete(passes, 8, texts)
    assert [p.sequences for p in passes] == [(1,), (3,), (4, 2, 0), (0,)]


def test_short_sequences_are_not_padded_to_where_rotary_embeddings_are_others() -> None:
    texts = {"general": text(10, 40, 16, 17), "task": text(12, 16)}
    passes = plan_passes(texts, 8, replace(LARGE, short=16), RESIDENT, None, False)
    check_complete(passes, 8, texts)
    assert [p.sequences for p in passes] == [(1, 3), (2, 0), (1, 0)]


def test_sequences_of_one_length_go_together_if_padding_changes_the_model() -> None:
    texts = {"general": text(10, 40, 10, 40, 16), "task": text(12, 12)}
    passes = plan_passes(texts, 8, LARGE, RESIDENT, None, True)
    check_complete(passes, 8, texts)
    assert [p.sequences for p in passes] == [(1, 3), (4,), (0, 2), (0, 1)]
    padded = plan_passes(texts, 8, LARGE, RESIDENT, None, False)
    assert measured_bytes(passes, texts, LARGE, RESIDENT) < measured_bytes(padded, texts, LARGE, RESIDENT)


def test_the_longest_padded_sequence_shows_what_padding_does() -> None:
    groups = [text(64), text(40, 40), text(30, 12, 28, 28), text(9, 50, 3), text(50, 4)]
    found = longest_padded(groups)
    assert found is not None
    assert (len(found[0]), found[1], checked_tokens(groups)) == (50, 9, 59)
    assert checked_tokens(groups[:2]) == 0


def test_a_budget_divides_the_variants_too() -> None:
    texts = {"general": text(*[512] * 3), "task": text(64)}
    for budget in (900 << 20, 1200 << 20, 2000 << 20):
        passes = plan_passes(texts, 17, LARGE, RESIDENT, budget, False)
        check_complete(passes, 17, texts)
        assert measured_bytes(passes, texts, LARGE, RESIDENT) <= budget
    few, many = (len(plan_passes(texts, 17, LARGE, RESIDENT, budget, False)) for budget in (3000 << 20, 900 << 20))
    assert few < many


def test_a_budget_for_no_pass_names_the_smallest() -> None:
    texts = {"general": text(512), "task": text(64)}
    least = pass_bytes(LARGE, RESIDENT, 2 * 512, 512)
    with pytest.raises(UsageError, match=rf"max_memory: 400M is not enough .* it needs {-(-least >> 20)}M"):
        plan_passes(texts, 3, LARGE, RESIDENT, 400 << 20, False)
    plan_passes(texts, 3, LARGE, RESIDENT, least, False)


ARRAYS = {"sums": np.array([0.1 + 0.2, np.pi]), "loss": np.array([[1e-300, -0.0], [np.nextafter(1, 2), 5e-324]])}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return list(a) == list(b) and all(a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a)


def test_arrays_are_read_as_the_same_bits() -> None:
    name, found = unpack(pack("0.0 a", ARRAYS))
    assert name == "0.0 a"
    assert same(found, ARRAYS)


def opened(path: Path) -> tuple[Journal, JournalRecords]:
    journal = Journal(path)
    if not len(journal):
        journal.append(b"{}")
    return journal, JournalRecords(journal, 3)


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


def test_in_memory_there_is_nothing_to_find() -> None:
    records = Records()
    records.add("0.0 a", ARRAYS)
    assert records.find("0.0 a") is None
