"""Import optional packages, which the extras of the distribution install."""

from __future__ import annotations

import importlib
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
