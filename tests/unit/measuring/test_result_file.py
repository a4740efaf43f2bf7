"""Records of a run are read as the same bits, and found by what was asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from streamer.measuring.result_file import JournalRecords, Records, pack, unpack
from streamer.storage.journal import Journal

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
