"""Provide a general text if the user names none: Python's own help on its topics."""

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
    """Yield the path of the user's text, or of a temporary file with Python's help."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="streamer-") as directory:
        path = Path(directory) / BUILT_IN
        write_atomic(path, built_in_text().encode())
        yield path


def built_in_text() -> str:
    """Return Python's help on its topics: half a megabyte of English prose about programming."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))
