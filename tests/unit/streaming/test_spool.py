"""Tensors in a file without a name."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from streamer.errors import StorageError
from streamer.streaming.spool import Spool


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    tensors = [
        torch.randn(3, 4),
        torch.randn(5).double(),
        torch.arange(6).view(2, 3).T,
        torch.zeros(0, 2),
        torch.tensor(1.5),
    ]
    first = spool.write(tensors)
    second = spool.write([torch.ones(2)])
    for found, tensor in zip(spool.read(first), tensors, strict=True):
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
    assert torch.equal(spool.read(second)[0], torch.ones(2))
    assert list(tmp_path.iterdir()) == []


def opened(
    path: Path, flags: int, mode: int = 0o777, real: Callable[..., int] = os.open, **options: int
) -> int:
    """Open a file, unless that makes a name."""
    assert not flags & os.O_CREAT, f"{path} has a name"
    return real(path, flags, mode, **options)


def without_unnamed_files(
    path: Path, flags: int, mode: int = 0o777, real: Callable[..., int] = os.open, **options: int
) -> int:
    """Open a file as on a file system that has no unnamed ones."""
    if flags & os.O_TMPFILE == os.O_TMPFILE:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    return real(path, flags, mode, **options)


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="this system has no unnamed files")
@pytest.mark.parametrize("way", [opened, without_unnamed_files])
def test_the_file_has_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Callable[..., int]
) -> None:
    """It never has one, which a power cut could leave behind, or not for long, if the file system has no unnamed files."""
    monkeypatch.setattr(os, "open", way)
    spool = Spool(tmp_path)
    assert torch.equal(spool.read(spool.write([torch.ones(3)]))[0], torch.ones(3))
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_after_a_rewind_lies_where_the_first_did(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    before = spool.write([torch.ones(100)])
    spool.end = 0
    assert spool.write([torch.zeros(100)]) == before
    assert not spool.read(before)[0].any()


def test_a_full_disk_is_told_from_other_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path)

    def full(*args: object) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(
        StorageError,
        match=r"cannot write a temporary file: No space left on device; free some space",
    ):
        spool.write([torch.ones(2)])
    with pytest.raises(StorageError, match="cannot make a temporary file"):
        Spool(tmp_path / "missing")
