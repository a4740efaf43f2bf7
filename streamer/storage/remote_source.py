"""Read remote files by ranges, several at a time: retry transient failures, and report others in one line.

A manifest names the remote files for which a directory stands. It counts only inside this user's cache: a directory from elsewhere could
contain one that names any URL.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import ContextVar, copy_context
from dataclasses import asdict, dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

from streamer.errors import FormatError, InputChangedError, InputError, StorageError, UnsupportedError
from streamer.events import Monitor
from streamer.storage.files import storage_errors
from streamer.storage.header import Header, IOMode, check_length, parse_header
from streamer.storage.remote_transports import RemoteFile, Transient, request_list, request_range, request_stat

IN_FLIGHT = 8
"""Most requests at a time, over all files."""

RANGE_BYTES = 8 << 20
"""Most bytes of a range."""

LEAST_BYTES = 1 << 20
"""Least bytes of a range when a tensor is divided: a request needs about as long as this many bytes."""

AHEAD_BYTES = 6 * RANGE_BYTES
"""Bytes that are requested or read ahead of a sequential reader."""

TRIES = 6
"""Attempts at a range without progress; the first wait is half a second, each further one twice as long: 15 s in total."""

FIRST_TRIES = 4
"""Attempts at a file's first request, since the URL may have no server: 3.5 s in total."""

LONGEST_WAIT = 120.0
"""Longest wait in seconds that a server may request by ``Retry-After``; if it requests more, reading fails."""

PROGRESS_BYTES = 1 << 16
"""Bytes of a range after which its attempts are counted from zero again."""

POLLED = 0.1
"""Seconds between checks for a request to stop during a wait."""

MANIFEST_NAME = ".streamer.remote.json"

T = TypeVar("T")

_threads = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="streamer range")  # begun as they are needed

_monitor = ContextVar("monitor", default=Monitor())  # noqa: B039  # one that nobody asks to stop


@dataclass(frozen=True)
class Manifest:
    """The remote content that a directory represents.

    Attributes
    ----------
    address
        The URL as the user gave it, without secrets.
    files
        Files that are read by ranges, by name; the file of that name in the directory is only a note for people.
    to_download
        Bytes that a run would download first, if only a forecast was requested.
    """

    address: str
    files: Mapping[str, RemoteFile]
    to_download: int = 0

    def write(self, directory: Path) -> None:
        """Write the manifest, readable only by this user: URLs may contain signatures."""
        new = directory / f"{MANIFEST_NAME}.{token_hex(8)}"
        with storage_errors(new, "write"):
            with open(new, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as f:
                f.write(json.dumps(asdict(self)).encode())
            new.replace(directory / MANIFEST_NAME)


def cache_directory() -> Path:
    """Return this user's cache: ``$XDG_CACHE_HOME/streamer``, by default ``~/.cache/streamer``."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "streamer"


def read_manifest(directory: Path) -> Manifest | None:
    """Read a directory's manifest; None if it has none, or none of ours."""
    try:
        if not Path(os.path.realpath(directory)).is_relative_to(os.path.realpath(cache_directory())):
            return None
        tree = json.loads((directory / MANIFEST_NAME).read_bytes())
        files = {name: RemoteFile(**entry) for name, entry in tree["files"].items()}
        return Manifest(tree["address"], files, tree["to_download"])
    except (OSError, RuntimeError, KeyError, TypeError, ValueError):  # no manifest, no home directory, or torn
        return None


def heed(monitor: Monitor) -> None:
    """Make waits for servers in this context end if this monitor receives a request to stop."""
    _monitor.set(monitor)


def at_once(call: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> list[T]:
    """Call a function with each of several arguments concurrently; raise the first error, and cancel calls that have not begun."""
    calls = [_submitted(call, *each) for each in arguments]
    try:
        return [one.result() for one in calls]
    finally:
        for one in calls:
            one.cancel()
        wait(calls)  # so that none writes to a buffer after its owner has left


def stat_remote(url: str, shown: str, token: bool = False) -> RemoteFile | None:
    """Request a file's size and version, retrying transient failures; None if there is no such file.

    Raises
    ------
    InputError, StorageError
        If access is refused, or no server answers.
    """
    return _retried(shown, FIRST_TRIES, lambda: request_stat(url, shown, token))


def list_remote(url: str, shown: str) -> dict[str, RemoteFile]:
    """List the files below a URL of a bucket, by their relative names, in the same way."""
    return _retried(shown, FIRST_TRIES, lambda: request_list(url, shown))


def read_range(file: RemoteFile, out: memoryview, at: int) -> None:
    """Read bytes from offset `at` until `out` is full, continuing after transient failures.

    Raises
    ------
    StorageError
        If no byte arrives in `TRIES` attempts, or the server refuses.
    InputChangedError
        If the file has changed.
    """
    done = 0

    def read_rest() -> None:
        nonlocal done
        try:
            request_range(file, out[done:], at + done)
        except Transient as e:
            done += e.done
            raise
        except UnsupportedError:
            raise
        except InputError as e:  # access was allowed when the run began
            raise StorageError(f"{e}; then run the same command again") from e

    if len(out):
        _retried(file.shown, TRIES, read_rest)


def _retried(shown: str, most: int, call: Callable[[], T]) -> T:
    """Call until there is no transient failure.

    Raises
    ------
    StorageError
        If there were enough attempts without progress, or the server requests too long a wait.
    Interrupted
        If a stop is requested meanwhile.
    """
    tries = received = 0
    while True:
        try:
            return call()
        except Transient as e:
            received += e.done
            tries, received = (1, 0) if received >= PROGRESS_BYTES else (tries + 1, received)
            long = e.wait is not None and e.wait > LONGEST_WAIT
            if tries >= most or long:
                again = f" in {tries} attempts" if tries > 1 else ""
                asked = f" (the server asks to wait {e.wait:.0f} s)" if long else ""
                raise StorageError(f"{shown}: cannot read{again}: {e}{asked}; run the same command again") from e
            backoff = 0.5 * 2 ** (tries - 1) * random.uniform(0.75, 1.0)  # noqa: S311  # so that several readers do not retry at once
            _sleep(backoff if e.wait is None else max(e.wait, 0.05))


def _sleep(seconds: float) -> None:
    """Sleep, or raise `Interrupted` as soon as a stop is requested."""
    monitor, until = _monitor.get(), time.monotonic() + seconds
    while True:
        monitor.checkpoint()
        if (left := until - time.monotonic()) <= 0:
            return
        time.sleep(min(left, POLLED))


def _submitted(call: Callable[..., T], *arguments: Any) -> Future[T]:
    """Call a function in another thread, with the monitor of this context."""
    return _threads.submit(copy_context().run, call, *arguments)


@dataclass(frozen=True)
class _Range:
    start: int
    data: memoryview
    future: Future[None]

    @property
    def stop(self) -> int:
        return self.start + len(self.data)


class RemoteSource:
    """Ranges of one version of a file; see `read_range`. The methods are those of `LocalSource`."""

    remote = True

    def __init__(self, file: RemoteFile) -> None:
        self.file, self.stamp = file, file.stamp
        self.io: IOMode = "pread"
        self._ahead: deque[_Range] = deque()
        self._lock = threading.Lock()

    def header(self) -> Header:
        """Read the header by two small ranges and validate it."""
        file = self.file
        if file.size < 8:
            raise FormatError(f"{file.shown}: expected a safetensors file, found {file.size} bytes; check the address")
        first = bytes(self.view(0, 8))
        n = int.from_bytes(first, "little")
        check_length(n, file.size, file.shown, lambda: bytes(self.view(0, min(256, file.size))))
        return parse_header(first + self.view(8, n), file.size, file.shown)

    def view(self, at: int, length: int) -> memoryview:
        """Read bytes into a new buffer."""
        out = memoryview(bytearray(length))
        self.read_into(out, at)
        return out

    def read_pieces(self, pieces: Iterable[tuple[memoryview, int]]) -> None:
        """Read all pieces at once."""
        at_once(read_range, [(self.file, out, at) for out, at in pieces if len(out)])

    def read_into(self, out: memoryview, at: int) -> None:
        """Return bytes that were read ahead, and read the rest."""
        if not self._ahead:  # several threads may read at once
            self._read_ranges(out, at)
            return
        with self._lock:
            while len(out):
                self._forget_before(at)
                if not self._ahead or self._ahead[0].start > at:
                    self._read_ranges(out, at)
                    return
                first = self._ahead[0]
                first.future.result()
                piece = first.data[at - first.start :][: len(out)]
                out[: len(piece)] = piece
                out, at = out[len(piece) :], at + len(piece)

    def prefetch(self, start: int, stop: int, end: int) -> None:
        """Request what follows `start`, up to `AHEAD_BYTES` and before `end`."""
        with self._lock:
            ahead = self._ahead
            self._forget_before(start)
            if ahead and not ahead[0].start <= start:  # the reader is elsewhere in the file
                self.close()
            following = ahead[-1].stop if ahead else start
            while following < min(end, max(stop, start + AHEAD_BYTES)):
                data = memoryview(bytearray(min(RANGE_BYTES, end - following)))
                ahead.append(_Range(following, data, _submitted(read_range, self.file, data, following)))
                following += len(data)

    def release(self, start: int, stop: int) -> None:
        """Do nothing: bytes from a server are in no cache."""

    def check_unchanged(self) -> None:
        """Request size and version again."""
        try:
            now = stat_remote(self.file.url, self.file.shown, self.file.token)
        except InputError as e:
            raise StorageError(f"{e}; then run the same command again") from e
        if now is None:
            raise InputChangedError.vanished(self.file.shown)
        self.file.check(now.version, now.size)

    def close(self) -> None:
        """Cancel requests that have not begun."""
        while self._ahead:
            self._ahead.pop().future.cancel()

    def _forget_before(self, at: int) -> None:
        while self._ahead and self._ahead[0].stop <= at:
            self._ahead.popleft()

    def _read_ranges(self, out: memoryview, at: int) -> None:
        """Read bytes by as many ranges as may be requested at a time, unless they would be too small."""
        step = min(RANGE_BYTES, max(LEAST_BYTES, -(-len(out) // IN_FLIGHT)))
        self.read_pieces((out[i : i + step], at + i) for i in range(0, len(out), step))
