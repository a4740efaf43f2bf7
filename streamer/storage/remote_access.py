"""Read ranges of files at addresses, again where it failed for a while, and say in one line what did not."""

from __future__ import annotations

import os
import random
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import cache
from typing import ParamSpec, TypeVar

from streamer.errors import InputChangedError, InputError, StorageError, UnsupportedError
from streamer.events import Monitor
from streamer.storage.remote_manifest import RemoteFile
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


class Transient(Exception):
    """A failure that may pass.

    Attributes
    ----------
    done
        Bytes that came before it.
    wait
        Seconds that the server asks to wait; None where it does not.
    """

    def __init__(self, reason: str, done: int = 0, wait: float | None = None) -> None:
        super().__init__(reason)
        self.done, self.wait = done, wait


@dataclass(frozen=True)
class RemoteStat:
    """Size and version of a file at an address; `ranges` says whether its server gives a part of it."""

    size: int
    version: str
    ranges: bool = True


class Access(ABC):
    """A way to files at addresses of some schemes, used by several threads at once."""

    @abstractmethod
    def stat(self, url: str, shown: str, *, token: bool = False) -> RemoteStat | None:
        """Ask for a file's size and version, once; None if there is no such file, or a web page in its place.

        Raises
        ------
        Transient, InputError
            If that cannot be told now, or not without a right that is lacking.
        """

    @abstractmethod
    def fetch(self, file: RemoteFile, out: memoryview, at: int) -> int:
        """Read from offset `at` into `out`, once, and return how many bytes came: all, or the first of them.

        Raises
        ------
        Transient, StorageError, InputChangedError
            If it failed for now, for good, or the file is another one by now.
        """


@cache
def access_of(url: str) -> Access:
    """Return the way to an address."""
    scheme = url.partition("://")[0]
    return _access_of_scheme("http" if scheme in ("http", "https") else scheme)


@cache
def _access_of_scheme(scheme: str) -> Access:
    if scheme == "http":
        from streamer.storage.remote_http import HttpAccess

        return HttpAccess()
    from streamer.storage.remote_buckets import BucketAccess

    return BucketAccess()


def heed(monitor: Monitor) -> None:
    """Let waits for servers, from here on in this context, end where this monitor is asked to stop."""
    _monitor.set(monitor)


def in_context(call: Callable[P, T]) -> Callable[P, T]:
    """Return a call that heeds the monitor of this context in whatever thread it runs."""
    context = copy_context()

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return context.copy().run(call, *args, **kwargs)  # several threads may be in it at once

    return run


def silence_allowed() -> float:
    """Return the seconds without a byte after which a server is taken to be stalled."""
    try:
        return max(0.1, float(os.environ.get("STREAMER_REMOTE_TIMEOUT", "20")))
    except ValueError:
        return 20.0


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


def check_version(file: RemoteFile, version: str, size: int | None) -> None:
    """Raise `InputChangedError` where a file is another one than was opened; an empty `version` says nothing."""
    if version not in ("", file.version) or size not in (None, file.size):
        raise InputChangedError(
            f"{file.shown}: changed since the run began; start again, and do not change the base during the run"
        )


def refused(shown: str, status: int, *, token: bool) -> InputError:
    """Make the error for a file that may not be read."""
    if token:
        advice = "log in with `hf auth login`, or set HF_TOKEN to a token that may read it"
    else:
        advice = "check its user, password or signature, which may have expired"
    return InputError(f"{shown}: the server refuses to give it (status {status}); {advice}")


def no_ranges(shown: str) -> UnsupportedError:
    """Make the error for a server that gives whole files only."""
    return UnsupportedError(
        f"{shown}: expected a part of the file, its server gives whole files only; download it and name the directory"
    )


def without_secrets(text: str) -> str:
    """Cut queries, and users with passwords, out of the addresses in a text."""
    return re.sub(r"(://)[^/\s@]*@", r"\1", re.sub(r"\?[^\s'\")]*", "", text))


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
