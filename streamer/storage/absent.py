"""Errors for an input that is missing: a mistyped path, or an address that has become a path on its way here."""

from __future__ import annotations

import os
import re
from pathlib import Path

from streamer.errors import MissingInputError

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/+.*")


def absent(path: Path, what: str) -> MissingInputError:
    """Make the error for an input directory that is not there; `what` it should have been.

    Parameters
    ----------
    path
        As the user gave it. Of an address a `Path` has only one slash left.
    """
    text = os.fspath(path)
    if _ADDRESS.fullmatch(text):
        return MissingInputError(f"{text}: is an address as a path; pass it as a string", path)
    hint = "" if path.is_absolute() else "; a hub name has the form OWNER/NAME, and no directory OWNER may exist here"
    return MissingInputError(f"{text}: no such directory; check the path of the {what}{hint}", path)
