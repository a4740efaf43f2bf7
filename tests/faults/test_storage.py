"""Files, locks and outputs of processes that are killed or limited, and of systems that lack some calls, macOS above all."""

from __future__ import annotations

import ast
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import ENV, with_method
from forks import Server, partials
from helpers import tree_digest
from jobs import Bench
from two_shards import SHARDS, two_shards

import streamer
from streamer.storage import files


def test_a_file_that_shrinks_does_not_kill_the_process(tmp_path: Path) -> None:
    """Touching a mapped page that is gone would be SIGBUS: seen from outside, the process ends by itself."""
    base = two_shards(tmp_path / "base")
    program = f"""
import os
from streamer.errors import InputChangedError
from streamer.storage.checkpoint import open_checkpoint
checkpoint = open_checkpoint({str(base)!r})
os.truncate({str(base / SHARDS[1])!r}, 0)
try:
    file, info = checkpoint.locate("c")
    bytes(file.view(info))
except InputChangedError as e:
    print(e)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False
    )
    expected = f"{base / SHARDS[1]}: shrank to 0 B during the run; get the file again\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")


@pytest.mark.long
def test_users_run_without_checks_of_buffers_and_get_the_same_bytes(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "streamer",
        "merge",
        *map(str, inputs),
        "--method",
        "shrink",
        "--quiet",
        "-o",
    ]
    for name, checked in (("checked", {"STREAMER_CHECK_BUFFERS": "1"}), ("plain", {})):
        env = {
            key: value for key, value in os.environ.items() if key != "STREAMER_CHECK_BUFFERS"
        } | checked
        subprocess.run([*command, str(tmp_path / name)], env=env, check=True)
    assert tree_digest(tmp_path / "checked") == tree_digest(tmp_path / "plain")


MISSING = (
    "copy_file_range", "eventfd", "eventfd_read", "eventfd_write", "fdatasync", "getrandom", "getresgid", "getresuid", "getxattr",
    "listxattr", "memfd_create", "pidfd_open", "pipe2", "posix_fadvise", "posix_fallocate", "preadv", "pwritev", "removexattr",
    "sched_getaffinity", "sched_getparam", "sched_getscheduler", "sched_rr_get_interval", "sched_setaffinity", "sched_setparam",
    "sched_setscheduler", "setns", "setresgid", "setresuid", "setxattr", "splice", "unshare",
)  # fmt: skip
"""Calls of Python's `os` on Linux that macOS has not, or only since version 11."""

PREFIXES = ("POSIX_FADV_", "MFD_", "EFD_", "GRND_", "RWF_", "SPLICE_", "XATTR_", "CLONE_")
FLAGS = (
    "O_DIRECT",
    "O_LARGEFILE",
    "O_NOATIME",
    "O_PATH",
    "O_RSYNC",
    "O_TMPFILE",
    "P_PIDFD",
    "SEEK_DATA",
    "SEEK_HOLE",
)

ELSEWHERE = f"""
import fcntl, os, resource, runpy, signal, sys
for name in dir(os):
    if name in {(*MISSING, *FLAGS)!r} or name.startswith({PREFIXES!r}):
        delattr(os, name)

def opened(event, args):
    if event == "open" and str(args[0]).startswith(("/proc", "/sys")):
        raise FileNotFoundError(2, "No such file or directory", args[0])

sys.addaudithook(opened)
real, fcntl.F_FULLFSYNC, full = fcntl.fcntl, 51, []

def call(fd, command, *args):
    if command == fcntl.F_FULLFSYNC:
        full.append(fd)
        return os.fsync(fd)
    return real(fd, command, *args)

fcntl.fcntl = call
renamed, rename, kill, limit = [], os.rename, int(sys.argv[1]), int(sys.argv[2])

def counted(*args):
    renamed.append(args)
    if len(renamed) == kill:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(*args)

os.rename = counted
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.argv[:] = ["streamer", *sys.argv[3:]]
try:
    runpy.run_module("streamer", run_name="__main__", alter_sys=True)
finally:
    assert len(full) >= 2 * len(renamed) or limit, "a file has its name and is not on the disk"
"""
"""A program that runs a command line as on such a system; it kills itself at a rename, and has no room for larger files, if told so."""


def elsewhere(argv: list[str], kill: int = 0, limit: int = 0) -> subprocess.CompletedProcess[str]:
    words = [*with_method(argv), "--threads", "1"]
    line = [sys.executable, "-c", ELSEWHERE, str(kill), str(limit), *words]
    return subprocess.run(line, env=ENV, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    server = Server()
    yield Bench(tmp_path_factory.mktemp("elsewhere"), server)
    server.close()


@pytest.mark.long
@pytest.mark.parametrize(
    ("command", "io"), [("detect", "mmap"), ("mitigate", "mmap"), ("merge", "pread")]
)
def test_a_job_runs_without_what_macos_lacks(
    bench: Bench, command: str, io: str, tmp_path: Path
) -> None:
    """Killed at its second new name and taken up again, it writes the bytes that it writes here."""
    case = bench.case(command)
    out = tmp_path / "out"
    line = [*case.line(out), "--io", io, "--json"]
    if command != "detect":  # which gives a name to one file only
        assert elsewhere(line, kill=2).returncode == -signal.SIGKILL
        case.check_whole_files(out)
    done = elsewhere(line)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["state"] == ("written" if command == "detect" else "resumed")
    assert tree_digest(out) == case.whole


@pytest.mark.long
@pytest.mark.parametrize("command", ["detect", "merge"])
def test_a_full_disk_where_nothing_can_be_reserved(
    bench: Bench, command: str, tmp_path: Path
) -> None:
    """The write that no longer fits says so; the run is taken up where there is room."""
    case = bench.case(command)
    out = tmp_path / "out"
    full = elsewhere(case.line(out), limit=15_000)
    assert full.returncode == 6, full.stderr
    assert full.stderr.count("\n") == 1
    assert str(out) in full.stderr
    assert "File too large; free some space, then run the same command again" in full.stderr
    assert partials(out) == []
    case.check_whole_files(out)
    case.check_finishes(out)


def test_what_macos_lacks_is_called_in_one_place() -> None:
    home = Path(streamer.__file__).parent
    names = {*MISSING, *FLAGS, "F_FULLFSYNC", "fsync"}
    found = {
        (path.relative_to(home).as_posix(), node.attr)
        for path in home.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and (node.attr in names or node.attr.startswith(PREFIXES))
    }
    called = {
        "posix_fallocate",
        "posix_fadvise",
        "preadv",
        "sched_getaffinity",
        "F_FULLFSYNC",
        "fsync",
    }
    assert found == {("storage/files.py", name) for name in called}


# Each call by itself ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "f"
    path.write_bytes(bytes(range(100)))
    number = os.open(path, os.O_RDWR)
    yield number
    os.close(number)


@pytest.mark.parametrize("there", [True, False])
def test_reading(monkeypatch: pytest.MonkeyPatch, fd: int, there: bool) -> None:
    if not there:
        monkeypatch.delattr(os, "preadv")
    out = memoryview(bytearray(20))
    assert files.read_at(fd, out, 90) == 10
    assert bytes(out) == bytes(range(90, 100)) + bytes(10)
    assert files.read_at(fd, out, 100) == 0
    monkeypatch.setattr(
        files, "MAX_CALL_BYTES", 7
    )  # a call is asked for no more than every system takes
    assert files.read_at(fd, out, 0) == 7


def test_nothing_is_reserved_where_nothing_can_be(monkeypatch: pytest.MonkeyPatch, fd: int) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    files.reserve(fd, 1000)
    assert os.fstat(fd).st_size == 100


def test_advice_where_none_is_taken(monkeypatch: pytest.MonkeyPatch, fd: int) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    files.drop_cached(fd, 0, 100)


@pytest.mark.parametrize(
    ("fault", "calls"),
    [
        (0, ["full"]),
        (errno.ENOTSUP, ["full", "fsync"]),
        (errno.ENOTTY, ["full", "fsync"]),
        (errno.EIO, ["full"]),
    ],
)
def test_a_sync_goes_through_the_disks_own_cache(
    monkeypatch: pytest.MonkeyPatch, fd: int, fault: int, calls: list[str]
) -> None:
    """A file system that knows no such call gets a plain one; a disk that fails is not asked again."""
    made = []

    def full(number: int, command: int) -> int:
        assert (number, command) == (fd, 51)
        made.append("full")
        if fault:
            raise OSError(fault, os.strerror(fault))
        return 0

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", full)
    monkeypatch.setattr(os, "fsync", lambda _: made.append("fsync"))
    if fault == errno.EIO:
        with pytest.raises(OSError, match="Input/output error"):
            files.sync(fd)
    else:
        files.sync(fd)
    assert made == calls
