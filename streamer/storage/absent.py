"""Errors for an input that is missing: a mistyped path, an address, or a name on the hub that is still to be downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

from streamer.errors import MissingInputError

HUB_NAME = r"(?P<id>[\w.-]+/[\w.-]+)"
"""``user/name``, as models and adapters are called on the hub."""

_HUB_ADDRESS = re.compile(rf"(?:https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)/|hf:/)/*{HUB_NAME}(?:[/@].*)?")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/+.*")


def absent(path: Path, what: str) -> MissingInputError:
    """Make the error for an input directory that is not there; `what` it should have been.

    Parameters
    ----------
    path
        As the user gave it. Of an address a `Path` has only one slash left.
    """
    text = re.sub(r"^([a-z][a-z0-9+.-]+):/+", r"\1://", os.fspath(path))
    if found := _HUB_ADDRESS.fullmatch(text):
        return MissingInputError(
            f"{text}: reading from addresses is to come; download it first: {_download(found['id'])}", path
        )
    if _ADDRESS.fullmatch(text):
        return MissingInputError(
            f"{text}: reading from addresses is to come; download it first, and name the directory", path
        )
    # A relative path looks like a name on the hub: where its first part is a directory, a path was meant.
    hint = f", or, if that is its name on the hub, download it: {_download(text)}"
    named = re.fullmatch(HUB_NAME, text) and not path.parent.exists()
    return MissingInputError(f"{text}: no such directory; check the path of the {what}{hint if named else ''}", path)


def _download(name: str) -> str:
    return f"`hf download {name} --local-dir {name.rpartition('/')[2]}`"
