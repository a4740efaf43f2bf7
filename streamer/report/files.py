"""Write a report's files, a page or a directory of figures, atomically; replace nothing but reports."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from streamer.detection.findings_file import lock_of
from streamer.errors import OutputError, OutputExistsError, UsageError
from streamer.report.figures import FIGURES, IMAGE_FORMATS, draw_figures
from streamer.report.figures import SIGN as FIGURE_SIGN
from streamer.report.page import SIGN as PAGE_SIGN
from streamer.report.page import make_page
from streamer.report.subject import Collection, Subject
from streamer.storage.atomic_file import partial_name, remove_partials, write_atomic
from streamer.storage.files import make_directory, storage_errors
from streamer.storage.lock import locked
from streamer.storage.output_checks import (
    check_name,
    check_output_path,
    check_space,
    is_placeholder,
    refuse_address,
    refuse_symlink,
    touch,
)
from streamer.storage.output_plan import refuse_within_output

PAGES = (".html", ".htm")

HEAD = 4096
"""Number of bytes at the start of a file that contain a report's sign."""


@dataclass(frozen=True)
class WrittenReport:
    """Result of writing a report.

    Attributes
    ----------
    state
        ``present`` if all files already existed.
    files
        Sizes in bytes by name, in the output's directory.
    """

    state: Literal["written", "present"]
    files: Mapping[str, int]


def write_files(subject: Subject | Collection, output: str | Path, overwrite: bool = False) -> WrittenReport:
    """Write a report's page or its figures.

    Parameters
    ----------
    subject
        Subject of the report.
    output
        A name that ends in .html, or a directory for SVG and PNG, which may exist.
    overwrite
        Whether to replace another report there, and remove figures that this one does not have; other files are never replaced.

    Raises
    ------
    UsageError
        If the output's name has another ending, or matplotlib is missing.
    OutputError
        If something exists there that must not be replaced, or nothing can be written there.
    """
    path = Path(output)
    check_path(path)
    if isinstance(subject, Collection) and path.suffix.lower() not in PAGES:
        raise UsageError(
            f"{path}: figures are of one adapter; name its findings, or write a page of all adapters, such as -o {path}.html"
        )
    if path.suffix.lower() in PAGES:
        files, directory, lock = {path.name: make_page(subject)}, path.parent, lock_of(path)
    else:
        assert isinstance(subject, Subject)
        files, directory, lock = draw_figures(subject), path, path / ".report.lock"
    present = [_is_present(directory / name, data, overwrite) for name, data in files.items()]
    sizes = {name: len(data) for name, data in files.items()}
    stale = [] if path.suffix.lower() in PAGES else _stale(path, files, overwrite)
    if all(present) and not stale:
        touch([directory / name for name in files])
        return WrittenReport("present", sizes)
    check_space(path, sum(sizes.values()))
    make_directory(directory)
    with ExitStack() as stack:
        stack.enter_context(locked(lock, path))
        remove_partials(directory, set(files))
        for name, data in files.items():
            _is_present(directory / name, data, overwrite)  # another run may have written it meanwhile
            write_atomic(directory / name, data)
        with storage_errors(path, "write"):
            for old in stale:
                old.unlink(missing_ok=True)
    return WrittenReport("written", sizes)


def check_path(path: Path) -> None:
    """Refuse a path at which no report can be written; see `write_files`."""
    refuse_address(path)
    refuse_symlink(path)
    page = path.suffix.lower() in PAGES
    if page and path.is_dir():
        raise OutputError(f"{path}: is a directory; name a page in it, such as {path / 'report.html'}")
    if not page and path.suffix and not path.is_dir():
        raise UsageError(
            f"{path}: expected a page, whose name ends in .html, or a directory for figures, without an ending"
        )
    check_output_path(path.parent if page else path, (), path)
    check_name(path / "x" if not page else path, partial_name(path.name if page else "thresholds.svg"))
    refuse_within_output(path)


def _is_present(path: Path, data: bytes, overwrite: bool) -> bool:
    """Test whether a file already has these bytes; refuse a file that must not be replaced."""
    refuse_symlink(path)
    if not path.exists() or is_placeholder(path):
        return False
    if not path.is_file():
        raise OutputError(f"{path}: is not a regular file; choose another output")
    head = _head(path)
    with storage_errors(path, "read"):
        if path.stat().st_size == len(data) and path.read_bytes() == data:
            return True
    if not _is_report(path.suffix.lower(), head):
        raise OutputExistsError(
            f"{path}: exists and is not a report; only reports are replaced; choose another output", path
        )
    if not overwrite:
        raise OutputExistsError(f"{path}: holds another report; choose another output, or pass --overwrite", path)
    return False


def _stale(directory: Path, files: Mapping[str, bytes], overwrite: bool) -> list[Path]:
    """List figures of an earlier report that this one does not have; refuse them unless `overwrite`."""
    named = [directory / f"{stem}.{image_format}" for stem in FIGURES for image_format in IMAGE_FORMATS]
    stale = [old for old in named if old.name not in files and old.is_file() and _is_report(old.suffix, _head(old))]
    if stale and not overwrite:
        raise OutputExistsError(
            f"{stale[0]}: belongs to another report, and this one lacks it; choose another output, or pass --overwrite to remove it",
            stale[0],
        )
    return stale


def _head(path: Path) -> bytes:
    with storage_errors(path, "read"), path.open("rb") as file:
        return file.read(HEAD)


def _is_report(suffix: str, head: bytes) -> bool:
    """Test whether a file begins like a report of its kind; naming the command in its text is not enough."""
    sign = FIGURE_SIGN.encode()
    if suffix == ".png":
        return head.startswith(b"\x89PNG") and b"tEXtSoftware\0" + sign in head
    if suffix == ".svg":
        return b"<dc:title>" + sign + b"</dc:title>" in head
    return head.startswith(PAGE_SIGN.encode())
