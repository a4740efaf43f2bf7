"""Write a report's page atomically; replace nothing but reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from streamer.detection.findings_file import lock_of
from streamer.errors import OutputError, OutputExistsError, UsageError
from streamer.report.page import SIGN, make_page
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


@dataclass(frozen=True)
class WrittenReport:
    """Result of writing a report.

    Attributes
    ----------
    state
        ``present`` if the page already existed.
    files
        Its size in bytes by name.
    """

    state: Literal["written", "present"]
    files: Mapping[str, int]


def write_files(subject: Subject | Collection, output: str | Path, overwrite: bool = False) -> WrittenReport:
    """Write a report's page.

    Parameters
    ----------
    subject
        Subject of the report.
    output
        A name that ends in .html.
    overwrite
        Whether to replace another report there; other files are never replaced.

    Raises
    ------
    UsageError
        If the output's name has another ending.
    OutputError
        If something exists there that must not be replaced, or nothing can be written there.
    """
    path = Path(output)
    check_path(path)
    data = make_page(subject)
    size = {path.name: len(data)}
    if _is_present(path, data, overwrite):
        touch([path])
        return WrittenReport("present", size)
    check_space(path, len(data))
    make_directory(path.parent)
    with locked(lock_of(path), path):
        remove_partials(path.parent, {path.name})
        _is_present(path, data, overwrite)  # another run may have written it meanwhile
        write_atomic(path, data)
    return WrittenReport("written", size)


def check_path(path: Path) -> None:
    """Refuse a path at which no report can be written; see `write_files`."""
    refuse_address(path)
    refuse_symlink(path)
    if path.suffix.lower() not in PAGES:
        raise UsageError(
            f"{path}: expected a page, whose name ends in .html; figures for a paper were removed: print the page, or save "
            "pictures of it"
        )
    if path.is_dir():
        raise OutputError(f"{path}: is a directory; name a page in it, such as {path / 'report.html'}")
    check_output_path(path.parent, (), path)
    check_name(path, partial_name(path.name))
    refuse_within_output(path)


def _is_present(path: Path, data: bytes, overwrite: bool) -> bool:
    """Test whether a file already has these bytes; refuse a file that must not be replaced."""
    refuse_symlink(path)
    if not path.exists() or is_placeholder(path):
        return False
    if not path.is_file():
        raise OutputError(f"{path}: is not a regular file; choose another output")
    with storage_errors(path, "read"):
        there = path.read_bytes()
    if there == data:
        return True
    if not there.startswith(SIGN.encode()):
        raise OutputExistsError(
            f"{path}: exists and is not a report; only reports are replaced; choose another output", path
        )
    if not overwrite:
        raise OutputExistsError(f"{path}: holds another report; choose another output, or pass --overwrite", path)
    return False
