"""Turn an input that the user named, a path, a hub name or an address, into a local path.

Its files are listed; then they are downloaded, or a directory of the cache stands for them. The hub is read through its own client, with
its cache, token, offline switch and mirrors.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from secrets import token_hex
from typing import Any, ClassVar, Literal
from urllib.parse import unquote

from streamer import errors
from streamer.adapters.adapter_config import CONFIG_NAME, LORA_NAME, WEIGHTS_NAME
from streamer.events import Event, Monitor
from streamer.packages import require_package
from streamer.plan.side_files import PROCESSOR, TOKENIZER, goes_along
from streamer.storage import checkpoint
from streamer.storage import remote_source as ranges
from streamer.storage.atomic_file import PARTIAL, AtomicFile
from streamer.storage.checkpoint import INDEX_NAME, SINGLE_NAME
from streamer.storage.files import storage_errors
from streamer.storage.remote_source import Manifest, RemoteFile, RemoteSource
from streamer.units import format_sizes, quoted

PIPELINE_FILES = {
    checkpoint.PIPELINE_NAME: "a diffusers pipeline",
    LORA_NAME: "an adapter of a diffusers pipeline",
}

KNOWN_NAMES = (
    "config.json",
    "hf_quant_config.json",
    "generation_config.json",
    *sorted(TOKENIZER | PROCESSOR),
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "USE_POLICY.md",
    *PIPELINE_FILES,
)
"""Files that a model, adapter or pipeline may have, by the names that libraries give them; an https server does not list files."""

Files = dict[str, RemoteFile]

DEAD_SECONDS = 3600
"""Seconds without a new byte after which a download counts as killed; a running download waits at most minutes."""


@dataclass(frozen=True)
class Listing:
    """Needed files at an address.

    Attributes
    ----------
    address
        The address as given, without secrets.
    place
        Relative path of its local directory.
    small
        Files that are always downloaded, by relative name.
    weights
        Files that hold tensors, by relative name.
    file
        The single file that was named; empty for a directory.
    """

    address: str
    place: Path
    small: Mapping[str, RemoteFile]
    weights: Mapping[str, RemoteFile]
    file: str

    streams: ClassVar[bool] = True
    """Whether it is read by ranges unless the user says otherwise."""

    @property
    def files(self) -> dict[str, RemoteFile]:
        """Return all files."""
        return {**self.small, **self.weights}

    def directory(self, kind: str) -> Path:
        """Return the directory for exactly these versions of the files; other versions have another directory."""
        files = sorted(
            (name, file.shown, file.size, file.version) for name, file in self.files.items()
        )
        key = hashlib.sha256(json.dumps([self.address, files]).encode()).hexdigest()[:16]
        return ranges.cache_directory() / kind / key / self.place

    def is_cached(self, name: str) -> bool:
        """Test whether a file has been downloaded."""
        path = self.directory("files") / name
        return path.is_file() and path.stat().st_size == self.files[name].size

    def download(self, names: Collection[str], monitor: Monitor) -> Path:
        """Download files unless they exist, and return their directory; each gets its name when it is complete."""
        directory = self.directory("files")
        missing = [name for name in names if not self.is_cached(name)]
        total = sum(self.files[name].size for name in missing)
        done = 0
        for i, name in enumerate(missing):
            file = self.files[name]
            path = directory / name
            source = RemoteSource(file)
            make_private(path.parent)
            for partial in (p for p in path.parent.iterdir() if PARTIAL.match(p.name)):
                with contextlib.suppress(
                    OSError
                ):  # of killed runs; running ones keep changing theirs
                    if time.time() - partial.stat().st_mtime > DEAD_SECONDS:
                        partial.unlink()
            with AtomicFile(path, file.size) as out:
                for at in range(0, file.size, ranges.RANGE_BYTES):
                    monitor.checkpoint()
                    monitor.emit(Event("download", name, done + at, total, i, len(missing)))
                    length = min(ranges.RANGE_BYTES, file.size - at)
                    source.prefetch(
                        at, at + length, file.size
                    )  # a small file as a whole, which needs no ranges
                    out.write(source.view(at, length))
                source.check_unchanged()  # redirect targets and bucket responses carry no version of their own
                out.flush()
                if path.suffix == ".json":
                    _parsed(out.partial.read_bytes(), file)
            done += file.size
        if missing:
            monitor.emit(Event("download", "", total, total, len(missing), len(missing)))
        Manifest(self.address, {}).write(directory)
        return directory

    def shadow(self, to_download: int, monitor: Monitor) -> Path:
        """Make the directory of a model whose tensors are read by ranges; for `to_download`, see `Manifest`."""
        directory = self.directory("forecasts" if to_download else "ranges")
        if ranges.read_manifest(directory) is None or not all(
            (directory / name).exists() for name in self.files
        ):
            make_private(directory)
            there = self.download(self.small, monitor) if self.small else directory
            for name in self.small:
                replace_link(directory / name, there / name)
            for name, file in self.weights.items():
                with storage_errors(directory / name, "write"):
                    (directory / name).write_bytes(
                        f"in place of {file.shown}, which is read by ranges\n".encode()
                    )
        Manifest(self.address, self.weights, to_download).write(
            directory
        )  # URLs may have new signatures
        return directory


@dataclass(frozen=True)
class Url:
    """Directory or file at an address.

    Attributes
    ----------
    text
        The address; it may contain a password, or a signature in its query.
    shown
        The address without them.
    """

    text: str
    shown: str

    @property
    def name(self) -> str:
        """Return the last part of its path, or ``model`` if that is not a plain name; it becomes a local directory's name."""
        last = unquote(self.shown.rstrip("/").rpartition("/")[2])
        return last if re.fullmatch(r"\w[\w.+=@ -]{0,199}", last) else "model"

    def below(self, name: str) -> tuple[str, str]:
        """Return the address of a file in this directory, and the same address for display."""
        path = re.split(r"[?#]", self.text)[0]
        return (
            f"{path.rstrip('/')}/{name}{self.text.removeprefix(path)}",
            f"{self.shown.rstrip('/')}/{name}",
        )


def list_address(url: Url) -> Listing:
    """List the needed files of a model or an adapter at an address, or the one file there.

    Raises
    ------
    MissingInputError
        If there is neither a model nor an adapter.
    InputError, StorageError
        If access is denied, or no server answers.
    """
    file = ""
    small = Files()
    if url.name.endswith(".safetensors"):
        if (stat := ranges.stat_remote(url.text, url.shown)) is None:
            raise errors.MissingInputError(
                f"{url.shown}: no such file; check the address", url.shown
            )
        file = checkpoint.check_shard_name(url.name, url.shown)
        weights = {file: stat}
    else:
        if url.text.partition("://")[0] in ranges.PLUGINS:
            files = ranges.list_remote(url.text, url.shown)
            shards = _shards(files)
        else:
            files, shards = _web(url)
        small, weights = needed_files(url.shown, files, shards)
    for weight in weights.values():
        if not weight.ranges:
            raise ranges.no_ranges(weight.shown)
    return Listing(url.shown, Path(url.name), small, weights, file)


def needed_files(shown: str, files: Files, shards: Collection[str]) -> tuple[Files, Files]:
    """Choose among the files of a model or adapter: the small files to copy, and the files with its tensors.

    Parameters
    ----------
    shown
        The directory, for messages.
    shards
        Names in its index, if it has one.

    Raises
    ------
    MissingInputError, InputError, UnsupportedError
        If there is no model, a file beside the weights is too large, or this is a diffusers pipeline or its adapter.
    """
    if {INDEX_NAME, SINGLE_NAME, CONFIG_NAME, WEIGHTS_NAME}.isdisjoint(files):
        for kind in (kind for name, kind in PIPELINE_FILES.items() if name in files):
            raise errors.UnsupportedError(
                f"{shown}: {kind} is not read remotely; download it and name its directory"
            )
    # Names stay below the directory.
    below = [
        name
        for name in sorted(files)
        if not ({"", ".", ".."} & {*name.split("/")} or {"\\", "\0"} & {*name})
    ]
    small = {name: files[name] for name in below if name == INDEX_NAME or goes_along(name)}
    for name, file in small.items():
        check_small(f"{shown}/{name}", file.size)
    weights = {name: files[name] for name in (SINGLE_NAME, WEIGHTS_NAME, *shards) if name in files}
    if not weights and CONFIG_NAME not in small:
        raise errors.MissingInputError(
            f"{shown}: expected a model or an adapter, found neither {SINGLE_NAME}, {INDEX_NAME} nor {WEIGHTS_NAME}; check the address",
            shown,
        )
    return small, weights


def shards_of(index: Mapping[str, Any], where: str) -> list[str]:
    """List the shards named in an index from an address, after checking that each is a plain name."""
    weight_map = index.get("weight_map")
    values = weight_map.values() if isinstance(weight_map, dict) else ()
    return [checkpoint.check_shard_name(name, where) for name in dict.fromkeys(map(str, values))]


def check_small(shown: str, size: int) -> None:
    """Refuse a file too large for one without weights, because it would always be downloaded."""
    if size > checkpoint.MAX_INDEX_BYTES:
        most, found = format_sizes(checkpoint.MAX_INDEX_BYTES, size)
        raise errors.InputError(
            f"{shown}: expected at most {most} for such a file, found {found}; check the address"
        )


def _web(url: Url) -> tuple[Files, list[str]]:
    """Request each file by name, because there is no list; return those that exist, and the shards in the index."""
    reports_absent = False

    def ask(names: list[str], weights: Collection[str] = (), least: int = 0) -> None:
        """Add the files that exist.

        A bucket that may not be listed refuses missing files as well as forbidden ones. So a refused file counts as missing only if the
        server has reported no file as absent, and at least `least` of the `weights` were found.
        """
        nonlocal reports_absent
        answers = dict(
            zip(
                names,
                ranges.at_once(_stat_or_refusal, [url.below(name) for name in names]),
                strict=True,
            )
        )
        found.update(
            {name: answer for name, answer in answers.items() if isinstance(answer, RemoteFile)}
        )
        refusals = [answer for answer in answers.values() if isinstance(answer, errors.InputError)]
        reports_absent = reports_absent or None in answers.values()
        if refusals and (reports_absent or len(found.keys() & weights) < least):
            raise refusals[0]

    found: Files = {}
    ask(
        [INDEX_NAME, SINGLE_NAME, CONFIG_NAME, WEIGHTS_NAME, *KNOWN_NAMES],
        [INDEX_NAME, SINGLE_NAME, WEIGHTS_NAME],
        1,
    )
    shards = _shards(found)
    ask(shards, shards, len(shards))
    if "config.json" in found:
        ask(_code(_json(found["config.json"])))
    return found, shards


def _stat_or_refusal(url: str, shown: str) -> RemoteFile | errors.InputError | None:
    try:
        return ranges.stat_remote(url, shown)
    except errors.UnsupportedError:
        raise
    except errors.InputError as e:
        return e


def _code(config: dict[str, Any]) -> list[str]:
    """List the files of a model's own code to which its config refers."""
    auto_map = config.get("auto_map")
    values = auto_map.values() if isinstance(auto_map, dict) else ()
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    modules = dict.fromkeys(
        name.partition(".")[0] for name in names if isinstance(name, str) and "--" not in name
    )
    return [f"{module}.py" for module in modules if module.isidentifier()]


def _shards(files: Files) -> list[str]:
    return (
        shards_of(_json(files[INDEX_NAME]), files[INDEX_NAME].shown) if INDEX_NAME in files else []
    )


def _json(file: RemoteFile) -> dict[str, Any]:
    """Read a JSON object from an address, which messages name."""
    check_small(file.shown, file.size)
    raw = bytearray(file.size)
    ranges.read_range(file, memoryview(raw), 0)
    tree = _parsed(raw, file)
    if not isinstance(tree, dict):
        raise errors.FormatError(
            f"{file.shown}: expected a JSON object, found {type(tree).__name__}; check the address"
        )
    return tree


def _parsed(raw: bytes | bytearray, file: RemoteFile) -> Any:
    """Parse JSON as transformers writes it, allowing Infinity and NaN.

    Raises
    ------
    FormatError
        If it is not JSON, such as an error page of a server; the message names the address.
    """
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise errors.FormatError(
            f"{file.shown}: expected JSON, found something else ({quoted(str(e))}); check the address"
        ) from None


def make_private(path: Path) -> None:
    """Create a directory of the cache, readable only by its owner."""
    with storage_errors(path, "create"):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)


def replace_link(link: Path, to: Path) -> None:
    """Let a link in the cache lead to a path."""
    make_private(link.parent)
    with storage_errors(link, "write"):
        new = link.with_name(f".streamer.{link.name}.{token_hex(8)}")
        new.symlink_to(to)
        new.replace(link)


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


class Unreachable(errors.StorageError):
    """Raised if the hub does not answer."""


class Offline(errors.MissingInputError):
    """Raised if the hub's own switch forbids contacting it."""


@dataclass(frozen=True)
class HubListing(Listing):
    """Needed files of one commit, which is their version."""

    name: HubName
    commit: str

    streams = False

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
                path = Path(
                    hub.hf_hub_download(self.name.repo, _path(self.name, name), revision=revision)
                )
            path = path.parents[name.count("/")]
            if not path.match(f"snapshots/{self.commit}/{self.name.folder}"):
                raise errors.InputChangedError(
                    f"{self.address}: got a new commit a moment ago; run the same command again"
                )
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
        raise errors.InputError(
            f"{name.shown}: the hub states no commit, which would identify its version; check HF_ENDPOINT"
        )
    start = _path(name, "")
    files = dict[str, RemoteFile]()
    shards = list[str]()
    for sibling in info.siblings or ():
        if (path := str(sibling.rfilename)).startswith(start):
            url = hub.hf_hub_url(name.repo, path, revision=commit)
            shown = f"{name.repo}@{commit[:12]}/{path}"
            if sibling.size is None and path.endswith(".safetensors"):
                raise errors.UnsupportedError(
                    f"{shown}: the hub does not state its size; download it, and name the directory"
                )
            files[path.removeprefix(start)] = RemoteFile(
                url, shown, sibling.size or 0, commit, token=True
            )
    if name.file and name.file not in files:
        raise errors.MissingInputError(
            f"{name.shown}: has no such file; check its name", name.shown
        )
    if not name.file and INDEX_NAME in files:
        check_small(f"{name.shown}/{INDEX_NAME}", files[INDEX_NAME].size)
        with _client(name) as hub:
            index = Path(hub.hf_hub_download(name.repo, start + INDEX_NAME, revision=commit))
        shards = shards_of(checkpoint.read_json_object(index), f"{name.shown}/{INDEX_NAME}")
    if name.file:
        small: Files = {}
        weights = {name.file: files[name.file]}
    else:
        small, weights = needed_files(name.shown, files, shards)
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
    return (
        Path(path) if isinstance(path, str) else None
    )  # else it may be a mark that the hub has no such file


def _path(name: HubName, file: str) -> str:
    """Return the path of a file in the repository."""
    return f"{name.folder}/{file}" if name.folder else file


@contextmanager
def _client(name: HubName) -> Iterator[Any]:
    """Give the hub's client, without its bars and its log of failed attempts; turn its errors into errors that say what to do."""
    needs = f"{name.shown}: no such path, and a name on the hub needs huggingface_hub 0.25"
    hub = require_package("huggingface_hub", (0, 25), needs, "hub")
    utils = import_module("huggingface_hub.utils")
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    hidden = utils.are_progress_bars_disabled()
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


def _error(name: HubName, e: Exception) -> errors.StreamerError:
    """Make the error for one of the hub's client: by its class, or by the response's status."""
    hub_errors = import_module("huggingface_hub.errors")
    shown = name.shown
    full = errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS
    if isinstance(e, OSError) and e.errno in full:
        return errors.StorageError(
            f"{shown}: cannot download: {e.strerror}; make room, or name another HF_HOME"
        )
    if isinstance(e, hub_errors.OfflineModeIsEnabled):
        why = "no such path, nor is it in the hub's cache, and HF_HUB_OFFLINE is set; check the path, or unset it"
        return Offline(f"{shown}: {why}", shown)
    absent = (
        hub_errors.RepositoryNotFoundError,
        hub_errors.RevisionNotFoundError,
        hub_errors.HFValidationError,
    )
    gated = isinstance(e, hub_errors.GatedRepoError)
    if isinstance(e, absent) and not gated:
        version = f" of revision {name.revision!r}" if name.revision else ""
        advice = "or it is private; check the name, or log in with `hf auth login`"
        what = f"no such path, and the hub has no model {name.repo}{version}, {advice}"
        return errors.MissingInputError(f"{shown}: {what}", shown)
    responses = (getattr(error, "response", None) for error in (e, e.__cause__))
    status = next((response.status_code for response in responses if response is not None), None)
    if gated or status in (401, 403):
        advice = "ask for access on its page if it is gated, then log in with `hf auth login`, or set HF_TOKEN"
        return errors.InputError(f"{shown}: the hub refuses it (status {status}); {advice}")
    if status is not None:
        return errors.StorageError(
            f"{shown}: the hub answers with status {status}; run the same command again later"
        )
    said = f"{type(e).__name__}: {ranges.without_secrets(str(e))[:80]}".removesuffix(": ")
    return Unreachable(
        f"{shown}: no such path, and the hub cannot be reached ({said}); check the path or the network"
    )


RemoteMode = Literal["cache", "stream"]

NAME_PART = r"[A-Za-z0-9_][\w.-]*"

_HUB_NAME = re.compile(
    rf"(?P<repo>{NAME_PART}/{NAME_PART})(?:@(?P<revision>[^/@]+))?(?:/(?P<inside>{NAME_PART}(?:/{NAME_PART})*))?/?"
)
_HUB_PAGE = re.compile(
    rf"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>{NAME_PART}/{NAME_PART})"
    rf"(?:/(?:tree|resolve|blob)/(?P<revision>[^/]+)(?:/(?P<inside>{NAME_PART}(?:/{NAME_PART})*))?)?/?"
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
    if named is None and (match := _SCHEME.match(text)):
        scheme = match["scheme"]
        rest = text[match.end() :]
        if scheme == "hf":
            if (named := _HUB_NAME.fullmatch(rest.removeprefix("models/"))) is None:
                raise errors.UsageError(
                    f"{text}: expected hf://OWNER/NAME, hf://OWNER/NAME@REVISION or a directory inside"
                )
        else:
            shown = re.sub(r"(?<=://)[^/?#]*@|[?#][\s\S]*", "", text)
            if scheme in ("http", "https", *ranges.PLUGINS):
                return Url(text, shown)
            known = "an address that begins with one of hf://, https://, s3://, gs://, az://"
            raise errors.UsageError(f"{shown}: expected a path, a name on the hub, or {known}")
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

    def path(self, named: str | Path) -> str | Path:
        """Return the local path of an input: the path itself, or the directory that stands in for an address.

        Raises
        ------
        InputError, StorageError
            If nothing exists at the address, access is denied, or no server answers.
        MissingPackageError
            If the package for such addresses is not installed.
        """
        address = parse_address(named) if isinstance(named, str) else None
        if address is None:
            return named
        ranges.heed(self.monitor)
        if isinstance(address, Url):
            listing = list_address(address)
            return self._directory(listing) / listing.file
        try:
            files = list_hub(address)
        except (Offline, Unreachable) as e:
            if (path := cached_snapshot(address)) is None:
                raise
            if isinstance(e, Unreachable):
                self.monitor.note(f"{address.shown}: the hub cannot be reached; its cache is used")
        else:
            path = self._directory(files) / files.file
        if address.file:
            return path
        # The directory of a commit under its readable name, which names the outputs of several adapters.
        key = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
        link = (
            ranges.cache_directory()
            / "links"
            / key
            / (address.inside or address.repo).rpartition("/")[2]
        )
        replace_link(link, path)
        return link

    def paths(self, *named: str | Path) -> list[str | Path]:
        """Return the local paths of several inputs."""
        return [self.path(name) for name in named]

    def _directory(self, listing: Listing) -> Path:
        """Return the directory that holds the files, or stands for them."""
        streams = self.mode == "stream" or (self.mode is None and listing.streams)
        is_adapter = (
            CONFIG_NAME in listing.small and not {INDEX_NAME, SINGLE_NAME} & listing.files.keys()
        )
        if not is_adapter and (
            streams or self.peek
        ):  # an adapter is small enough to be always downloaded
            to_download = sum(
                f.size
                for name, f in listing.weights.items()
                if not (streams or listing.is_cached(name))
            )
            if streams or to_download:
                return listing.shadow(to_download, self.monitor)
        return listing.download(listing.files, self.monitor)
