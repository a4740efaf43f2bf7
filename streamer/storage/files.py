"""Wrap the system's calls on files, with substitutes where a system lacks one; lock files, identify them, and parse their JSON.

Linux has all of them. macOS lacks `posix_fallocate`, `posix_fadvise` and `sched_getaffinity`, and before version 11 also
`preadv`; its `fsync` leaves bytes in the disk's own cache, which only ``F_FULLFSYNC`` empties.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from streamer import errors
from streamer.json_types import Count, Sha256
from streamer.units import listed

UNSUPPORTED_ERRNOS = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY}
"""Errors by which a file system reports that it does not support a call."""

MAX_CALL_BYTES = 1 << 30
"""Most bytes read or written by one call: macOS refuses 2 GiB or more."""

# Parameters of `mallopt`, as glibc's ``malloc.h`` numbers them.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def reserve(fd: int, size: int) -> None:
    """Reserve a file's bytes on disk; without `posix_fallocate` a full disk is found only by the write that does not fit.

    Raises
    ------
    OSError
        If the disk has no space for them.
    """
    if size and hasattr(os, "posix_fallocate"):
        with _unless_unsupported():
            os.posix_fallocate(fd, 0, size)


@contextlib.contextmanager
def _unless_unsupported() -> Iterator[None]:
    """Ignore that a file system does not support a call."""
    try:
        yield
    except OSError as e:
        if e.errno not in UNSUPPORTED_ERRNOS:
            raise


def sync(fd: int) -> None:
    """Make a file's bytes, or a directory's entries, durable: by ``F_FULLFSYNC`` if the system has it, else by `fsync`.

    Raises
    ------
    OSError
        If the system refuses; never retry on the same file.
    """
    if hasattr(fcntl, "F_FULLFSYNC"):
        with _unless_unsupported():
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


LARGEST_FOLIO = 2 << 20
"""Most bytes that a kernel keeps as one unit of its page cache."""


def drop_cached(fd: int, at: int, length: int) -> None:
    """Drop bytes of a file from the page cache; do nothing if the system does not support it.

    The kernel drops a folio only if the range covers all of it, so the range starts early enough for one that also holds bytes before it:
    of a file that was read and dropped in pieces of 512 KiB, Linux 6.18 on ext4 kept 35 % otherwise.
    """
    advice: int | None = getattr(os, "POSIX_FADV_DONTNEED", None)
    if hasattr(os, "posix_fadvise") and advice is not None:
        start = max(0, at - LARGEST_FOLIO)
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, start, at + length - start, advice)


def read_at(fd: int, out: memoryview, at: int) -> int:
    """Read bytes of a file from offset `at` into `out` in one call; return their number, 0 at the end of the file."""
    out = out[:MAX_CALL_BYTES]
    if hasattr(os, "preadv"):
        return os.preadv(fd, [out], at)
    piece = os.pread(fd, len(out), at)
    out[: len(piece)] = piece
    return len(piece)


def available_cores(
    cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int:
    """Count the cores that this process may use, by its affinity mask and its control groups' quotas (version 2), rounded up.

    Parameters
    ----------
    cgroups, membership
        Directory where Linux mounts control groups, and the file that names this process' group.
    """
    cores = float(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    group = cgroups
    with contextlib.suppress(OSError):  # such as 0::/user.slice/job
        group /= (
            membership.read_text("utf-8", "surrogateescape").partition("::")[2].strip().lstrip("/")
        )
    # In a container the path may be the host's; the root of the mount is then the container's own group.
    for directory in {cgroups, *(p for p in (group, *group.parents) if cgroups in p.parents)}:
        with contextlib.suppress(
            OSError, ValueError, ZeroDivisionError
        ):  # no quota: no such file, or "max"
            quota, period = (directory / "cpu.max").read_text("ascii").split()
            cores = min(cores, float(quota) / float(period))
    return max(1, math.ceil(cores))


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


Stamp = tuple[int, int, int, int]
"""Device, inode, size and mtime in ns, which must not change while a plan is carried out."""


def file_stamp(st: os.stat_result) -> Stamp:
    """Return the stamp in a stat result."""
    return st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns


def open_regular(path: Path, what: str) -> tuple[int, os.stat_result]:
    """Open a regular file for reading; refuse others, because a FIFO would block and a device might never end.

    Raises
    ------
    MissingInputError, FormatError, StorageError
        If the file is missing, is not a regular file, or cannot be opened; `what` names the expected file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise errors.MissingInputError(
            f"{path}: no such file; check the path, or finish the download", path
        ) from None
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise errors.FormatError(
                f"{path}: expected {what}, found a link that leads to itself"
            ) from None
        raise storage_error(path, "open", e) from e
    st = os.fstat(fd)
    if not stat.S_ISREG(st.st_mode):
        os.close(fd)
        raise errors.FormatError(
            f"{path}: expected {what}, found something that is not a regular file"
        )
    return fd, st


def read_regular(path: Path, what: str) -> bytes:
    """Read a regular file whole; see `open_regular`."""
    fd, _ = open_regular(path, what)
    with storage_errors(path, "read"), os.fdopen(fd, "rb") as file:
        return file.read()


def read_bytes(fd: int, length: int, at: int) -> bytes:
    """Read bytes from offset `at`, repeating calls that return fewer; fewer only at the end of the file."""
    out = bytearray()
    while len(out) < length and (
        piece := os.pread(fd, min(length - len(out), MAX_CALL_BYTES), at + len(out))
    ):
        out += piece
    return bytes(out)


def make_directory(path: Path) -> None:
    """Create a directory and its missing parents durably; leave an existing one unchanged."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    with storage_errors(path, "create"):
        path.mkdir(parents=True, exist_ok=True)
        for new in reversed(missing):
            fsync_directory(new.parent)


def remove_file(path: Path) -> None:
    """Remove a file durably, if it exists."""
    with storage_errors(path, "remove"), contextlib.suppress(FileNotFoundError):
        path.unlink()
        fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make the directory's entries durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(fd)
    finally:
        os.close(fd)


def storage_error(path: Path, action: str, e: OSError) -> errors.StorageError | errors.OutputError:
    """Convert an `OSError` into an error that says where it happened, what failed, and what to do."""
    kind = errors.OutputError if e.errno == errno.ENAMETOOLONG else errors.StorageError
    return kind(f"{path}: cannot {action}: {e.strerror or e}; {errors.advice(e)}")


@contextlib.contextmanager
def storage_errors(path: Path, action: str) -> Iterator[None]:
    """Convert an `OSError` in the block into a `storage_error`."""
    try:
        yield
    except errors.StreamerError:
        raise
    except OSError as e:
        raise storage_error(path, action, e) from e


def absent(path: Path, what: str) -> errors.MissingInputError:
    """Make the error for a missing input directory; `what` names the expected input."""
    hint = "a hub name has the form OWNER/NAME"
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path)):
        hint = "an address has two slashes, of which a Path keeps one"
    return errors.MissingInputError(
        f"{path}: no such directory; check the path of the {what}; {hint}", path
    )


def lacks(path: Path, name: str, advice: str) -> errors.MissingInputError:
    """Make the error for an input directory without a file; the message says what the directory holds instead."""
    with storage_errors(path, "read"):
        found = listed(sorted(p.name for p in path.iterdir()), 6, room=120) or "nothing"
    return errors.MissingInputError(
        f"{path}: expected {name}, found {found}; {advice}", path / name
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {twice!r} appears twice")
    return out


def _finite(text: str) -> float:
    """Parse a number; also called for the constants Infinity and NaN, which are not JSON."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def _integer(text: str) -> int | float:
    # As in the library's parser: an integer beyond 64 bits must still fit a double, and −0 is not an integer.
    if len(text) > 20:
        _finite(text)
    return -0.0 if text == "-0" else int(text)


def strict_json(raw: bytes, surrogates: bool = False) -> Any:
    """Parse standard JSON: UTF-8, no duplicate keys, no NaN, nothing beyond a double; every fault is a `ValueError`.

    Parameters
    ----------
    surrogates
        Whether strings may contain lone surrogates, as paths that are not UTF-8 do; Python cannot encode them.
    """
    try:
        hooks: dict[str, Any] = {
            "parse_constant": _finite,
            "parse_float": _finite,
            "parse_int": _integer,
        }
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, **hooks)
        if b"\\u" in raw and not surrogates:  # Python's parser accepts them
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


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
                raise errors.OutputError(
                    f"{path}: a symlink has the name of the lock; remove it"
                ) from None
            raise storage_error(path, "lock", e) from e
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise errors.LockedError(
                f"{output}: another run is writing here; wait for it, or choose another output"
            ) from None
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


# fmt: off
class FileIdentity(TypedDict):
    """A safetensors file of an input."""
    file: Annotated[str, "Its name."]
    bytes: Annotated[Count, "Its size in bytes."]
    header_sha256: Annotated[Sha256, "Digest of its safetensors header (SHA-256, hexadecimal)."]
    sample_sha256: Annotated[Sha256, "Digest of a sample of every tensor (SHA-256, hexadecimal)."]

class BaseIdentity(TypedDict):
    """Identity of a base."""
    files: Annotated[list[FileIdentity], "Its safetensors files."]
    architecture: NotRequired[Annotated[str, "Class of the base, if the user named it (--architecture)."]]
    in_memory: NotRequired[Annotated[bool, "True if the model was in memory; its tensors are listed as one file. Otherwise absent."]]

class StatedIdentity(TypedDict):
    """Facts about an adapter that the user states if its files do not; see `streamer.adapters.adapter_config`."""
    base_is_residual: NotRequired[Annotated[bool, "True if --base-is-residual stated that the base is the adapter's residual."]]
    lora_b_layout: NotRequired[Annotated[Literal["rank_major", "grouped_by_expert"], "Stated order of lora_B's columns."]]
    ignored_keys: NotRequired[Annotated[list[str], "Unknown keys of adapter_config.json that the user ignored (--ignore-key)."]]

class AdapterIdentity(StatedIdentity):
    """Identity of an adapter, or of a fine-tuned model used as one."""
    weights_sha256: NotRequired[Annotated[Sha256, "Digest of all tensors of an adapter (SHA-256, hexadecimal)."]]
    config_sha256: NotRequired[Annotated[Sha256, "Digest of its adapter_config.json (SHA-256, hexadecimal)."]]
    modules: Annotated[Count, "Modules that it changes."]
    base_model_name_or_path: NotRequired[Annotated[str | None, "The base's name in its config; in findings it may be a path."]]
    files: NotRequired[Annotated[list[FileIdentity], "Its safetensors files; only for a fine-tuned model."]]
# fmt: on


def difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Describe briefly how two identities differ."""
    keys = [k for k in {**first, **second} if first.get(k) != second.get(k)]
    if "files" in keys:
        a = first.get("files", [])
        b = second.get("files", [])
        if [f["file"] for f in a] != [f["file"] for f in b]:
            return f"files {[f['file'] for f in a][:3]} against {[f['file'] for f in b][:3]}"
        changed = next(x["file"] for x, y in zip(a, b, strict=True) if x != y)
        return f"the content of {changed} differs"
    return f"{', '.join(keys)} differ"


def check_identities(*identities: Any) -> None:
    """Raise ValueError unless all identities, read from a file, have the form that `difference` expects."""
    for identity in identities:
        files = identity.get("files", []) if isinstance(identity, dict) else None
        if not isinstance(files, list) or not all(
            isinstance(f, dict) and isinstance(f.get("file"), str) for f in files
        ):
            raise ValueError("the identity of the base or of the adapter has the wrong form")
