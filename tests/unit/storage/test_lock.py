"""The lock of an output: one run at a time."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest
from faults import failing
from helpers import names
from transactions import take

from streamer.errors import LockedError, OutputError, StorageError
from streamer.storage.lock import locked


def test_the_lock_comes_and_goes(tmp_path: Path) -> None:
    take(tmp_path / "lock")
    assert names(tmp_path) == []

    def fail() -> None:
        with locked(tmp_path / "lock"):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert names(tmp_path) == []


def test_a_lock_file_removed_between_open_and_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder before us ends just then: the lock of a file without a name would exclude nobody."""
    path, real, calls = tmp_path / "lock", fcntl.flock, []

    def flock(fd: int, how: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            path.unlink()
        if len(calls) == 2:
            path.rename(tmp_path / "another")
            path.touch()
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(path):
        assert len(calls) == 3
        with pytest.raises(LockedError):
            take(path)
    assert names(tmp_path) == ["another"]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    take(tmp_path / "lock")
    assert names(tmp_path) == []


def test_a_symlink_where_the_lock_must_be(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to("elsewhere")
    with pytest.raises(OutputError, match="a symlink has the name of the lock; remove it"):
        take(tmp_path / "lock")
    assert names(tmp_path) == ["lock"]


def test_a_lock_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(StorageError, match="lock: cannot lock: Is a directory"):
        take(tmp_path / "lock")
