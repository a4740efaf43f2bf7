"""Turn an input that the user named into a path; all addresses pass through here."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Literal, TypeVar

from streamer.errors import UsageError
from streamer.events import Event, Monitor
from streamer.remote.addresses import HubName, parse_address
from streamer.remote.cache import directory_for, download, download_all, is_complete, make_private, shadow
from streamer.remote.hub import (
    HubFiles,
    Unreachable,
    cached_snapshot,
    is_offline,
    list_hub,
    listing_of,
    missing_bytes,
    offline,
    snapshot,
)
from streamer.remote.listing import Listing
from streamer.remote.web import list_address
from streamer.storage.files import storage_errors
from streamer.storage.remote_manifest import cache_directory
from streamer.storage.remote_retries import heed

RemoteMode = Literal["cache", "stream"]
REMOTE_MODES = ("cache", "stream")

Given = TypeVar("Given", str, Path)


@dataclass(frozen=True)
class Remote:
    """How to read inputs at addresses.

    Attributes
    ----------
    mode
        ``cache`` downloads what is needed first; ``stream`` reads by ranges; None means ``cache`` for the hub and ``stream`` elsewhere.
    peek
        Whether only headers will be read; nothing large is then downloaded in either mode.
    monitor
        Receives events and can request a stop.
    """

    mode: RemoteMode | None = None
    peek: bool = False
    monitor: Monitor = field(default_factory=Monitor)

    def __post_init__(self) -> None:
        if self.mode not in (None, *REMOTE_MODES):
            raise UsageError(f"remote: expected one of {', '.join(REMOTE_MODES)}, found {self.mode!r}")

    def path(self, given: str | Path) -> str | Path:
        """Return the local path of an input: the path itself, or the directory that stands in for an address.

        Raises
        ------
        InputError, StorageError
            If nothing exists at the address, access is denied, or no server answers.
        MissingPackageError
            If the package for such addresses is not installed.
        """
        address = parse_address(given) if isinstance(given, str) else None
        if address is None:
            return given
        heed(self.monitor)
        if isinstance(address, HubName):
            return self._hub(address)
        listing = list_address(address)
        return _inside(self._web(listing), listing)

    def paths(self, given: Sequence[str | Path]) -> list[str | Path]:
        """Return the local paths of several inputs."""
        return [self.path(one) for one in given]

    def pair(self, base: str | Path, adapter: str | Path) -> tuple[str | Path, str | Path]:
        """Return the local paths of a base and an adapter."""
        return self.path(base), self.path(adapter)

    def _web(self, listing: Listing) -> Path:
        if listing.is_adapter or (self.mode == "cache" and not self.peek):
            return download_all(listing, self.monitor)
        to_download = 0
        if self.mode == "cache":
            there = directory_for("files", listing)
            if is_complete(there, listing):
                return there
            to_download = listing.nbytes
        return shadow(listing, directory_for(_kind(to_download), listing),
                      lambda directory: download(directory, listing.small, self.monitor), to_download)  # fmt: skip

    def _hub(self, name: HubName) -> Path:
        if is_offline():
            if (found := cached_snapshot(name)) is None:
                raise offline(name)
            return _linked(found, name)
        try:
            files = list_hub(name)
        except Unreachable:
            if (found := cached_snapshot(name)) is None:
                raise
            self.monitor.emit(Event("note", f"{name.shown}: the hub cannot be reached; its cache is used"))
            return _linked(found, name)
        root = self._hub_root(files)
        directory = files.directory(root)
        return _linked(directory / files.file if files.file else directory, name)

    def _hub_root(self, files: HubFiles) -> Path:
        """Return the directory of the repository's commit."""
        streams = self.mode == "stream"
        if files.is_adapter or not (streams or self.peek):
            return snapshot(files, [*files.small, *files.weights], self.monitor)
        listing = listing_of(files)
        to_download = 0 if streams else missing_bytes(files, listing)
        if not streams and not to_download:
            return snapshot(files, [*files.small, *files.weights], self.monitor)
        owner, _, repo = files.name.repo.partition("/")
        root = directory_for(_kind(to_download), listing, f"models--{owner}--{repo}", "snapshots", files.commit)

        def put_small(directory: Path) -> None:
            if files.small:
                there = files.directory(snapshot(files, files.small, self.monitor))
                for path in files.small:
                    inside = path.removeprefix(files.start)
                    make_private((directory / inside).parent)
                    _link(directory / inside, there / inside)

        small = [path.removeprefix(files.start) for path in files.small]
        shadow(listing, files.directory(root), put_small, to_download, small)
        return root


def _kind(to_download: int) -> str:
    """Return the part of the cache; the part for forecasts also records how much a run would download."""
    return "forecasts" if to_download else "ranges"


def _inside(directory: Path, listing: Listing) -> Path:
    return directory / listing.file if listing.file else directory


def _linked(path: Path, name: HubName) -> Path:
    """Link to a commit's directory under the readable name, which names the outputs of several adapters."""
    if path.is_file():
        return path
    key = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    link = cache_directory() / "links" / key / (name.inside.rpartition("/")[2] or name.repo.rpartition("/")[2])
    make_private(link.parent)
    _link(link, path)
    return link


def _link(link: Path, to: Path) -> None:
    with storage_errors(link, "write"):
        if link.is_symlink() and os.readlink(link) == os.fspath(to):
            return
        new = link.with_name(f".streamer.{link.name}.{token_hex(8)}")
        new.symlink_to(to)
        new.replace(link)
