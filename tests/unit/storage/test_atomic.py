"""Files that appear whole or not at all, the lock, and the journal: on real files, with a system that fails on call."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from streamer.errors import LockedError, OutputError, StorageError
from streamer.storage import atomic_file, files
from streamer.storage import journal as journal_module
from streamer.storage.atomic_file import PARTIAL, AtomicFile, partials_of, remove_partials, write_atomic
from streamer.storage.files import fsync_directory, make_directory
from streamer.storage.journal import Journal
from streamer.storage.lock import locked

ADVICE = "run the same command again once the cause is gone"


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def failing(number: int) -> Callable[..., int]:
    """A system call that fails with this errno, each time."""

    def call(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    return call


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    old = os.umask(0o022)
    yield os.umask
    os.umask(old)


# AtomicFile ---------------------------------------------------------------------------------------------------------


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "f"
    seen: list[bytes] = []
    with AtomicFile(path, 6, lambda fd: seen.append(os.pread(fd, 99, 0))) as f:
        f.write(b"one")
        assert not path.exists()
        (partial,) = names(tmp_path)
        assert PARTIAL.match(partial)
        f.write(memoryview(bytearray(b"two")))
        assert f.written == 6
    assert seen == [b"onetwo"]
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


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_file_and_no_partial(tmp_path: Path, kind: type[BaseException]) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def write() -> None:
        with AtomicFile(path, 3) as f:
            f.write(b"new")
            raise kind

    with pytest.raises(kind):
        write()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["f"]


def test_the_check_can_stop_the_rename(tmp_path: Path) -> None:
    def check(_: int) -> None:
        raise KeyError("no")

    def write() -> None:
        with AtomicFile(tmp_path / "f", 3, check) as f:
            f.write(b"new")

    with pytest.raises(KeyError):
        write()
    assert names(tmp_path) == []


@pytest.mark.parametrize("data", [b"", b"12", b"1234"])
def test_the_byte_count_must_be_the_planned_one(tmp_path: Path, data: bytes) -> None:
    def write() -> None:
        with AtomicFile(tmp_path / "f", 3) as f:
            f.write(data)

    with pytest.raises(StorageError) as caught:
        write()
    assert str(caught.value) == f"{tmp_path}/f: expected to write 3 bytes, wrote {len(data)}; please report this"
    assert names(tmp_path) == []


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_follows_the_umask(tmp_path: Path, umask: Callable[[int], int], mask: int, mode: int) -> None:
    umask(mask)
    write_atomic(tmp_path / "f", b"x")
    journal = Journal(tmp_path / "journal")
    journal.append(b"head")
    journal.clear()
    journal.append(b"head")
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
    partial, elsewhere = tmp_path / f".f.{'0' * 16}.partial", tmp_path / "elsewhere"
    if what != "dangling":
        elsewhere.write_bytes(b"old")
    if what == "file":
        elsewhere.rename(partial)
    else:
        partial.symlink_to(elsewhere)
    before = names(tmp_path)
    with pytest.raises(StorageError, match=r"f: cannot create: File exists; run the same command again"):
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
        ("posix_fallocate", errno.ENOSPC, "cannot create: No space left on device; free some space, then run"),
        ("posix_fallocate", errno.EDQUOT, "cannot create: Disk quota exceeded; free some space, then run"),
        ("posix_fallocate", errno.EFBIG, "cannot create: File too large; free some space, then run"),
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


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_that_cannot_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(number))
    write_atomic(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"


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


def test_no_room_for_a_file(tmp_path: Path) -> None:
    """A real limit, in a process of its own: the file is refused before a byte is written, and nothing is left."""
    program = f"""
import resource, signal
from pathlib import Path
from streamer.errors import StorageError
from streamer.storage.atomic_file import AtomicFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for size, reserved in ((2000, True), (500, False)):
    try:
        with AtomicFile(Path({str(tmp_path / "f")!r}), size) as f:
            f.write(bytes(2000))
    except StorageError as e:
        print(e)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    advice = "File too large; free some space, then run the same command again"
    assert done.stdout.splitlines() == [
        f"{tmp_path}/f: cannot create: {advice}",
        f"{tmp_path}/f: cannot write: {advice}",
    ]
    assert done.stderr == ""
    assert names(tmp_path) == []


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot create: No such file or directory"):
        write_atomic(tmp_path / "missing" / "f", b"new")


def test_own_partials_only_are_removed(tmp_path: Path) -> None:
    digits = "0123456789abcdef"
    ours = f".f.{digits}.partial"
    others = [f".g.{digits}.partial", f".f.{digits[:-1]}.partial", f"f.{digits}.partial", f".f.{digits}.partial2", ".f"]
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
    with pytest.raises(StorageError, match=r"\.partial: cannot remove: Operation not permitted; run the same command"):
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


# The lock -----------------------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from streamer.storage.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(path: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock until its stdin ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def take(path: Path) -> None:
    with locked(path):
        assert path.exists()


def test_the_lock_comes_and_goes(tmp_path: Path) -> None:
    take(tmp_path / "lock")
    assert names(tmp_path) == []

    def fail() -> None:
        with locked(tmp_path / "lock"):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert names(tmp_path) == []


def test_a_lock_held_by_another_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path) as other:
        with pytest.raises(LockedError) as caught:
            take(path)
        assert str(caught.value) == f"{tmp_path}: another run is writing here; wait for it, or choose another output"
        assert caught.value.exit_code == 5
        assert path.exists()
        other.communicate()
        assert other.returncode == 0
    take(path)
    assert names(tmp_path) == []


def test_the_lock_of_a_dead_process_does_not_hold(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path) as other:
        other.send_signal(signal.SIGKILL)
        other.wait(10)
    assert path.exists()
    take(path)
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
    with pytest.raises(OutputError, match="a symlink stands where the lock must be; remove it"):
        take(tmp_path / "lock")
    assert names(tmp_path) == ["lock"]


def test_a_lock_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(StorageError, match="lock: cannot lock: Is a directory"):
        take(tmp_path / "lock")


# The journal --------------------------------------------------------------------------------------------------------

RECORDS = [b"head", b"", b"x" * 50, b"last"]


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


def test_records_come_back(tmp_path: Path) -> None:
    raw = journal_of(tmp_path / "j", RECORDS)
    assert len(raw) == sum(40 + len(r) for r in RECORDS)
    assert contents(tmp_path / "j") == RECORDS
    journal = Journal(tmp_path / "j")
    assert journal[2] == RECORDS[2]
    journal.append(b"more")
    assert journal[4] == b"more"
    journal.remove()
    assert names(tmp_path) == []


def test_torn_at_every_byte(tmp_path: Path) -> None:
    """Whole records are kept, the torn one goes, and the journal is written on from there."""
    path = tmp_path / "j"
    raw = journal_of(path, RECORDS)
    ends = [sum(40 + len(r) for r in RECORDS[:n]) for n in range(len(RECORDS) + 1)]
    for size in range(len(raw) + 1):
        path.write_bytes(raw[:size])
        whole = sum(end <= size for end in ends[1:])
        assert contents(path) == RECORDS[:whole], size
        assert path.stat().st_size == ends[whole]
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


@pytest.mark.parametrize("tail", [bytes(4096), b"\xff" * 4096, b"\xff" * 7, (2**63).to_bytes(8, "little") + bytes(40)])
def test_garbage_after_the_records(tmp_path: Path, tail: bytes) -> None:
    """What a power loss may leave of a record: zeros, or anything."""
    path = tmp_path / "j"
    raw = journal_of(path, RECORDS)
    path.write_bytes(raw + tail)
    assert contents(path) == RECORDS
    assert path.read_bytes() == raw


def test_short_reads_and_writes_of_a_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread, pwrite = os.pread, os.pwrite
    monkeypatch.setattr(os, "pread", lambda fd, n, at: pread(fd, min(n, 7), at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    journal_of(tmp_path / "j", RECORDS)
    assert contents(tmp_path / "j") == RECORDS


@pytest.mark.parametrize(("call", "number"), [("pwrite", errno.ENOSPC), ("pwrite", errno.EIO), ("fsync", errno.EIO)])
def test_an_append_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
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
    path, real, calls = tmp_path / "j", getattr(os, call), []
    journal_of(path, RECORDS)
    journal = Journal(path)
    journal.clear()
    assert len(journal) == 0

    def dies(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == nth:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args, **kwargs)

    failed = False
    with monkeypatch.context() as m:
        m.setattr(os, call, dies)
        try:
            journal.append(b"new")
        except StorageError:
            failed = True
    journal.close()
    assert failed == (len(calls) >= nth)
    assert contents(path) in ((RECORDS, [b"new"]) if failed else ([b"new"],))
    assert names(tmp_path) == ["j"]


def test_a_journal_started_over_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal_of(path, RECORDS)
    journal = Journal(path)
    journal.clear()
    journal.append(b"new")
    journal.append(b"second")
    assert [journal[0], journal[1]] == [b"new", b"second"]
    journal.close()
    journal.close()
    assert contents(path) == [b"new", b"second"]


def test_clearing_alone_changes_nothing_on_disk(tmp_path: Path) -> None:
    raw = journal_of(tmp_path / "j", RECORDS)
    journal = Journal(tmp_path / "j")
    journal.clear()
    journal.close()
    assert (tmp_path / "j").read_bytes() == raw


def test_what_a_killed_start_over_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / f".j.{'0' * 16}.partial").touch()
    Journal(tmp_path / "j").close()
    assert names(tmp_path) == ["j"]


def test_a_journal_is_not_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"precious")
    (tmp_path / "j").symlink_to("elsewhere")
    with pytest.raises(StorageError, match="j: cannot open the journal: Too many levels of symbolic links"):
        Journal(tmp_path / "j")
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"


def test_a_new_journals_name_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(journal_module, "fsync_directory", synced.append)
    journal = Journal(tmp_path / "j")
    journal.append(b"head")
    assert synced == [tmp_path]
    journal.append(b"second")
    assert synced == [tmp_path]
    journal.close()
