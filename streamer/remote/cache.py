"""Manage cache directories for addresses: with all files, or with placeholders for those that are read by ranges."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

from streamer.errors import FormatError
from streamer.events import Event, Monitor
from streamer.remote.listing import Listing
from streamer.storage.files import fsync_directory, storage_errors
from streamer.storage.remote_manifest import Manifest, RemoteFile, cache_directory, read_manifest
from streamer.storage.remote_retries import in_context, read_range
from streamer.storage.remote_source import RemoteSource
from streamer.storage.system import sync
from streamer.units import quoted

PIECE_BYTES = 8 << 20
ASKED_AT_ONCE = 8

DEAD_SECONDS = 3600
"""Seconds without a new byte after which a download counts as killed; a running download waits at most minutes."""

T = TypeVar("T")
V = TypeVar("V")


def at_once(ask: Callable[[T], V], items: Iterable[T]) -> list[V]:
    """Query a server about several files concurrently; results are in order."""
    with ThreadPoolExecutor(ASKED_AT_ONCE, thread_name_prefix="streamer ask") as pool:
        return list(pool.map(in_context(ask), items))


def directory_for(kind: str, listing: Listing, *inside: str) -> Path:
    """Return the directory for exactly these versions of the files; other versions have another directory."""
    files = sorted((name, file.shown, file.size, file.version) for name, file in listing.files.items())
    key = hashlib.sha256(json.dumps([listing.address, files]).encode()).hexdigest()[:16]
    return cache_directory() / kind / key / Path(*inside or (listing.name,))


def make_private(path: Path) -> None:
    """Create a directory of the cache, readable only by its owner."""
    with storage_errors(path, "create"):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)


def is_complete(directory: Path, listing: Listing) -> bool:
    """Test whether a directory holds all files of these versions; the manifest is written last."""
    if read_manifest(directory) is None:
        return False
    return all((directory / name).is_file() and (directory / name).stat().st_size == file.size
               for name, file in listing.files.items())  # fmt: skip


def download_all(listing: Listing, monitor: Monitor) -> Path:
    """Download all files of a listing unless they exist; a stopped run resumes with the unfinished file."""
    directory = directory_for("files", listing)
    if is_complete(directory, listing):
        Manifest(listing.address, {}).write(directory)
        return directory
    download(directory, listing.files, monitor)
    Manifest(listing.address, {}).write(directory)
    return directory


def download(directory: Path, files: Mapping[str, RemoteFile], monitor: Monitor) -> None:
    """Download files into a directory; each gets its name when it is complete."""
    make_private(directory)
    total, done = sum(file.size for file in files.values()), 0
    for i, (name, file) in enumerate(files.items()):
        path = directory / name
        if not (path.is_file() and path.stat().st_size == file.size):
            make_private(path.parent)
            _remove_dead(path.parent)
            new = path.with_name(f".streamer.{path.name}.{token_hex(8)}.partial")
            try:
                for at in _copy(file, new):
                    monitor.checkpoint()
                    monitor.emit(Event("download", name, done + at, total, i, len(files)))
                if path.suffix == ".json":
                    parse_json(new.read_bytes(), file)
                with storage_errors(path, "write"):
                    new.replace(path)
                    fsync_directory(path.parent)
            finally:
                new.unlink(missing_ok=True)
        done += file.size
    if total:
        monitor.emit(Event("download", "", total, total, len(files), len(files)))


def parse_json(raw: bytes, file: RemoteFile) -> Any:
    """Parse JSON as transformers writes it, allowing Infinity and NaN.

    Raises
    ------
    FormatError
        If it is not JSON, such as an error page of a server; the message names the address.
    """
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise FormatError(
            f"{file.shown}: expected JSON, found something else ({quoted(str(e))}); check the address"
        ) from None


def _remove_dead(directory: Path) -> None:
    """Remove partial downloads of killed runs; running ones keep changing theirs."""
    for partial in directory.glob(".streamer.*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > DEAD_SECONDS:
                partial.unlink()


def _copy(file: RemoteFile, path: Path) -> Iterable[int]:
    """Copy a file by several concurrent range requests, and yield the bytes done."""
    source = RemoteSource(file)
    with storage_errors(path, "write"), open(path, "xb") as out:
        buffer = memoryview(bytearray(min(PIECE_BYTES, file.size)))
        for at in range(0, file.size, PIECE_BYTES):
            yield at
            piece = buffer[: min(PIECE_BYTES, file.size - at)]
            if file.size <= PIECE_BYTES:  # works even on servers without ranges
                read_range(file, piece, 0)
            else:
                source.prefetch(at, at + len(piece), file.size)
                source.read_into(piece, at)
            out.write(piece)
        out.flush()
        sync(out.fileno())
    source.check_unchanged()  # redirect targets and bucket responses carry no version of their own


def shadow(listing: Listing, directory: Path, put_small: Callable[[Path], None], to_download: int = 0,
           small: Sequence[str] = ()) -> Path:  # fmt: skip
    """Make the directory of a model whose tensors are read by ranges.

    Parameters
    ----------
    put_small
        Puts the small files there.
    to_download
        See `Manifest`.
    small
        Names of small files that are not in the listing; links among them may be broken by now.
    """
    if not is_shadow(directory, [*listing.files, *small]):
        make_private(directory)
        put_small(directory)
        for name, file in listing.weights.items():
            with storage_errors(directory / name, "write"):
                (directory / name).write_bytes(f"in place of {file.shown}, which is read by ranges\n".encode())
    Manifest(listing.address, dict(listing.weights), to_download).write(directory)  # addresses may have new signatures
    return directory


def is_shadow(directory: Path, names: Iterable[str]) -> bool:
    """Test whether a directory already stands in for these files."""
    return read_manifest(directory) is not None and all((directory / name).exists() for name in names)
