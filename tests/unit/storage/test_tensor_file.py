"""Shards that are no files, that shrink, that change, and reads that go wrong."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import failing
from helpers import view
from two_shards import MODES, SHARDS, refusal

from streamer.errors import FormatError, InputChangedError, StorageError
from streamer.storage.buffers import gather
from streamer.storage.byte_source import LocalSource
from streamer.storage.checkpoint import Checkpoint, open_checkpoint
from streamer.storage.tensor_file import IOMode


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "a Git LFS pointer: run `git lfs pull`",
        ),
        (b"<html><title>503 Service Unavailable</title></html>", "a web page"),
        (b"PK\x03\x04" + bytes(100), "a pickle: convert it to safetensors"),
        (b"", "expected a safetensors file, found 0 B"),
        (bytes(1000), "bad safetensors header"),
    ],
)
def test_something_else_where_a_shard_should_be(base: Path, content: bytes, words: str) -> None:
    (base / SHARDS[1]).write_bytes(content)
    message = refusal(FormatError, base)
    assert message.startswith(f"{base / SHARDS[1]}: ")
    assert words in message
    assert re.search(r"(get (it|the file) again|`git lfs pull`|convert it to safetensors)$", message)


def test_a_sparse_tail(base: Path) -> None:
    """A download that reserved its space: the size fits, the data is zeros; that no header can show. A byte less does."""
    size = (base / SHARDS[1]).stat().st_size
    os.truncate(base / SHARDS[1], 1000)
    os.truncate(base / SHARDS[1], size)
    assert bytes(view(open_checkpoint(base), "c")[-4:]) == bytes(4)
    os.truncate(base / SHARDS[1], size - 1)
    assert "the file is truncated; get it again" in refusal(FormatError, base)


def test_shards_that_are_no_files(base: Path) -> None:
    (base / SHARDS[1]).unlink()
    os.mkfifo(base / SHARDS[1])
    words = "expected a safetensors file, found something that is not a regular file"
    assert words in refusal(FormatError, base)
    (base / SHARDS[1]).unlink()
    (base / SHARDS[1]).mkdir()
    assert words in refusal(FormatError, base)


def test_a_shard_that_cannot_be_opened(base: Path) -> None:
    (base / SHARDS[1]).unlink()
    (base / SHARDS[1]).symlink_to(SHARDS[1])
    assert "expected a safetensors file, found a link that leads to itself" in refusal(FormatError, base)


# Files that change under us -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("io", MODES)
def test_a_file_that_shrinks_is_an_error(base: Path, io: IOMode) -> None:
    checkpoint = open_checkpoint(base, io)
    file, info = checkpoint.locate("c")
    os.truncate(base / SHARDS[1], 5000)
    words = f"{base / SHARDS[1]}: shrank to 5.0 kB during the run; get the file again"
    for read in (lambda: file.view(info), lambda: gather(file.chunks(info), info.nbytes), file.sample):
        with pytest.raises(InputChangedError) as caught:
            read()
        assert str(caught.value) == words
        assert caught.value.exit_code == 8
    start = 3000  # what is left can still be read
    assert len(bytes(file.view(info, start, start + 100))) == 100
    with pytest.raises(InputChangedError, match="changed since the run began"):
        checkpoint.check_unchanged()


def test_a_file_that_shrinks_between_check_and_map(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(base)
    file, info = checkpoint.locate("c")
    real = LocalSource._check_size

    def check(self: LocalSource, wanted: int) -> None:
        real(self, wanted)
        os.truncate(base / SHARDS[1], 100)

    monkeypatch.setattr(LocalSource, "_check_size", check)
    with pytest.raises(InputChangedError, match="shrank to 100 B"):
        file.view(info)


def touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def replace(path: Path) -> None:
    stat = path.stat()
    shutil.copy(path, path.with_name("copy"))
    os.utime(path.with_name("copy"), ns=(stat.st_atime_ns, stat.st_mtime_ns))
    path.with_name("copy").replace(path)


def grow(path: Path) -> None:
    with path.open("ab") as f:
        f.write(b"x")


@pytest.mark.parametrize("change", [touch, replace, grow, Path.unlink])
@pytest.mark.parametrize("shard", SHARDS)
def test_check_unchanged(base: Path, change: Callable[[Path], None], shard: str) -> None:
    checkpoint = open_checkpoint(base)
    checkpoint.check_unchanged()
    before = bytes(view(checkpoint, "c"))
    change(base / shard)
    with pytest.raises(InputChangedError) as caught:
        checkpoint.check_unchanged()
    words = (
        "vanished during the run"
        if change is Path.unlink
        else "changed since the run began; start again, and leave the inputs unchanged"
    )
    assert str(caught.value).startswith(f"{base / shard}: {words}")
    assert bytes(view(checkpoint, "c")) == before  # the open file is still the one that was planned


def test_check_unchanged_follows_a_link_to_another_file(base: Path, tmp_path: Path) -> None:
    path = base / SHARDS[1]
    for name in ("one", "two"):
        shutil.copy(path, tmp_path / name)
    path.unlink()
    path.symlink_to(tmp_path / "one")
    checkpoint = open_checkpoint(base)
    checkpoint.check_unchanged()
    path.unlink()
    path.symlink_to(tmp_path / "two")
    with pytest.raises(InputChangedError, match="changed since the run began"):
        checkpoint.check_unchanged()


# A disk that fails --------------------------------------------------------------------------------------------------


def everything(checkpoint: Checkpoint) -> list[bytes]:
    out = []
    for name in checkpoint.weight_map:
        file, info = checkpoint.locate(name)
        out += [bytes(file.view(info)), bytes(gather(file.chunks(info, 777), info.nbytes))]
    return out


@pytest.mark.parametrize("io", MODES)
def test_short_reads_are_read_on(base: Path, monkeypatch: pytest.MonkeyPatch, io: IOMode) -> None:
    checkpoint = open_checkpoint(base, io)
    expected, sample = everything(checkpoint), checkpoint.identity()
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:13]], at))
    assert everything(checkpoint) == expected
    assert checkpoint.identity() == sample


def test_a_read_error(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", failing(errno.EIO))
    with pytest.raises(StorageError) as caught:
        view(open_checkpoint(base, "pread"), "c")
    words = "cannot read: Input/output error; run the same command again once the cause is gone"
    assert str(caught.value) == f"{base / SHARDS[1]}: {words}"


def test_a_read_that_brings_nothing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error, not an endless loop."""
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(StorageError, match=f"{SHARDS[1]}: the file ended early at byte "):
        view(open_checkpoint(base, "pread"), "c")


def test_a_map_that_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamer.storage.byte_source.mmap.mmap", failing(errno.ENODEV))
    with pytest.raises(StorageError, match=r"cannot map 16\.0 kB: No such device; try --io pread"):
        view(open_checkpoint(base), "c")
