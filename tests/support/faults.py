"""System calls that go wrong."""

import os
from collections.abc import Callable


def failing(number: int) -> Callable[..., int]:
    """A system call that fails with this errno, each time."""

    def call(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    return call
