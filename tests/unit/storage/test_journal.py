"""The journal: what was appended comes back, and what a crash tore ends it."""

import errno
import os
from pathlib import Path

import pytest
from faults import failing
from helpers import names

from streamer.errors import StorageError
from streamer.storage import files
from streamer.storage.transaction import Journal

RECORDS = [b"head", b"", b"x" * 50, b"last"]
HEAD = b'{"a": 1}'


def journal_of(path: Path, records: list[bytes]) -> bytes:
    """Its bytes on disk."""
    journal = Journal(path)
    for record in records:
        journal.append(record)
    journal.close()
    return path.read_bytes()


def contents(path: Path) -> list[bytes]:
    journal = Journal(path)
    out = [journal[i] for i in range(len(journal))]
    journal.close()
    return out


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    raw = journal_of(tmp_path / "j", RECORDS)
    assert len(raw) == sum(40 + len(r) for r in RECORDS)
    assert contents(tmp_path / "j") == RECORDS
    journal = Journal(tmp_path / "j")
    assert journal[2] == RECORDS[2]
    journal.append(b"more")
    assert journal[4] == b"more"
    journal.remove()
    assert names(tmp_path) == []


def test_a_journal_torn_at_any_byte_keeps_its_whole_records(tmp_path: Path) -> None:
    """Whole records are kept, the torn one goes, and the journal is written on from there."""
    path = tmp_path / "j"
    raw = journal_of(path, RECORDS)
    ends = [sum(40 + len(r) for r in RECORDS[:n]) for n in range(len(RECORDS) + 1)]
    for size in range(len(raw) + 1):
        path.write_bytes(raw[:size])
        whole = sum(end <= size for end in ends[1:])
        assert contents(path) == RECORDS[:whole], size
        assert path.stat().st_size == ends[whole] if whole else not path.exists()
        journal = Journal(path)
        journal.append(b"more")
        journal.close()
        assert contents(path) == [*RECORDS[:whole], b"more"]


def test_a_flipped_bit_ends_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "j"
    raw = journal_of(path, [b"head", b"second", b"third"])
    starts = [0, 44, 90]
    for bit in range(0, 8 * len(raw), 9):  # each byte, and each place in a byte
        broken = bytearray(raw)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        hit = sum(start <= bit // 8 for start in starts) - 1
        assert contents(path) == [b"head", b"second", b"third"][:hit], bit


@pytest.mark.parametrize(
    "tail", [bytes(4096), b"\xff" * 4096, b"\xff" * 7, (2**63).to_bytes(8, "little") + bytes(40)]
)
def test_garbage_after_the_records_is_ignored(tmp_path: Path, tail: bytes) -> None:
    """What a power loss may leave of a record: zeros, or anything."""
    path = tmp_path / "j"
    raw = journal_of(path, RECORDS)
    path.write_bytes(raw + tail)
    assert contents(path) == RECORDS
    assert path.read_bytes() == raw


def test_no_call_is_asked_for_more_than_every_system_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pread = os.pread
    pwrite = os.pwrite
    asked = []
    monkeypatch.setattr(files, "MAX_CALL_BYTES", 7)
    monkeypatch.setattr(os, "pread", lambda fd, n, at: asked.append(n) or pread(fd, n, at))
    monkeypatch.setattr(
        os, "pwrite", lambda fd, data, at: asked.append(len(data)) or pwrite(fd, data, at)
    )
    journal_of(tmp_path / "j", RECORDS)
    assert contents(tmp_path / "j") == RECORDS
    assert max(asked) == 7


def test_short_reads_and_writes_of_a_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pread = os.pread
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pread", lambda fd, n, at: pread(fd, min(n, 7), at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    journal_of(tmp_path / "j", RECORDS)
    assert contents(tmp_path / "j") == RECORDS


@pytest.mark.parametrize(
    ("call", "number"), [("pwrite", errno.ENOSPC), ("pwrite", errno.EIO), ("fsync", errno.EIO)]
)
def test_an_append_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    journal = Journal(tmp_path / "j")
    journal.append(b"head")
    with monkeypatch.context() as m:
        m.setattr(os, call, failing(number))
        with pytest.raises(StorageError, match="j: cannot append to the journal: "):
            journal.append(b"lost")
    assert len(journal) == 1
    journal.append(b"second")
    journal.close()
    assert contents(tmp_path / "j") == [b"head", b"second"]


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("call", ["open", "write", "fsync", "rename"])
def test_starting_over_replaces_the_journal_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, nth: int
) -> None:
    """Whichever call fails, there is the old journal or the new head."""
    path = tmp_path / "j"
    real = getattr(os, call)
    calls = []
    journal_of(path, RECORDS)
    journal = Journal(path)

    def dies(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == nth:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args, **kwargs)

    failed = False
    with monkeypatch.context() as m:
        m.setattr(os, call, dies)
        try:
            journal.begin({"a": 1})
        except StorageError:
            failed = True
    journal.close()
    assert failed == (len(calls) >= nth)
    assert contents(path) in ((RECORDS, [HEAD]) if failed else ([HEAD],))
    assert names(tmp_path) == ["j"]


def test_a_journal_without_a_record_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a full disk."""
    journal = Journal(tmp_path / "j")
    with monkeypatch.context() as m:
        m.setattr(os, "pwrite", failing(errno.ENOSPC))
        with pytest.raises(StorageError, match="No space left"):
            journal.begin({"a": 1})
    journal.close()
    assert names(tmp_path) == []


def test_a_journal_that_vanished_is_as_good_as_removed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.append(b"head")
    (tmp_path / "j").unlink()
    journal.remove()
    assert names(tmp_path) == []


def test_what_a_killed_start_over_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / f".j.{'0' * 16}.partial").touch()
    journal = Journal(tmp_path / "j")
    journal.append(b"head")
    journal.close()
    assert names(tmp_path) == ["j"]


def test_a_journal_is_not_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"precious")
    (tmp_path / "j").symlink_to("elsewhere")
    with pytest.raises(
        StorageError, match="j: cannot open the journal: Too many levels of symbolic links"
    ):
        Journal(tmp_path / "j")
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"


def test_a_new_journals_name_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "fsync_directory", synced.append)
    journal = Journal(tmp_path / "j")
    journal.append(b"head")
    assert synced == [tmp_path]
    journal.append(b"second")
    assert synced == [tmp_path]
    journal.close()
