"""Turn an input that the user named, a path or an address, into a path.

Read models and adapters from the hub through its own client, with the client's cache, token, offline switch and mirrors.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

from streamer.adapters.adapter_config import CONFIG_NAME
from streamer.errors import InputChangedError, InputError, MissingInputError, StorageError, StreamerError, UsageError
from streamer.events import Event, Monitor
from streamer.packages import require_package
from streamer.remote.listing import Listing, Url, check_small, list_address, needed_files, replace_link, shards_of
from streamer.storage.checkpoint import INDEX_NAME, SINGLE_NAME, read_json_object
from streamer.storage.remote_source import at_once, cache_directory, heed, stat_remote
from streamer.storage.remote_transports import PLUGINS, RemoteFile, without_secrets


@dataclass(frozen=True)
class HubName:
    """Model or adapter on the hub.

    Attributes
    ----------
    repo
        ``owner/name``.
    revision
        Branch, tag or commit; None for the newest.
    inside
        Directory or file in the repository; empty for the whole repository.
    """

    repo: str
    revision: str | None
    inside: str
    shown: str

    @property
    def file(self) -> str:
        """Return the name of the single file that was named; empty for a directory."""
        return self.inside.rpartition("/")[2] if self.inside.endswith(".safetensors") else ""

    @property
    def folder(self) -> str:
        """Return the directory in the repository; empty for its root."""
        return self.inside.rpartition("/")[0] if self.file else self.inside


class Unreachable(StorageError):
    """Raised if the hub does not answer."""


class Offline(MissingInputError):
    """Raised if the hub's own switch forbids contacting it."""


@dataclass(frozen=True)
class HubListing(Listing):
    """Needed files of one commit; those that are not `located` have no version yet."""

    name: HubName
    commit: str

    streams: ClassVar[bool] = False

    def located(self) -> Self:
        """Request the sizes and versions of the weights."""
        weights = dict[str, RemoteFile]()
        stats = at_once(stat_remote, [(file.url, file.shown, True) for file in self.weights.values()])
        for (name, file), stat in zip(self.weights.items(), stats, strict=True):
            if stat is None:
                raise MissingInputError(f"{file.shown}: no such file; check its name", file.shown)
            weights[name] = stat
        return replace(self, weights=weights)

    def is_cached(self, name: str) -> bool:
        """Test whether the hub's cache has a file."""
        return _cached(self.name, name, self.commit) is not None

    def download(self, names: Collection[str], monitor: Monitor) -> Path:
        """Download files into the hub's cache unless they exist, and return their directory there."""
        path = Path()
        for i, name in enumerate(names):
            monitor.checkpoint()
            monitor.emit(Event("download", name, i, len(names), i, len(names)))
            with _client(self.name) as hub:
                # Request the first file by the revision as named, so that the hub's cache can resolve it offline too.
                revision = self.commit if i else self.name.revision
                path = Path(hub.hf_hub_download(self.name.repo, _path(self.name, name), revision=revision))
            path = path.parents[name.count("/")]
            if not path.match(f"snapshots/{self.commit}/{self.name.folder}"):
                raise InputChangedError(f"{self.address}: has a new commit since a moment; run the same command again")
        monitor.emit(Event("download", "", len(names), len(names), len(names), len(names)))
        return path


def list_hub(name: HubName) -> HubListing:
    """Resolve a revision, and list the needed files.

    Raises
    ------
    InputError, StorageError
        If it does not exist, access is denied, or the hub does not answer.
    """
    with _client(name) as hub:
        info = hub.HfApi().model_info(name.repo, revision=name.revision, files_metadata=True)
    if not re.fullmatch("[0-9a-f]{7,64}", commit := str(info.sha)):
        raise InputError(f"{name.shown}: the hub states no commit, which would identify its version; check HF_ENDPOINT")
    start, files, shards = _path(name, ""), dict[str, RemoteFile](), list[str]()
    for sibling in info.siblings or ():
        if (path := str(sibling.rfilename)).startswith(start):
            url, shown = hub.hf_hub_url(name.repo, path, revision=commit), f"{name.repo}@{commit[:12]}/{path}"
            # A mirror may not state sizes.
            files[path.removeprefix(start)] = RemoteFile(url, shown, sibling.size or 0, "", token=True)
    if name.file and name.file not in files:
        raise MissingInputError(f"{name.shown}: has no such file; check its name", name.shown)
    if not name.file and INDEX_NAME in files:
        check_small(f"{name.shown}/{INDEX_NAME}", files[INDEX_NAME].size)
        with _client(name) as hub:
            index = Path(hub.hf_hub_download(name.repo, start + INDEX_NAME, revision=commit))
        shards = shards_of(read_json_object(index), f"{name.shown}/{INDEX_NAME}")
    small, weights = ({}, {name.file: files[name.file]}) if name.file else needed_files(name.shown, files, shards)
    place = Path(f"models--{name.repo.replace('/', '--')}", "snapshots", commit, name.folder)
    return HubListing(name.shown, place, small, weights, name.file, name, commit)


def cached_snapshot(name: HubName) -> Path | None:
    """Find a revision in the hub's cache without contacting the hub."""
    for file in [name.file] if name.file else ["config.json", CONFIG_NAME, INDEX_NAME, SINGLE_NAME]:
        if (path := _cached(name, file, name.revision)) is not None:
            return path if name.file else path.parent
    return None


def _cached(name: HubName, file: str, revision: str | None) -> Path | None:
    with _client(name) as hub:
        path = hub.try_to_load_from_cache(name.repo, _path(name, file), revision=revision)
    return Path(path) if isinstance(path, str) else None  # else it may be a mark that the hub has no such file


def _path(name: HubName, file: str) -> str:
    """Return the path of a file in the repository."""
    return f"{name.folder}/{file}" if name.folder else file


@contextmanager
def _client(name: HubName) -> Iterator[Any]:
    """Give the hub's client, without its bars and its log of failed attempts; turn its errors into errors that say what to do."""
    needs = f"{name.shown}: no such path, and a name on the hub needs huggingface_hub 0.25"
    hub = require_package("huggingface_hub", (0, 25), needs, "hub")
    utils, logger = import_module("huggingface_hub.utils"), logging.getLogger("huggingface_hub")
    level, hidden = logger.level, utils.are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    utils.disable_progress_bars()
    try:
        yield hub
    except Exception as e:  # of the client's transport too, which differs by version
        raise _error(name, e) from e
    finally:
        logger.setLevel(level)
        if not hidden:
            utils.enable_progress_bars()


def _error(name: HubName, e: Exception) -> StreamerError:
    """Make the error for one of the hub's client: by its class, or by the response's status."""
    errors, shown = import_module("huggingface_hub.errors"), name.shown
    full = errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS
    if isinstance(e, OSError) and e.errno in full:
        return StorageError(f"{shown}: cannot download: {e.strerror}; make room, or name another HF_HOME")
    if isinstance(e, errors.GatedRepoError):
        advice = "ask for access on its page, then log in with `hf auth login` or set HF_TOKEN"
        return InputError(f"{shown}: is gated on the hub; {advice}")
    if isinstance(e, errors.OfflineModeIsEnabled):
        why = "no such path, nor is it in the hub's cache, and HF_HUB_OFFLINE is set; check the path, or unset it"
        return Offline(f"{shown}: {why}", shown)
    absent = {
        errors.RepositoryNotFoundError: f"no such path, and the hub has no model {name.repo}, or it is private; check the name, or log in "
        "with `hf auth login`",
        errors.RevisionNotFoundError: f"the hub has no revision {name.revision!r} of it; check its name",
        errors.HFValidationError: "no such path, and not a valid hub name; check it",
    }
    if why := next((text for kind, text in absent.items() if isinstance(e, kind)), ""):
        return MissingInputError(f"{shown}: {why}", shown)
    responses = (getattr(error, "response", None) for error in (e, e.__cause__))
    status = next((response.status_code for response in responses if response is not None), None)
    if status in (401, 403):
        advice = "log in with `hf auth login`, or set HF_TOKEN"
        return InputError(f"{shown}: the hub refuses it (status {status}); {advice}")
    if status is not None:
        return StorageError(f"{shown}: the hub answers with status {status}; run the same command again later")
    said = f"{type(e).__name__}: {without_secrets(str(e))[:80]}".removesuffix(": ")
    return Unreachable(f"{shown}: no such path, and the hub cannot be reached ({said}); check the path or the network")


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
        link = cache_directory() / "links" / key / (address.inside or address.repo).rpartition("/")[2]
        replace_link(link, path)
        return link

    def paths(self, *given: str | Path) -> list[str | Path]:
        """Return the local paths of several inputs."""
        return [self.path(one) for one in given]

    def _directory(self, listing: Listing) -> Path:
        """Return the directory that holds the files, or stands for them."""
        streams = self.mode == "stream" or (self.mode is None and listing.streams)
        is_adapter = CONFIG_NAME in listing.small and not {INDEX_NAME, SINGLE_NAME} & listing.files.keys()
        if not is_adapter and (streams or self.peek):  # an adapter is small enough to be always downloaded
            listing = listing.located()
            to_download = sum(f.size for name, f in listing.weights.items() if not (streams or listing.is_cached(name)))
            if streams or to_download:
                return listing.shadow(to_download, self.monitor)
        return listing.download(listing.files, self.monitor)
