"""Turn an input that the user named, a path or an address, into a path."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from streamer.errors import UsageError
from streamer.events import Event, Monitor
from streamer.remote.hub import HubName, Offline, Unreachable, cached_snapshot, list_hub
from streamer.remote.listing import Listing, Url, list_address, make_private, replace_link
from streamer.storage.remote_source import cache_directory, heed
from streamer.storage.remote_transports import PLUGINS

RemoteMode = Literal["cache", "stream"]

PART = r"[A-Za-z0-9_][\w.-]*"

_HUB_NAME = re.compile(rf"(?P<repo>{PART}/{PART})(?:@(?P<revision>[^/@]+))?(?:/(?P<inside>{PART}(?:/{PART})*))?/?")
_HUB_PAGE = re.compile(
    rf"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>{PART}/{PART})"
    rf"(?:/(?:tree|resolve|blob)/(?P<revision>[^/]+)(?:/(?P<inside>{PART}(?:/{PART})*))?)?/?"
)
_SCHEME = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+)://")


def parse_address(text: str) -> HubName | Url | None:
    """Parse a user's input as a hub name, an address, or (None) a path.

    Anything that exists is a path. So is anything that begins like a path or lies in an existing directory, because a mistyped path looks
    like a hub name.

    Raises
    ------
    UsageError
        If an address has an unknown scheme.
    """
    if os.path.lexists(text):
        return None
    named = _HUB_PAGE.fullmatch(text)
    if named is None and (found := _SCHEME.match(text)):
        scheme, rest = found["scheme"], text[found.end() :]
        if scheme == "hf":
            if (named := _HUB_NAME.fullmatch(rest.removeprefix("models/"))) is None:
                raise UsageError(f"{text}: expected hf://OWNER/NAME, hf://OWNER/NAME@REVISION or a directory inside")
        else:
            shown = re.sub(r"(?<=://)[^/?#]*@|[?#][\s\S]*", "", text)
            if scheme in ("http", "https", *PLUGINS):
                return Url(text, shown)
            known = "an address that begins with one of hf://, https://, s3://, gs://, az://"
            raise UsageError(f"{shown}: expected a path, a name on the hub, or {known}")
    elif named is None:
        named = _HUB_NAME.fullmatch(text)
        if named is None or Path(Path(text).parts[0]).exists():
            return None
        if not named["inside"] and named["repo"].endswith(".safetensors"):
            return None
    return HubName(named["repo"], named["revision"], named["inside"] or "", text)


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
        if self.mode not in (None, *get_args(RemoteMode)):
            raise UsageError(f"remote: expected one of {', '.join(get_args(RemoteMode))}, found {self.mode!r}")

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
        if isinstance(address, Url):
            listing = list_address(address)
            return self._directory(listing) / listing.file
        try:
            files = list_hub(address)
        except (Offline, Unreachable) as e:
            if (path := cached_snapshot(address)) is None:
                raise
            if isinstance(e, Unreachable):
                self.monitor.emit(Event("note", f"{address.shown}: the hub cannot be reached; its cache is used"))
        else:
            path = self._directory(files) / files.file
        if address.file:
            return path
        # The directory of a commit under its readable name, which names the outputs of several adapters.
        key = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
        link = (
            cache_directory() / "links" / key / (address.inside.rpartition("/")[2] or address.repo.rpartition("/")[2])
        )
        make_private(link.parent)
        replace_link(link, path)
        return link

    def paths(self, *given: str | Path) -> list[str | Path]:
        """Return the local paths of several inputs."""
        return [self.path(one) for one in given]

    def _directory(self, listing: Listing) -> Path:
        """Return the directory that holds the files, or stands for them."""
        streams = self.mode == "stream" or (self.mode is None and listing.streams)
        if not listing.is_adapter and (streams or self.peek):
            listing = listing.located()
            to_download = (
                0 if streams else sum(f.size for name, f in listing.weights.items() if not listing.is_cached(name))
            )
            if streams or to_download:
                return listing.shadow(to_download, self.monitor)
        return listing.download(listing.files, self.monitor)
