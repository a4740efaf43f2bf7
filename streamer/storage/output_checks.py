"""Check an output's path, its name and the free space on its disk, without writing."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from streamer.errors import OutputError, OutputExistsError, StorageError, UsageError
from streamer.storage.atomic_file import partial_name
from streamer.storage.files import make_directory
from streamer.units import format_sizes


def refuse_symlink(path: Path) -> None:
    """Refuse an output that is a symlink."""
    if path.is_symlink():
        raise OutputError(
            f"{path}: is a symlink, and writing never follows one; name its target {os.path.realpath(path)}"
        )


def refuse_address(path: Path) -> None:
    """Refuse an output given as ``-``, or as a URL like ``s3://bucket/name``, which would become directories here."""
    if path == Path("-"):
        raise UsageError(
            f"{path}: expected a path, found the sign for stdout: outputs are resumable files; name one (--json prints to stdout)"
        )
    scheme = re.fullmatch(r"[a-z][a-z0-9+.-]+:", path.parts[0] if path.parts else "")
    if scheme and not os.path.lexists(path.parts[0]):
        raise UsageError(f"{path}: is an address, and outputs are written to disks; write to a directory and upload it")


def is_placeholder(path: Path) -> bool:
    """Test whether an empty regular file is here, as ``mktemp`` and workflow systems create one for a future output."""
    try:
        found = path.stat(follow_symlinks=False)
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == 0


def is_taken(path: Path) -> bool:
    """Test whether a new file's name is taken; an empty file is a placeholder and does not count."""
    return path.exists() and not is_placeholder(path)


def check_replaced(path: Path, overwrite: bool, is_own: Callable[[Path], bool], what: str) -> None:
    """Refuse a file's path if another file exists there, and create its directory.

    Parameters
    ----------
    overwrite
        Whether to replace an existing file of this kind; other files are never replaced unless empty.
    is_own
        Tests whether a file may be replaced.
    what
        Name of that kind of file, for messages.
    """
    refuse_address(path)
    refuse_directory(path)
    refuse_symlink(path)
    if path.exists() and path.stat().st_size > 0:
        if not overwrite:
            raise OutputExistsError(f"{path}: exists; choose another output, or pass overwrite=True", path)
        if not is_own(path):
            raise not_own(path, what)
    make_directory(path.parent)


def refuse_directory(path: Path, example: str = "", what: str = "file") -> None:
    """Refuse a directory instead of a file to write; `example` is a possible name."""
    if path.is_dir():
        raise OutputError(
            f"{path}: is a directory; name a {what} in it{f', such as {path / example}' if example else ''}"
        )


def check_file_path(path: Path, example: str, longest: str, what: str = "file") -> None:
    """Refuse a path at which no file can be written: an address, a directory, a symlink, inside a hub cache.

    Parameters
    ----------
    example, what
        A possible name, and the kind of file, for messages.
    longest
        The longest name beside it, whose partial file must have a possible name, too.
    """
    refuse_address(path)
    refuse_symlink(path)
    refuse_directory(path, example, what)
    check_output_path(path.parent.resolve(), (), path)
    check_name(path, partial_name(longest))


def not_own(path: Path, what: str) -> OutputExistsError:
    """Make the error for an output of a kind that this command does not replace."""
    return OutputExistsError(
        f"{path}: exists and is not {what}, which is all that is replaced; choose another output", path
    )


def holds(path: Path, what: str) -> OutputExistsError:
    """Make the error for an output that holds something else, which the user may allow to be replaced."""
    return OutputExistsError(f"{path}: holds {what}; choose another output, or pass --overwrite", path)


def touch(paths: Sequence[Path]) -> str:
    """Set the times of files to now, so that `make` considers them newer than their inputs; contents do not change.

    Returns
    -------
    str
        Why the first failure happened; empty if there was none. A finished output on a read-only disk is not an error.
    """
    for path in paths:
        try:
            os.utime(path)
        except OSError as e:
            return f"{path}: {e.strerror or e}"
    return ""


def check_output_path(path: Path, inputs: Sequence[Path], output: Path | None = None) -> None:
    """Refuse an output that is a symlink or an input, is inside an input or a hub cache, or cannot be written.

    Parameters
    ----------
    path
        Directory to write to.
    inputs
        Input directories and files that must not contain the output.
    output
        The output as the user named it, for messages, if it is a file in the directory.
    """
    refuse_symlink(path)
    refuse_address(path)
    real = Path(os.path.realpath(path))
    path = output or path
    for source in inputs:
        inside = Path(os.path.realpath(source))
        if _same(real, inside):
            raise OutputError(f"{path}: is the input {source}; choose another output")
        if any(_same(parent, inside) for parent in real.parents):
            raise OutputError(f"{path}: lies inside the input {source}; choose an output outside it")
        if any(_same(real, parent) for parent in inside.parents):
            raise OutputError(f"{path}: contains the input {source}; choose an output beside it")
    for parent in (real, *real.parents):
        if parent.name.startswith(("models--", "datasets--", "spaces--")) and any(
            (parent / part).is_dir() for part in ("blobs", "refs", "snapshots")
        ):
            raise OutputError(f"{path}: lies inside a hub cache, which is never written to; choose another output")
    nowhere = next((p for p in path.parents if p.is_symlink() and not p.exists()), None)
    if nowhere is not None:
        raise OutputError(f"{path}: {nowhere} is a link that leads nowhere; choose another output")
    there = _existing(real.parent if is_placeholder(real) else real)
    if not there.is_dir():
        what = "is" if os.path.realpath(path) == str(there) else f"{there} is"
        raise OutputError(f"{path}: {what} not a directory; choose another output")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: {there} is not writable; choose another output")


def check_name(path: Path, longest: str) -> None:
    """Refuse an output if a file, even a temporary one, would get a name longer than the file system allows."""
    most, found = os.pathconf(_existing(path.parent), "PC_NAME_MAX"), len(os.fsencode(longest))
    if 0 < most < found:
        raise OutputError(
            f"{path}: its name is too long: with what a partial file adds it has {found} bytes, the file system takes {most}; "
            "choose a shorter name"
        )


def free_bytes(path: Path) -> int:
    """Return the free bytes on the disk of a path, which need not exist."""
    return shutil.disk_usage(_existing(path)).free


def check_space(path: Path, needed: int, at_most: bool = False) -> None:
    """Refuse a plan that does not fit on the disk; `at_most` means that less may be needed."""
    free = free_bytes(path)
    if needed > free:
        wanted, found = format_sizes(needed, free)
        raise StorageError(
            f"{path}: needs {'up to ' if at_most else ''}{wanted}, the disk has {found} free; free some space, "
            "or choose another disk"
        )


def allocated_bytes(path: Path) -> int:
    """Return the bytes on disk that removing a file would free; 0 if there is none."""
    try:
        return path.stat(follow_symlinks=False).st_blocks * 512
    except OSError:
        return 0


def _same(a: Path, b: Path) -> bool:
    """Test whether two paths are the same, also by device and inode: a mount shows a directory under a second name."""
    return a == b or (a.exists() and b.exists() and a.samefile(b))


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.parents) if p.exists())
