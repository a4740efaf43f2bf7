"""Wrap system calls that some systems lack, each with a substitute.

Linux has all of them. macOS lacks `posix_fallocate`, `posix_fadvise` and `sched_getaffinity`, and before version 11 also
`preadv`; its `fsync` leaves bytes in the disk's own cache, which only ``F_FULLFSYNC`` empties.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import math
import os
from pathlib import Path
from typing import Any

UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY}
"""Errors by which a file system reports that it does not support a call."""

MAX_CALL_BYTES = 1 << 30
"""Most bytes read or written by one call: macOS refuses 2 GiB or more."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of `mallopt`, as glibc's ``malloc.h`` numbers them."""


def reserve(fd: int, size: int) -> None:
    """Reserve a file's bytes on disk; without `posix_fallocate` a full disk is found only by the write that does not fit.

    Raises
    ------
    OSError
        If the disk has no space for them.
    """
    if size == 0 or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as e:
        if e.errno not in UNSUPPORTED:
            raise


def sync(fd: int) -> None:
    """Make a file's bytes, or a directory's entries, durable: by ``F_FULLFSYNC`` if the system has it, else by `fsync`.

    Raises
    ------
    OSError
        If the system refuses; never retry on the same file.
    """
    if hasattr(fcntl, "F_FULLFSYNC"):
        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
        except OSError as e:
            if e.errno not in UNSUPPORTED:
                raise
    os.fsync(fd)


def drop_cached(fd: int, at: int, length: int) -> None:
    """Drop bytes of a file from the page cache; do nothing if the system does not support it."""
    advice: int | None = getattr(os, "POSIX_FADV_DONTNEED", None)
    if hasattr(os, "posix_fadvise") and advice is not None:
        try:
            os.posix_fadvise(fd, at, length, advice)
        except OSError:
            return


def read_at(fd: int, out: memoryview, at: int) -> int:
    """Read bytes of a file from offset `at` into `out` in one call; return their number, 0 at the end of the file."""
    out = out[:MAX_CALL_BYTES]
    if hasattr(os, "preadv"):
        return os.preadv(fd, [out], at)
    piece = os.pread(fd, len(out), at)
    out[: len(piece)] = piece
    return len(piece)


def available_cores(cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Count the cores that this process may use, by its affinity mask and its control group's quota, rounded up.

    Parameters
    ----------
    cgroups, membership
        Directories where Linux mounts control groups, and the file that names this process' groups.
    """
    masked = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(masked, _quota(cgroups, membership))))


def _quota(cgroups: Path, membership: Path) -> float:
    """Read the number of cores that this process' control groups allow, from innermost to outermost; infinite if none sets a limit."""
    quota = math.inf
    try:
        lines = membership.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return quota
    for line in lines:  # such as 0::/user.slice/job (version 2) and 4:cpu,cpuacct:/job (version 1)
        _, controllers, inner = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups / controllers if controllers else cgroups
        group = root / inner.lstrip("/")
        # In a container the path may be the host's; the root of the mount is then the container's own group.
        for directory in {root, *(p for p in (group, *group.parents) if root in p.parents)}:
            quota = min(quota, _quota_of(directory, bool(controllers)))
    return quota


def _quota_of(group: Path, first_version: bool) -> float:
    try:
        if first_version:
            most, period = ((group / f"cpu.cfs_{name}_us").read_text("ascii").strip() for name in ("quota", "period"))
        else:
            most, period = (group / "cpu.max").read_text("ascii").split()
        return float(most) / float(period) if most not in ("max", "-1") else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def give_freed_memory_back() -> None:
    """Return freed memory of all threads to the system, if the allocator keeps it and supports this (glibc)."""
    if (trim := _glibc("malloc_trim")) is not None:
        trim(0)


@functools.cache
def limit_freed_memory() -> None:
    """Limit the freed memory that each thread's heap keeps, until the process ends, if the allocator is glibc.

    By default glibc raises both limits as blocks are freed, up to 32 and 64 MB. `give_freed_memory_back` does not reach the end of a heap
    other than the main thread's, so each thread that waits would keep that much. Low limits cost page faults, up to 40 % more processor
    time in a fit by inputs, so only a memory budget sets them.
    """
    if (setting := _glibc("mallopt")) is not None:
        setting(M_MMAP_THRESHOLD, 8 << 20)  # larger blocks are mapped one by one
        setting(M_TRIM_THRESHOLD, 1 << 20)  # a heap's end keeps no more


@functools.cache
def _glibc(name: str) -> Any:
    """Return a function of glibc; None elsewhere."""
    return getattr(ctypes.CDLL(None), name, None)
