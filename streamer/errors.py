"""Define all errors that streamer raises on purpose; each class holds the exit code of the command line.

::

    StreamerError                1   something unexpected
    ├── UsageError               2   an invalid option or argument; a ValueError
    │   ├── UnknownNameError         a name that findings do not have; a KeyError
    │   └── MissingPackageError      an optional package is not installed; an ImportError
    ├── InputError               3   bad or inconsistent input
    │   ├── MissingInputError        a file or directory does not exist; a FileNotFoundError
    │   ├── FormatError              a file violates its own format; a ValueError
    │   ├── UnsupportedError         a known kind of adapter or base that is refused, with its name and the reason; a ValueError
    │   └── MismatchError            inputs that do not belong together; a ValueError
    ├── OutputError              4   the output cannot be written here
    │   └── OutputExistsError        the path holds something that is not replaced; a FileExistsError
    ├── LockedError              5   another run is writing this output
    ├── StorageError             6   I/O or space; the same command resumes
    ├── WorkerError              6   workers that died or cannot be reached; the same command resumes
    ├── NumericError             7   a non-finite value, or a verification that failed; an ArithmeticError
    ├── VerificationError        7   an output that differs from its record, or from the result of its inputs
    ├── InputChangedError        8   an input changed since the plan was made
    └── Interrupted          128+N   stopped by signal N at a safe point; the same command resumes

    StreamerWarning                  something to check; a UserWarning

A message says in one line where the error is, what was expected, what was found, and what to do next.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

LONGEST_MESSAGE = 600
"""Longest message in characters; a quoted path or text from a download may have any length."""

AT_THE_END = 200
"""Characters kept from the end of a message that is too long; the end says what to do."""


class StreamerError(Exception):
    """Base class of all errors raised on purpose. Its text is always one line of bounded length (see `one_line`)."""

    exit_code = 1

    def __str__(self) -> str:
        return one_line(
            BaseException.__str__(self)
        )  # OSError and KeyError, bases of some, format differently


class StreamerWarning(UserWarning):
    """Something to check. Calls without `on_event` and `monitor` issue it through `warnings`."""


def one_line(text: str) -> str:
    """Convert a text to one printable line of bounded length, keeping its beginning and end."""
    if len(text) > LONGEST_MESSAGE:
        text = f"{text[: LONGEST_MESSAGE - AT_THE_END]} … {text[-AT_THE_END:]}"
    return printable(text)


def printable(text: str) -> str:
    """Escape characters that would control a terminal, because names may come from downloads."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class UsageError(StreamerError, ValueError):
    """An option or argument is invalid."""

    exit_code = 2


class UnknownNameError(UsageError, KeyError):
    """Findings do not have this name, or several of their matrices match it."""


class MissingPackageError(UsageError, ImportError):
    """An optional package is not installed.

    Parameters
    ----------
    message
        Complete message, which says how to install it.
    name
        Name of the package.
    """

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.name)


class InputError(StreamerError):
    """An input is bad, or inputs are inconsistent. Nothing has been written."""

    exit_code = 3


class _OfPath(OSError):
    """An error of Python's own kind about a path."""

    number: int

    def __init__(self, message: str, path: str | Path) -> None:
        super().__init__(message)
        self.errno, self.strerror, self.filename = self.number, os.strerror(self.number), str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.filename)


class MissingInputError(_OfPath, InputError, FileNotFoundError):
    """A file or directory of an input does not exist.

    Parameters
    ----------
    message
        Complete message, which names the path.
    path
        The missing path. It becomes `filename`; `errno` and `strerror` are set too.
    """

    number = errno.ENOENT


class FormatError(InputError, ValueError):
    """A file violates its own format."""


class UnsupportedError(InputError, ValueError):
    """The input is of a known kind that streamer refuses; the message names the kind and the reason."""


class MismatchError(InputError, ValueError):
    """Base, adapter, findings or options do not belong together."""


class OutputError(StreamerError):
    """The output cannot be written here, or the path holds something else than this command writes."""

    exit_code = 4


class OutputExistsError(_OfPath, OutputError, FileExistsError):
    """The output's path holds something that is not replaced.

    Parameters
    ----------
    message
        Complete message, which names the path.
    path
        The existing path. It becomes `filename`; `errno` and `strerror` are set too.
    """

    number = errno.EEXIST


class LockedError(StreamerError):
    """Another run holds the output's lock."""

    exit_code = 5


class StorageError(StreamerError):
    """Reading or writing failed, or the disk is full. Finished work is kept; the same command resumes."""

    exit_code = 6


class WorkerError(StreamerError):
    """Workers died or cannot be reached. Finished work is kept; the same command resumes."""

    exit_code = 6


class NumericError(StreamerError, ArithmeticError):
    """A value that must be finite is not, or a verification failed."""

    exit_code = 7


class VerificationError(StreamerError):
    """An output differs from its record or from the result of its inputs, or a requested comparison is impossible.

    Parameters
    ----------
    message
        The first difference and the number of others, or what could not be recomputed or compared.
    verification
        The object that `verify_output` would return, with one line for each of its `differences`; it becomes an attribute.
    """

    exit_code = 7

    def __init__(self, message: str, verification: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.verification = verification

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.verification)


class InputChangedError(StreamerError):
    """An input changed since the plan was made; versions are never mixed."""

    exit_code = 8

    @classmethod
    def changed(cls, path: object) -> Self:
        """Make the error of a file that is another one now."""
        return cls(
            f"{path}: changed since the run began; start again, and leave the inputs unchanged"
        )

    @classmethod
    def vanished(cls, path: object) -> Self:
        """Make the error of a file that no longer exists."""
        return cls(f"{path}: vanished during the run; put it back and start again")


class Interrupted(StreamerError):
    """A signal asked for a stop; the run stopped at a safe point and the same command resumes.

    Parameters
    ----------
    signum
        The signal's number; the exit code is ``128 + signum``.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}; the same command resumes")
        self.exit_code = 128 + signum

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.exit_code - 128,)


def advice(e: OSError) -> str:
    """Return what to do about an error of the operating system."""
    if e.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return "free some space, then run the same command again"
    if e.errno in {errno.EMFILE, errno.ENFILE}:
        return "take fewer adapters at once, or raise `ulimit -n`"
    if e.errno == errno.ENAMETOOLONG:
        return "choose a shorter name"
    return "run the same command again once the cause is gone"
