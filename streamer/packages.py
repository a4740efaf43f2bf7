"""Import optional packages, which this distribution's extras install."""

from __future__ import annotations

import importlib
from typing import Any

from streamer.errors import MissingPackageError


def require_package(name: str, version: tuple[int, ...], needs: str, extra: str) -> Any:
    """Import an optional package.

    Parameters
    ----------
    version
        Lowest version that works.
    needs
        Beginning of the messages: what needs the package, and in which version.
    extra
        This distribution's extra that installs the package.

    Raises
    ------
    MissingPackageError
        If the package is not installed, or is too old; the message says what to install.
    """
    install = f"'intruder-streamer[{extra}]'"
    try:
        package = importlib.import_module(name)
    except ImportError:
        raise MissingPackageError(
            f"{needs}, which is not installed; pip install {install}", name
        ) from None
    if tuple(map(int, package.__version__.split(".")[: len(version)])) < version:
        raise MissingPackageError(
            f"{needs}, found {package.__version__}; pip install -U {install}", name
        )
    return package
