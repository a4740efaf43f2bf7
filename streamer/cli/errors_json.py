"""Describe the error that ended a run as the JSON that `--json` and `--json-events` print."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from streamer.api.event_records import ErrorEntry, ErrorsRecord

SCHEMA: Final = "streamer.error/1"


def error_entry(
    kind: str, exit_code: int, message: str, path: str | None = None, given: Collection[str] = ()
) -> ErrorEntry:
    """Describe one error.

    Parameters
    ----------
    kind
        Name of the exception's class.
    message
        The line that goes to stderr, without the program's name.
    path
        The file or directory that is to blame; by default the one that the message begins with, if it does.
    given
        Paths that the command was given: whether they exist or not, a message may begin with one.
    """
    where = _leading_path(message, given) if path is None else path
    return {"kind": kind, "exit_code": exit_code, "message": message, "path": where}


def errors_object(errors: list[ErrorEntry]) -> ErrorsRecord:
    """Put errors into the object that `--json` prints."""
    return {"schema": SCHEMA, "errors": errors}


def _leading_path(message: str, given: Collection[str]) -> str | None:
    """Return the path before the first colon; messages begin with where the fault is, which may be an option, too."""
    head, colon, _ = message.partition(": ")
    return head if colon and (head in given or os.sep in head or os.path.lexists(head)) else None
