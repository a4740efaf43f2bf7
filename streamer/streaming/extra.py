"""Import optional packages, and keep transformers quiet."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from typing import Any

from streamer.errors import MissingPackageError


def require_package(name: str, version: tuple[int, ...], needs: str, extra: str) -> Any:
    """Import an optional package.

    Parameters
    ----------
    version
        That it must have at least.
    needs
        What needs it, and in which version: the beginning of the messages.
    extra
        The extra of this package that installs it.

    Raises
    ------
    MissingPackageError
        If it, or a version that this works with, is not installed; the message says what to install.
    """
    install = f"'intruder-streamer[{extra}]'"
    try:
        package = importlib.import_module(name)
    except ImportError:
        raise MissingPackageError(f"{needs}, which is not installed; pip install {install}", name) from None
    if tuple(map(int, package.__version__.split(".")[: len(version)])) < version:
        raise MissingPackageError(f"{needs}, found {package.__version__}; pip install -U {install}", name)
    return package


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
