"""A shim between a process and the system: any call that changes files below a directory can kill it, fail, be torn, or be recorded.

`shim.c` does it, by LD_PRELOAD, so that nothing which Python or a library writes is missed. It is compiled here; `AVAILABLE` says
whether there is a compiler. ``server().run(…, before=arm(…))`` forks a process with a fault in it.
"""

import atexit
import functools
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from forks import Server

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
AVAILABLE = COMPILER is not None

NOTHING, KILL, TORN, FAIL, SHORT, SIGNAL, FAIL_READ, SHORT_READ = range(8)
"""What goes wrong, as in `shim.c`: at one call, but for SHORT (every write) and SHORT_READ (every read) brings half."""

WRITES = "w"
CHANGES = "cwetsrum"
"""Codes of the calls that write bytes, and of all that are counted."""


@dataclass(frozen=True)
class Call:
    """A recorded call.

    Attributes
    ----------
    op
        ``c`` create, ``w`` write, ``e`` extend (fallocate), ``t`` truncate, ``s`` fsync, ``r`` rename, ``u`` unlink, ``m`` mkdir,
        ``R`` read, ``x`` any of them that failed by itself.
    path, to
        The file, and the name that a rename gives it.
    offset, length
        Where and how much; a file's length in ``e`` and ``t``.
    data
        The bytes of a write.
    """

    op: str
    path: str
    to: str
    offset: int
    length: int
    data: bytes


@functools.cache
def library() -> Path:
    """The compiled shim."""
    assert COMPILER is not None
    home = tempfile.mkdtemp(prefix="shim-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    built = Path(home) / "shim.so"
    source = Path(__file__).with_name("shim.c")
    flags = [
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        "-o",
        str(built),
        str(source),
        "-ldl",
        "-lpthread",
    ]
    subprocess.run([COMPILER, *flags], check=True)
    return built


@functools.cache
def server(*modules: str) -> Server:
    """A server whose runs the shim can disturb; it has imported these modules besides."""
    made = Server(preload=library(), modules=modules)
    atexit.register(made.close)
    return made


def arm(
    under: Path, mode: int = NOTHING, at: int = 0, number: int = 0, record: Path | None = None
) -> str:
    """Code for `Server.run`'s `before`: watch a directory, let the `at`-th call go wrong, record what is done.

    `number` is an errno for FAIL and FAIL_READ, a signal for SIGNAL.
    """
    file = "" if record is None else str(record)
    asked = f"{str(under).encode()!r}, {mode}, ctypes.c_long({at}), {number}, {file.encode()!r}"
    return f"import ctypes; ctypes.CDLL(None).shim_arm({asked})"


def read_record(path: Path) -> list[Call]:
    """The calls of a record, in order."""
    raw = path.read_bytes()
    at = 0
    out = []
    while at < len(raw):
        op = chr(raw[at])
        n, to, offset, length = struct.unpack_from("<IIQQ", raw, at + 1)
        at += 25
        names = raw[at : at + n].decode(), raw[at + n : at + n + to].decode()
        at += n + to
        data = raw[at : at + length] if op in WRITES else b""
        at += len(data)
        out.append(Call(op, *names, offset, length, data))
    return out
