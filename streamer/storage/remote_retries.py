"""Read ranges of remote files, retry transient failures, and report other failures in one line."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from functools import cache
from typing import ParamSpec, TypeVar

from streamer.errors import StorageError
from streamer.events import Monitor
from streamer.storage.remote_access import Access, RemoteStat, Transient
from streamer.storage.remote_buckets import BucketAccess
from streamer.storage.remote_http import HttpAccess
from streamer.storage.remote_manifest import RemoteFile
from streamer.units import format_size

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

P = ParamSpec("P")
T = TypeVar("T")

_monitor: ContextVar[Monitor | None] = ContextVar("monitor", default=None)


_http_access = cache(HttpAccess)


def access_of(url: str) -> Access:
    """Return the access for a URL."""
    return _http_access() if url.startswith(("http://", "https://")) else BucketAccess()


def heed(monitor: Monitor) -> None:
    """Make waits for servers in this context end if this monitor receives a request to stop."""
    _monitor.set(monitor)


def in_context(call: Callable[P, T]) -> Callable[P, T]:
    """Wrap a call so that it uses this context's monitor in any thread."""
    context = copy_context()

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return context.copy().run(call, *args, **kwargs)  # several threads may use it at once

    return run


def stat_remote(url: str, shown: str, *, token: bool = False) -> RemoteStat | None:
    """Request a file's size and version, retrying transient failures; None if there is no such file.

    Raises
    ------
    InputError, StorageError
        If access is refused, or no server answers.
    """
    tries = 0
    while True:
        try:
            return access_of(url).stat(url, shown, token=token)
        except Transient as e:
            tries += 1
            _wait(shown, tries, FIRST_TRIES, e)


def read_range(file: RemoteFile, out: memoryview, at: int) -> None:
    """Read bytes from offset `at` until `out` is full, continuing after transient failures.

    Raises
    ------
    StorageError
        If no byte arrives in `TRIES` attempts, or the server refuses.
    InputChangedError
        If the file has changed.
    """
    done = tries = counted = 0
    while done < len(out):
        try:
            done += access_of(file.url).fetch(file, out[done:], at + done)
            if done < len(out):
                raise Transient(f"the answer ended after {format_size(done)} of {format_size(len(out))}")
        except Transient as e:
            done += e.done
            tries = 1 if done - counted >= PROGRESS_BYTES else tries + 1
            counted = done if tries == 1 else counted
            _wait(file.shown, tries, TRIES, e)


def _wait(shown: str, tries: int, most: int, e: Transient) -> None:
    """Wait before another attempt.

    Raises
    ------
    StorageError
        If there were enough attempts, or the server requests too long a wait.
    Interrupted
        If a stop is requested meanwhile.
    """
    if tries >= most or (e.wait or 0) > LONGEST_WAIT:
        again = f" in {tries} attempts" if tries > 1 else ""
        asked = f" (the server asks to wait {e.wait:.0f} s)" if (e.wait or 0) > LONGEST_WAIT else ""
        raise StorageError(f"{shown}: cannot read{again}: {e}{asked}; run the same command again") from e
    backoff = 0.5 * 2 ** (tries - 1) * random.uniform(0.75, 1.0)  # noqa: S311  # so that several readers do not retry at once
    _sleep(backoff if e.wait is None else max(e.wait, 0.05))


def _sleep(seconds: float) -> None:
    """Sleep, or raise `Interrupted` as soon as a stop is requested."""
    monitor, until = _monitor.get(), time.monotonic() + seconds
    while True:
        if monitor is not None:
            monitor.checkpoint()
        if (left := until - time.monotonic()) <= 0:
            return
        time.sleep(min(left, POLLED))
