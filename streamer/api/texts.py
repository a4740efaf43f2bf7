"""Give a general text where the user names none: what Python's own help says of its topics."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from streamer.storage.atomic_file import write_atomic

BUILT_IN = "python-help.txt"
"""Name of the text."""


@contextlib.contextmanager
def general_text(given: Path | None) -> Iterator[Path]:
    """Give the path of the user's text, or of Python's own in a temporary file."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="streamer-") as directory:
        path = Path(directory) / BUILT_IN
        write_atomic(path, built_in_text().encode())
        yield path


def built_in_text() -> str:
    """Return what Python's help says of its topics: half a megabyte of English prose about programming."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))
