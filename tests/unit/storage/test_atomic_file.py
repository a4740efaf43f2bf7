"""Files that appear whole under their name, or not at all; large pieces are hashed and written by threads, and do not stay in the cache."""

import ctypes
import errno
import hashlib
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from faults import failing
from helpers import names

from streamer.errors import StorageError
from streamer.storage import atomic_file, files
from streamer.storage.atomic_file import (
    LAG_BYTES,
    PARTIAL,
    QUEUE,
    THREADED_BYTES,
    AtomicFile,
    BufferRing,
    partials_of,
    remove_partials,
    write_atomic,
)
from streamer.storage.files import fsync_directory, make_directory
from streamer.storage.local_source import LocalSource
from streamer.storage.transaction import Journal

ADVICE = "run the same command again once the cause is gone"


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    old = os.umask(0o022)
    yield os.umask
    os.umask(old)


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with AtomicFile(path, 6) as f:
        f.write(b"one")
        assert not path.exists()
        (partial,) = names(tmp_path)
        assert PARTIAL.match(partial)
        f.write(memoryview(bytearray(b"two")))
        assert f.written == 6
        f.complete()
        assert (tmp_path / partial).read_bytes() == b"onetwo"
        assert not path.exists()
    assert f.sha256 == hashlib.sha256(b"onetwo").hexdigest()
    assert path.read_bytes() == b"onetwo"
    assert names(tmp_path) == ["f"]


def test_nothing_and_views_of_any_type(tmp_path: Path) -> None:
    write_atomic(tmp_path / "empty", b"")
    assert (tmp_path / "empty").read_bytes() == b""
    with AtomicFile(tmp_path / "f", 8) as f:
        f.write(memoryview(b"12345678").cast("H"))
        f.write(b"")
    assert (tmp_path / "f").read_bytes() == b"12345678"


@pytest.mark.parametrize("kind", [ValueError, KeyError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_file_and_no_partial(
    tmp_path: Path, kind: type[BaseException]
) -> None:
    """Whatever it is, and after the file is complete too."""
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def write() -> None:
        with AtomicFile(path, 3) as f:
            f.write(b"new")
            if kind is KeyError:
                f.complete()
            raise kind

    with pytest.raises(kind):
        write()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize("data", [b"", b"12", b"1234"])
def test_the_byte_count_must_be_the_planned_one(tmp_path: Path, data: bytes) -> None:
    def write() -> None:
        with AtomicFile(tmp_path / "f", 3) as f:
            f.write(data)

    with pytest.raises(StorageError) as caught:
        write()
    assert (
        str(caught.value)
        == f"{tmp_path}/f: expected 3 bytes, wrote {len(data)}; please report this"
    )
    assert names(tmp_path) == []


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_follows_the_umask(
    tmp_path: Path, umask: Callable[[int], int], mask: int, mode: int
) -> None:
    umask(mask)
    write_atomic(tmp_path / "f", b"x")
    journal = Journal(tmp_path / "journal")
    journal.append(b"head")
    journal.begin({})
    journal.close()
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == mode, path


def test_a_symlink_at_the_target_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"old")
    (tmp_path / "f").symlink_to("elsewhere")
    write_atomic(tmp_path / "f", b"new")
    assert not (tmp_path / "f").is_symlink()
    assert (tmp_path / "f").read_bytes() == b"new"
    assert (tmp_path / "elsewhere").read_bytes() == b"old"


@pytest.mark.parametrize("what", ["symlink", "dangling", "file"])
def test_what_stands_at_the_partials_name_is_neither_followed_nor_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(atomic_file.secrets, "token_hex", lambda n: "0" * 2 * n)
    partial = tmp_path / f".f.{'0' * 16}.partial"
    elsewhere = tmp_path / "elsewhere"
    if what != "dangling":
        elsewhere.write_bytes(b"old")
    if what == "file":
        elsewhere.rename(partial)
    else:
        partial.symlink_to(elsewhere)
    before = names(tmp_path)
    with pytest.raises(
        StorageError, match=r"f: cannot create: File exists; run the same command again"
    ):
        write_atomic(tmp_path / "f", b"new")
    assert names(tmp_path) == before
    if what != "dangling":
        assert partial.read_bytes() == b"old"


def test_short_writes_are_written_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:3]))
    write_atomic(tmp_path / "f", bytes(range(100)))
    assert (tmp_path / "f").read_bytes() == bytes(range(100))


@pytest.mark.parametrize(
    ("call", "number", "words"),
    [
        ("open", errno.EACCES, f"cannot create: Permission denied; {ADVICE}"),
        (
            "posix_fallocate",
            errno.ENOSPC,
            "cannot create: No space left on device; free some space, then run",
        ),
        (
            "posix_fallocate",
            errno.EDQUOT,
            "cannot create: Disk quota exceeded; free some space, then run",
        ),
        (
            "posix_fallocate",
            errno.EFBIG,
            "cannot create: File too large; free some space, then run",
        ),
        ("write", errno.ENOSPC, "cannot write: No space left on device; free some space, then run"),
        ("write", errno.EIO, f"cannot write: Input/output error; {ADVICE}"),
        ("fsync", errno.EIO, f"cannot finish: Input/output error; {ADVICE}"),
        ("close", errno.EIO, f"cannot finish: Input/output error; {ADVICE}"),
        ("rename", errno.EIO, f"cannot finish: Input/output error; {ADVICE}"),
    ],
)
def test_a_system_that_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, words: str
) -> None:
    """The old file stays, no partial is left, and the one line says what to do."""
    path = tmp_path / "f"
    path.write_bytes(b"old")
    real_close = os.close

    def close(fd: int) -> None:  # a close that fails has closed all the same
        real_close(fd)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as m:
        m.setattr(os, call, close if call == "close" else failing(number))
        with pytest.raises(StorageError) as caught:
            write_atomic(path, b"new")
    assert str(caught.value).startswith(f"{path}: {words}")
    assert caught.value.exit_code == 6
    assert names(tmp_path) == ["f"]
    assert path.read_bytes() == b"old"
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_failed_fsync_is_not_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel forgets a failed write-back: a second fsync would succeed and prove nothing."""
    calls: list[int] = []

    def fsync(fd: int) -> None:
        calls.append(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StorageError, match="cannot finish"):
        write_atomic(tmp_path / "f", b"new")
    assert len(calls) == 1
    assert names(tmp_path) == []


def test_data_is_durable_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    for call in ("write", "fsync", "rename"):
        real = getattr(os, call)

        def watched(*args: object, call: str = call, real: Callable[..., object] = real) -> object:
            of = os.readlink(f"/proc/self/fd/{args[0]}") if call != "rename" else str(args[0])
            log.append(f"{call} {'partial' if of.endswith('.partial') else 'directory'}")
            return real(*args)

        monkeypatch.setattr(os, call, watched)
    write_atomic(tmp_path / "f", b"new")
    assert log == ["write partial", "fsync partial", "rename partial", "fsync directory"]


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot create: No such file or directory"):
        write_atomic(tmp_path / "missing" / "f", b"new")


def test_own_partials_only_are_removed(tmp_path: Path) -> None:
    digits = "0123456789abcdef"
    ours = f".f.{digits}.partial"
    others = [
        f".g.{digits}.partial",
        f".f.{digits[:-1]}.partial",
        f"f.{digits}.partial",
        f".f.{digits}.partial2",
        ".f",
    ]
    for name in (ours, *others):
        (tmp_path / name).touch()
    (tmp_path / f".f.{digits[::-1]}.partial").symlink_to("elsewhere")
    before = names(tmp_path)
    assert partials_of(tmp_path, {"f"}) == [tmp_path / ours]
    remove_partials(tmp_path, {"f"})
    assert set(before) - set(names(tmp_path)) == {ours}


def test_a_partial_that_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f".f.{'0' * 16}.partial").touch()
    monkeypatch.setattr(os, "unlink", failing(errno.EPERM))
    with pytest.raises(
        StorageError,
        match=r"\.partial: cannot remove: Operation not permitted; run the same command",
    ):
        remove_partials(tmp_path, {"f"})


def test_new_directories_are_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "fsync_directory", synced.append)
    make_directory(tmp_path / "a" / "b")
    make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert synced == [tmp_path, tmp_path / "a"]


def test_a_file_where_a_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(StorageError, match=r"a/b: cannot create: Not a directory"):
        make_directory(tmp_path / "a" / "b")
    with pytest.raises(OSError, match="Not a directory"):
        fsync_directory(tmp_path / "a")


LARGE = 2 * THREADED_BYTES
STEP_BYTES = 1 << 20


def writers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("streamer write")]


def slow_write(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make each large write take long enough for the caller to be ahead; the descriptors it wrote to."""
    real = os.write
    seen = []

    def write(fd: int, data: memoryview) -> int:
        if len(data) >= THREADED_BYTES:
            time.sleep(0.05)
            seen.append(fd)
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    return seen


def test_pieces_of_every_size_arrive_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_write(monkeypatch)
    sizes = [5, LARGE, LARGE, 3, LARGE, THREADED_BYTES, THREADED_BYTES - 1, 0, LARGE]
    pieces = [bytes([65 + i]) * size for i, size in enumerate(sizes)]
    with AtomicFile(tmp_path / "f", sum(sizes)) as f:
        for i, piece in enumerate(pieces):
            f.write(piece)
            assert f.written == sum(sizes[: i + 1])
        assert (
            f.sha256 == hashlib.sha256(b"".join(pieces)).hexdigest()
        )  # of all of it, the piece in hand too
    assert (tmp_path / "f").read_bytes() == b"".join(pieces)
    assert writers() == []


def test_no_write_is_asked_for_more_than_every_system_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    asked = []
    monkeypatch.setattr(files, "MAX_CALL_BYTES", THREADED_BYTES)
    monkeypatch.setattr(os, "write", lambda fd, data: asked.append(len(data)) or real(fd, data))
    piece = os.urandom(2 * THREADED_BYTES + 5)
    with AtomicFile(tmp_path / "f", len(piece)) as f:
        f.write(piece)
    assert (tmp_path / "f").read_bytes() == piece
    assert asked == [THREADED_BYTES, THREADED_BYTES, 5]


def test_a_ring_of_one_buffer_more_than_is_in_hand_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_write(monkeypatch)
    ring = BufferRing(LARGE)
    rounds = 3 * (QUEUE + 1)
    with AtomicFile(tmp_path / "f", rounds * (LARGE + 1)) as f:
        for i in range(rounds):
            piece = ring.lease()
            piece.view[:] = bytes([i]) * LARGE
            f.append(piece)
            small = bytearray([i])
            f.write(small)
            small[0] = 255  # a small piece may be changed at once
    assert (tmp_path / "f").read_bytes() == b"".join(
        bytes([i]) * (LARGE + 1) for i in range(rounds)
    )


def test_a_slow_disk_holds_the_caller_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = slow_write(monkeypatch)
    with AtomicFile(tmp_path / "f", 10 * LARGE) as f:
        for i in range(10):
            f.write(bytes(LARGE))
            assert i + 1 - len(seen) <= QUEUE


@pytest.mark.parametrize("at", [1, 2])
def test_what_the_system_refuses_is_raised_though_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    real = os.write
    calls = []

    def write(fd: int, data: memoryview) -> int:
        calls.append(len(data))
        if len(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    with (  # noqa: PT012  # the error comes with the next call, or at the end
        pytest.raises(
            StorageError, match=r"f: cannot write: No space left on device; free some space"
        ),
        AtomicFile(tmp_path / "f", 2 * LARGE) as f,
    ):
        f.write(bytes(LARGE))
        f.write(bytes(LARGE))
    assert list(tmp_path.iterdir()) == []
    assert writers() == []


def test_a_caller_that_fails_leaves_no_thread_that_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = slow_write(monkeypatch)
    with pytest.raises(KeyError), AtomicFile(tmp_path / "f", LARGE) as f:  # noqa: PT012  # what is tested is the block
        f.write(bytes(LARGE))
        raise KeyError("the caller's")
    assert len(seen) == 1  # it was written before the descriptor was closed
    assert writers() == []
    assert list(tmp_path.iterdir()) == []


MOST_LEFT = 1 / 8
"""Share of a file that may stay in the cache: the system keeps pages that are busy, such as those of a commit of its own journal."""


def cached(path: Path) -> list[bool]:
    """Whether each page of a file lies in the cache. Reads that do not wait would bring pages in."""
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as memory:
        pages = (ctypes.c_ubyte * -(-len(memory) // mmap.PAGESIZE))()
        address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
        if mincore(address, ctypes.c_size_t(len(memory)), pages):
            raise OSError(ctypes.get_errno(), "mincore")
    return [bool(page & 1) for page in pages]


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    """A file on the disk that the cache does not hold."""
    path = tmp_path / "large"
    path.write_bytes(os.urandom(STEP_BYTES) * 16)
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    try:
        if any(cached(path)):
            pytest.skip("this file system keeps its files in memory")
    except OSError:
        pytest.skip("the system does not tell what the cache holds")
    return path


def test_what_is_read_is_dropped_behind(cold: Path) -> None:
    source = LocalSource(cold, "pread")
    piece = memoryview(bytearray(STEP_BYTES // 2 - 1))
    for at in range(0, 16 * STEP_BYTES, len(piece)):
        part = piece[: 16 * STEP_BYTES - at]
        source.read_into(part, at)
        source.release(at, at + len(part))
    source.close()
    assert np.mean(cached(cold)) <= MOST_LEFT


def test_a_large_file_is_not_left_in_the_cache(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = LAG_BYTES + 8 * LARGE
    path = cold.parent / "written"
    with AtomicFile(path, size) as f:
        for _ in range(size // LARGE):
            f.write(bytes(LARGE))
    assert np.mean(cached(path)) <= MOST_LEFT
    with AtomicFile(path, LARGE) as f:
        f.write(bytes(LARGE))
    assert np.mean(cached(path)) >= 1 - MOST_LEFT  # a small one is
