"""Import transformers, and keep it quiet."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from streamer.packages import require_package


def require_transformers() -> Any:
    """Import transformers; see `require_package`."""
    return require_package("transformers", (5,), "evaluate and fit need transformers 5", "evaluate")


def first_line(error: Exception) -> str:
    """Return the first line of what an exception of transformers says; its class where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' log below errors inside the context: a library prints nothing."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
