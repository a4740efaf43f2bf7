"""Read ranges of files at addresses, again where it failed for a while, and say in one line what did not."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from functools import cache
from typing import ParamSpec, TypeVar

from streamer.errors import StorageError
from streamer.events import Monitor
from streamer.storage.remote_buckets import BucketAccess
from streamer.storage.remote_http import HttpAccess
from streamer.storage.remote_manifest import RemoteFile
from streamer.storage.remote_ways import Access, RemoteStat, Transient
from streamer.units import format_size

TRIES = 6
"""Attempts at a range without any progress, half a second after the first, twice as long after each other: 15 s in all."""

FIRST_TRIES = 4
"""Attempts at what is asked first of a file, at whose address nothing may answer: 3.5 s in all."""

LONGEST_WAIT = 120.0
"""Seconds that a server may ask to wait, by ``Retry-After``, before it is tried again; one that asks for more is given up."""

PROGRESS_BYTES = 1 << 16
"""Bytes of a range after which its attempts are counted anew."""

POLLED = 0.1
"""Seconds of a wait between two looks for a request to stop."""

P = ParamSpec("P")
T = TypeVar("T")

_monitor: ContextVar[Monitor | None] = ContextVar("monitor", default=None)


@cache
def access_of(url: str) -> Access:
    """Return the way to an address."""
    scheme = url.partition("://")[0]
    return _access_of_scheme("http" if scheme in ("http", "https") else scheme)


@cache
def _access_of_scheme(scheme: str) -> Access:
    return HttpAccess() if scheme == "http" else BucketAccess()


def heed(monitor: Monitor) -> None:
    """Let waits for servers, from here on in this context, end where this monitor is asked to stop."""
    _monitor.set(monitor)


def in_context(call: Callable[P, T]) -> Callable[P, T]:
    """Return a call that heeds the monitor of this context in whatever thread it runs."""
    context = copy_context()

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return context.copy().run(call, *args, **kwargs)  # several threads may be in it at once

    return run


def stat_remote(url: str, shown: str, *, token: bool = False) -> RemoteStat | None:
    """Ask for a file's size and version, again where it failed for a while; None where there is no such file.

    Raises
    ------
    InputError, StorageError
        If it is refused, or nothing answers.
    """
    tries = 0
    while True:
        try:
            return access_of(url).stat(url, shown, token=token)
        except Transient as e:
            tries += 1
            _wait(shown, tries, FIRST_TRIES, e)


def read_range(file: RemoteFile, out: memoryview, at: int) -> None:
    """Read bytes from offset `at` until `out` is full, going on after failures that pass.

    Raises
    ------
    StorageError
        If no byte comes in `TRIES` attempts, or the server refuses.
    InputChangedError
        If the file is another one by now.
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
        If there were enough, or the server asks for too long a wait.
    Interrupted
        If a stop is asked for meanwhile.
    """
    if tries >= most or (e.wait or 0) > LONGEST_WAIT:
        again = f" in {tries} attempts" if tries > 1 else ""
        asked = f" (the server asks to wait {e.wait:.0f} s)" if (e.wait or 0) > LONGEST_WAIT else ""
        raise StorageError(f"{shown}: cannot read{again}: {e}{asked}; run the same command again") from e
    backoff = 0.5 * 2 ** (tries - 1) * random.uniform(0.75, 1.0)  # noqa: S311  # so that several readers do not return together
    _sleep(backoff if e.wait is None else max(e.wait, 0.05))


def _sleep(seconds: float) -> None:
    """Sleep, or raise `Interrupted` as soon as a stop is asked for."""
    monitor, until = _monitor.get(), time.monotonic() + seconds
    while True:
        if monitor is not None:
            monitor.checkpoint()
        if (left := until - time.monotonic()) <= 0:
            return
        time.sleep(min(left, POLLED))
