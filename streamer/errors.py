"""Every error that streamer raises on purpose; the exit code of the command line stands on the class.

::

    StreamerError                1   something unexpected
    ├── UsageError               2   an option or argument that makes no sense
    ├── InputError               3   bad or inconsistent input
    │   ├── FormatError              a file breaks its own format
    │   ├── UnsupportedError         a known kind of adapter or base that is refused, by name and reason
    │   └── MismatchError            inputs that do not belong together
    ├── OutputError              4   the output exists, or is not the one this command would write
    ├── LockedError              5   another run is writing this output
    ├── StorageError             6   I/O or space; the same command resumes
    ├── NumericError             7   a non-finite value, or a verification that failed
    ├── InputChangedError        8   an input changed since the plan was made
    └── Interrupted          128+N   stopped by signal N at a safe point; the same command resumes

A message says where, what was expected and found, and what to do next, in one line.
"""

from __future__ import annotations

LONGEST_MESSAGE = 3000
"""Characters: what is quoted from a download may be of any length."""


class StreamerError(Exception):
    """Base of all errors raised on purpose. As text it is one line, whatever it quotes: control characters are escaped, its end is cut."""

    exit_code = 1

    def __str__(self) -> str:
        text = super().__str__()
        text = text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}…"
        return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class UsageError(StreamerError, ValueError):
    """An option or argument that makes no sense."""

    exit_code = 2


class InputError(StreamerError):
    """An input is bad, or inputs are inconsistent. Nothing has been written."""

    exit_code = 3


class FormatError(InputError):
    """A file breaks its own format."""


class UnsupportedError(InputError):
    """The input is of a known kind that streamer refuses; the message names the kind and the reason."""


class MismatchError(InputError):
    """Base, adapter, findings or options that do not belong together."""


class OutputError(StreamerError):
    """The output exists already, or is not what this command would write."""

    exit_code = 4


class LockedError(StreamerError):
    """Another run holds the output's lock."""

    exit_code = 5


class StorageError(StreamerError):
    """Reading or writing failed, or the disk is full. What was finished is kept; the same command resumes."""

    exit_code = 6


class NumericError(StreamerError):
    """A non-finite value where there must be none, or a verification that failed."""

    exit_code = 7


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
