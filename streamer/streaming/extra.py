"""Import transformers and silence it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streamer.errors import FormatError, StreamerError, UnsupportedError
from streamer.packages import require_package
from streamer.storage.files import storage_error

LOGGERS = ("transformers", "torchao", "bitsandbytes", "torch.utils._pytree")
"""Loggers of transformers and of libraries that it imports if they are installed, whether or not a model needs them."""

ERROR_LENGTH = 120
"""Most characters of another library's message that ours quotes."""


def require_transformers() -> Any:
    """Import transformers; see `require_package`."""
    return require_package("transformers", (5,), "evaluate and fit need transformers 5", "evaluate")


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or its class if the message is empty."""
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextlib.contextmanager
def refused_errors(path: Path, model: nn.Module) -> Iterator[None]:
    """Turn an error that a model's own code raises inside the context into one line that names the module.

    Parameters
    ----------
    path
        The base, for the message.

    Raises
    ------
    UnsupportedError
        If the error comes from outside this package and is neither a lack of memory nor a failure to read a file.
    MemoryError
        If torch runs out of memory; torch reports this as a `RuntimeError`, on the CPU without a class of its own.
    """
    try:
        yield
    except (StreamerError, OSError, MemoryError):
        raise
    except Exception as e:  # the model's own modules may raise anything
        frames = [frame for frame, _ in traceback.walk_tb(e.__traceback__)]
        if frames[-1].f_globals.get("__name__", "").startswith("streamer."):  # our own bugs keep their traceback
            raise
        if "DefaultCPUAllocator" in str(e) or isinstance(e, torch.cuda.OutOfMemoryError):
            raise MemoryError(first_line(e)) from e
        names = {id(module): name for name, module in model.named_modules()}
        where = next((names[at] for frame in reversed(frames) if (at := id(frame.f_locals.get("self"))) in names), "")
        raise UnsupportedError(
            f"{path}: {f'module {where!r} of ' if where else ''}{type(model).__name__} raises {type(e).__name__}: "
            f"{first_line(e)[:ERROR_LENGTH]}; try a smaller --length, or measure merged models"
        ) from e


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence warnings, and messages below errors, of transformers and what it imports: a library must not print, or stop at them.

    An import warns of deprecations, which ``-W error`` would turn into exceptions.
    """
    with contextlib.ExitStack() as undo, warnings.catch_warnings(action="ignore"):
        for logger in map(logging.getLogger, LOGGERS):
            undo.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


def unreadable(path: Path, what: str, e: Exception) -> StreamerError:
    """Make the error for a file that transformers cannot read: its contents are at fault, or the system refused to read it.

    transformers may raise another error in place of the system's; the tokenizers library states the system's number in its message alone.
    """
    cause: BaseException | None = e
    while cause is not None:
        number = re.search(r"\(os error (\d+)\)", str(cause))
        found = OSError(int(number[1]), os.strerror(int(number[1]))) if number else cause
        if isinstance(found, OSError) and found.errno and not isinstance(found, FileNotFoundError | IsADirectoryError):
            return storage_error(path, "read", found)
        cause = cause.__cause__ or cause.__context__
    return FormatError(f"{path}: {what}: {first_line(e)}")
