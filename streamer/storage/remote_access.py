"""Define the interface for access to remote files, and its errors."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

from streamer.errors import InputChangedError, InputError, UnsupportedError
from streamer.storage.remote_manifest import RemoteFile


class Transient(Exception):
    """A transient failure.

    Attributes
    ----------
    done
        Bytes received before it.
    wait
        Seconds that the server asks to wait; None if it does not.
    """

    def __init__(self, reason: str, done: int = 0, wait: float | None = None) -> None:
        super().__init__(reason)
        self.done, self.wait = done, wait


@dataclass(frozen=True)
class RemoteStat:
    """Size and version of a remote file; `ranges` says whether its server supports ranges."""

    size: int
    version: str
    ranges: bool = True


class Access(ABC):
    """Access to files at URLs of some schemes, used by several threads at once."""

    @abstractmethod
    def stat(self, url: str, shown: str, *, token: bool = False) -> RemoteStat | None:
        """Request a file's size and version once; None if there is no such file, or a web page instead.

        Raises
        ------
        Transient, InputError
            If the answer is not available now, or access is refused.
        """

    @abstractmethod
    def fetch(self, file: RemoteFile, out: memoryview, at: int) -> int:
        """Read from offset `at` into `out` once, and return the number of bytes received: all, or only the first.

        Raises
        ------
        Transient, StorageError, InputChangedError
            If reading failed temporarily or permanently, or the file has changed.
        """


def silence_allowed() -> float:
    """Return the seconds without a byte after which a server counts as stalled."""
    try:
        return max(0.1, float(os.environ.get("STREAMER_REMOTE_TIMEOUT", "20")))
    except ValueError:
        return 20.0


def check_version(file: RemoteFile, version: str, size: int | None) -> None:
    """Raise `InputChangedError` if a file is not the one that was opened; an empty `version` is not compared."""
    if version not in ("", file.version) or size not in (None, file.size):
        raise InputChangedError.changed(file.shown)


def refused(shown: str, status: int, *, token: bool) -> InputError:
    """Make the error for a file that may not be read."""
    if token:
        advice = "log in with `hf auth login`, or set HF_TOKEN to a token that may read it"
    else:
        advice = "check its user, password or signature, which may have expired"
    return InputError(f"{shown}: the server refuses to give it (status {status}); {advice}")


def no_ranges(shown: str) -> UnsupportedError:
    """Make the error for a server that supports no ranges."""
    return UnsupportedError(
        f"{shown}: expected a part of the file, its server gives whole files only; download it and name the directory"
    )


def without_secrets(text: str) -> str:
    """Remove queries, users and passwords from URLs in a text."""
    return re.sub(r"(://)[^/\s@]*@", r"\1", re.sub(r"\?[^\s'\")]*", "", text))
