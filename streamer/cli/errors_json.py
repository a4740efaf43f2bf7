"""Describe the error that ended a run, as JSON for `--json` and `--json-events`."""

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
        The line printed to stderr, without the program's name.
    path
        The file or directory at fault; by default the path that the message begins with, if any.
    given
        Paths given to the command; a message may begin with one even if it does not exist.
    """
    where = _leading_path(message, given) if path is None else path
    return {"kind": kind, "exit_code": exit_code, "message": message, "path": where}


def errors_object(errors: list[ErrorEntry]) -> ErrorsRecord:
    """Collect errors into the object that `--json` prints."""
    return {"schema": SCHEMA, "errors": errors}


def _leading_path(message: str, given: Collection[str]) -> str | None:
    """Return the path before the first colon; a message begins with the location of the error, which may also be an option."""
    head, colon, _ = message.partition(": ")
    return head if colon and (head in given or os.sep in head or os.path.lexists(head)) else None
