"""Every error that streamer raises on purpose; the exit code of the command line stands on the class.

::

    StreamerError                1   something unexpected
    ├── UsageError               2   an option or argument that makes no sense; a ValueError
    │   ├── UnknownNameError         a name that findings do not have; a KeyError
    │   └── MissingPackageError      an optional package is not installed; an ImportError
    ├── InputError               3   bad or inconsistent input
    │   ├── MissingInputError        a file or directory that is not there; a FileNotFoundError
    │   ├── FormatError              a file breaks its own format; a ValueError
    │   ├── UnsupportedError         a known kind of adapter or base that is refused, by name and reason; a ValueError
    │   └── MismatchError            inputs that do not belong together; a ValueError
    ├── OutputError              4   the output cannot be written here
    │   └── OutputExistsError        something stands there that is not to be replaced; a FileExistsError
    ├── LockedError              5   another run is writing this output
    ├── StorageError             6   I/O or space; the same command resumes
    ├── WorkerError              6   workers that died or cannot be reached; the same command resumes
    ├── NumericError             7   a non-finite value, or a verification that failed; an ArithmeticError
    ├── UnloadableError          7   a planned output that would not be loaded as its config says; an error of streamer's own
    ├── VerificationError        7   an output that differs from its record, or from what its inputs give
    ├── InputChangedError        8   an input changed since the plan was made
    └── Interrupted          128+N   stopped by signal N at a safe point; the same command resumes

    StreamerWarning                  something to check; a UserWarning

A message says where, what was expected and found, and what to do next, in one line.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LONGEST_MESSAGE = 600
"""Characters, as a last resort: what is quoted from a download, or a path, may be of any length."""

AT_THE_END = 200
"""Of them, those that are kept of the end, which says what to do."""


class StreamerError(Exception):
    """Base of all errors raised on purpose. As text it is one line of bounded length, whatever it quotes (see `one_line`)."""

    exit_code = 1

    def __str__(self) -> str:
        return one_line(BaseException.__str__(self))  # not that of OSError or KeyError, which some are too


class StreamerWarning(UserWarning):
    """Something to check; issued through `warnings` by calls that have neither `on_event` nor `monitor`."""


def one_line(text: str) -> str:
    """Make a text one printable line of bounded length, whose beginning and end are kept."""
    if len(text) > LONGEST_MESSAGE:
        text = f"{text[: LONGEST_MESSAGE - AT_THE_END]} … {text[-AT_THE_END:]}"
    return printable(text)


def printable(text: str) -> str:
    """Escape what would steer a terminal: names come from downloads."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class UsageError(StreamerError, ValueError):
    """An option or argument that makes no sense."""

    exit_code = 2


class UnknownNameError(UsageError, KeyError):
    """A name that findings do not have, or that fits several of their matrices."""


class MissingPackageError(UsageError, ImportError):
    """An optional package is not installed.

    Parameters
    ----------
    message
        The whole message, which says how to install it.
    name
        The package.
    """

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.name)


class InputError(StreamerError):
    """An input is bad, or inputs are inconsistent. Nothing has been written."""

    exit_code = 3


class MissingInputError(InputError, FileNotFoundError):
    """A file or directory of an input is not there.

    Parameters
    ----------
    message
        The whole message, which names the path.
    path
        What is missing; it becomes the `filename`, beside `errno` and `strerror`.
    """

    def __init__(self, message: str, path: str | Path) -> None:
        super().__init__(message)
        self.errno, self.strerror, self.filename = errno.ENOENT, os.strerror(errno.ENOENT), str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.filename)


class FormatError(InputError, ValueError):
    """A file breaks its own format."""


class UnsupportedError(InputError, ValueError):
    """The input is of a known kind that streamer refuses; the message names the kind and the reason."""


class MismatchError(InputError, ValueError):
    """Base, adapter, findings or options that do not belong together."""


class OutputError(StreamerError):
    """The output cannot be written here, or something stands there that is not what this command would write."""

    exit_code = 4


class OutputExistsError(OutputError, FileExistsError):
    """Something stands where the output would be, and is not to be replaced.

    Parameters
    ----------
    message
        The whole message, which names the path.
    path
        What stands there; it becomes the `filename`, beside `errno` and `strerror`.
    """

    def __init__(self, message: str, path: str | Path) -> None:
        super().__init__(message)
        self.errno, self.strerror, self.filename = errno.EEXIST, os.strerror(errno.EEXIST), str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.filename)


class LockedError(StreamerError):
    """Another run holds the output's lock."""

    exit_code = 5


class StorageError(StreamerError):
    """Reading or writing failed, or the disk is full. What was finished is kept; the same command resumes."""

    exit_code = 6


class WorkerError(StreamerError):
    """Workers died, or cannot be reached. What was finished is kept; the same command resumes."""

    exit_code = 6


class NumericError(StreamerError, ArithmeticError):
    """A non-finite value where there must be none, or a verification that failed."""

    exit_code = 7


class UnloadableError(StreamerError):
    """A planned output that would not be loaded as its config says: the plan is wrong, and nothing has been written."""

    exit_code = 7


class VerificationError(StreamerError):
    """An output differs from its record, or from what its inputs give.

    Parameters
    ----------
    message
        The first difference, and how many more there are.
    verification
        What `verify_output` else returns, with a line for each of its `differences`; it becomes an attribute.
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
    """Say what to do about an error of the system's."""
    if e.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return "free some space, then run the same command again"
    if e.errno in {errno.EMFILE, errno.ENFILE}:
        return "take fewer adapters at once, or raise `ulimit -n`"
    if e.errno == errno.ENAMETOOLONG:
        return "choose a shorter name"
    return "run the same command again once the cause is gone"
