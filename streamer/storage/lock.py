"""Lock files, so that only one run at a time writes an output."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from streamer.errors import LockedError, OutputError
from streamer.storage.files import storage_error


@contextlib.contextmanager
def locked(path: Path, output: Path | None = None) -> Iterator[None]:
    """Hold the lock file at `path` and remove it at the end. The lock of a dead process does not hold.

    Parameters
    ----------
    path
        The lock file.
    output
        The locked output, for messages; by default the lock's directory.

    Raises
    ------
    LockedError
        If another process holds the lock; raised at once, without waiting.
    """
    output = output or path.parent
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as e:
            if e.errno == errno.ELOOP:
                raise OutputError(f"{path}: a symlink has the name of the lock; remove it") from None
            raise storage_error(path, "lock", e) from e
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise LockedError(f"{output}: another run is writing here; wait for it, or choose another output") from None
        except OSError:
            pass  # a file system without locks: unique partial names still keep runs apart
        # The previous holder may have removed the file between our open and our lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False)):
                break
        os.close(fd)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(fd)
