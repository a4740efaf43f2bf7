"""Import transformers, an optional package, and keep it quiet."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from streamer.errors import MissingPackageError

EXTRA = "intruder-streamer[evaluate]"


def require_transformers() -> Any:
    """Import transformers.

    Raises
    ------
    MissingPackageError
        If it, or a version that this works with, is not installed; the message says what to install.
    """
    try:
        import transformers
    except ImportError:
        raise MissingPackageError(
            f"evaluate and fit need transformers 5, which is not installed; pip install '{EXTRA}'", "transformers"
        ) from None
    if int(transformers.__version__.partition(".")[0]) < 5:
        raise MissingPackageError(
            f"evaluate and fit need transformers 5, found {transformers.__version__}; pip install -U '{EXTRA}'",
            "transformers",
        )
    return transformers


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
