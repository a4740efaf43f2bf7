"""List the needed files at an address, download them, and make directories of the cache that stand for it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any, ClassVar, Self
from urllib.parse import unquote

from streamer.adapters.adapter_config import CONFIG_NAME, LORA_NAME, WEIGHTS_NAME
from streamer.errors import FormatError, InputError, MissingInputError, UnsupportedError
from streamer.events import Event, Monitor
from streamer.plan.side_files import goes_along
from streamer.storage.checkpoint import INDEX_NAME, MAX_INDEX_BYTES, PIPELINE_NAME, SINGLE_NAME, check_shard_name
from streamer.storage.files import fsync_directory, storage_errors, sync
from streamer.storage.remote_source import (
    RANGE_BYTES,
    Manifest,
    RemoteSource,
    at_once,
    cache_directory,
    list_remote,
    read_manifest,
    read_range,
    stat_remote,
)
from streamer.storage.remote_transports import PLUGINS, RemoteFile, no_ranges
from streamer.units import format_sizes, quoted

PIPELINE_FILES = {PIPELINE_NAME: "a diffusers pipeline", LORA_NAME: "an adapter of a diffusers pipeline"}

KNOWN_NAMES = (
    "config.json", "hf_quant_config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "README.md", "LICENSE", "LICENSE.txt", "USE_POLICY.md", *PIPELINE_FILES,
)  # fmt: skip
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
        files = sorted((name, file.shown, file.size, file.version) for name, file in self.files.items())
        key = hashlib.sha256(json.dumps([self.address, files]).encode()).hexdigest()[:16]
        return cache_directory() / kind / key / self.place

    def located(self) -> Self:
        """Return the listing with the sizes and versions of its weights."""
        return self

    def is_cached(self, name: str) -> bool:
        """Test whether a file has been downloaded."""
        path = self.directory("files") / name
        return path.is_file() and path.stat().st_size == self.files[name].size

    def download(self, names: Collection[str], monitor: Monitor) -> Path:
        """Download files unless they exist, and return their directory; each gets its name when it is complete."""
        directory, missing = self.directory("files"), [name for name in names if not self.is_cached(name)]
        total, done = sum(self.files[name].size for name in missing), 0
        for i, name in enumerate(missing):
            file, path = self.files[name], directory / name
            source, new = RemoteSource(file), path.with_name(f".streamer.{path.name}.{token_hex(8)}.partial")
            make_private(path.parent)
            for partial in path.parent.glob(".streamer.*.partial"):
                with contextlib.suppress(OSError):  # of killed runs; running ones keep changing theirs
                    if time.time() - partial.stat().st_mtime > DEAD_SECONDS:
                        partial.unlink()
            try:
                with storage_errors(path, "write"), open(new, "xb") as out:
                    for at in range(0, file.size, RANGE_BYTES):
                        monitor.checkpoint()
                        monitor.emit(Event("download", name, done + at, total, i, len(missing)))
                        length = min(RANGE_BYTES, file.size - at)
                        source.prefetch(at, at + length, file.size)  # a small file as a whole, which needs no ranges
                        out.write(source.view(at, length))
                    out.flush()
                    sync(out.fileno())
                source.check_unchanged()  # redirect targets and bucket responses carry no version of their own
                if path.suffix == ".json":
                    _parsed(new.read_bytes(), file)
                with storage_errors(path, "write"):
                    new.replace(path)
                    fsync_directory(path.parent)
            finally:
                new.unlink(missing_ok=True)
            done += file.size
        if missing:
            monitor.emit(Event("download", "", total, total, len(missing), len(missing)))
        Manifest(self.address, {}).write(directory)
        return directory

    def shadow(self, to_download: int, monitor: Monitor) -> Path:
        """Make the directory of a model whose tensors are read by ranges; for `to_download`, see `Manifest`."""
        directory = self.directory("forecasts" if to_download else "ranges")
        if read_manifest(directory) is None or not all((directory / name).exists() for name in self.files):
            make_private(directory)
            there = self.download(self.small, monitor) if self.small else directory
            for name in self.small:
                replace_link(directory / name, there / name)
            for name, file in self.weights.items():
                with storage_errors(directory / name, "write"):
                    (directory / name).write_bytes(f"in place of {file.shown}, which is read by ranges\n".encode())
        Manifest(self.address, self.weights, to_download).write(directory)  # URLs may have new signatures
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
        return f"{path.rstrip('/')}/{name}{self.text.removeprefix(path)}", f"{self.shown.rstrip('/')}/{name}"


def list_address(url: Url) -> Listing:
    """List the needed files of a model or an adapter at an address, or the one file there.

    Raises
    ------
    MissingInputError
        If there is neither a model nor an adapter.
    InputError, StorageError
        If access is denied, or no server answers.
    """
    file, small = "", Files()
    if url.name.endswith(".safetensors"):
        if (stat := stat_remote(url.text, url.shown)) is None:
            raise MissingInputError(f"{url.shown}: no such file; check the address", url.shown)
        file = check_shard_name(url.name, url.shown)
        weights = {file: stat}
    else:
        files, shards = _bucket(url) if url.text.partition("://")[0] in PLUGINS else _web(url)
        small, weights = needed_files(url.shown, files, shards)
    for one in weights.values():
        if not one.ranges:
            raise no_ranges(one.shown)
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
            raise UnsupportedError(f"{shown}: {kind} is not read remotely; download it and name its directory")
    # Names stay below the directory.
    below = [name for name in sorted(files) if not ({"", ".", ".."} & {*name.split("/")} or {"\\", "\0"} & {*name})]
    small = {name: files[name] for name in below if name == INDEX_NAME or goes_along(name)}
    for name, file in small.items():
        check_small(f"{shown}/{name}", file.size)
    weights = {name: files[name] for name in (SINGLE_NAME, WEIGHTS_NAME, *shards) if name in files}
    if not weights and CONFIG_NAME not in small:
        raise MissingInputError(
            f"{shown}: expected a model or an adapter, found neither {SINGLE_NAME}, {INDEX_NAME} nor {WEIGHTS_NAME}; check the address",
            shown,
        )
    return small, weights


def shards_of(index: Mapping[str, Any], where: str) -> list[str]:
    """List the shards named in an index from an address, after checking that each is a plain name."""
    weight_map = index.get("weight_map")
    values = weight_map.values() if isinstance(weight_map, dict) else ()
    return [check_shard_name(name, where) for name in dict.fromkeys(map(str, values))]


def check_small(shown: str, size: int) -> None:
    """Refuse a file too large for one without weights, because it would always be downloaded."""
    if size > MAX_INDEX_BYTES:
        most, found = format_sizes(MAX_INDEX_BYTES, size)
        raise InputError(f"{shown}: expected at most {most} for such a file, found {found}; check the address")


def _bucket(url: Url) -> tuple[Files, list[str]]:
    """List the files below an address of a bucket, and the shards in its index."""
    files = list_remote(url.text, url.shown)
    return files, _shards(files)


def _web(url: Url) -> tuple[Files, list[str]]:
    """Request each file by name, because there is no list; return those that exist, and the shards in the index."""
    reports_absent = _reports_absent(url)

    def ask(names: list[str], weights: Collection[str] = (), least: int = 0) -> None:
        """Add the files that exist.

        A bucket that may not be listed refuses missing files as well as forbidden ones. So a refused file counts as missing only if the
        server has reported no file as absent, and at least `least` of the `weights` were found.
        """
        nonlocal reports_absent
        answers = dict(zip(names, at_once(_stat_or_refusal, [url.below(name) for name in names]), strict=True))
        found.update({name: answer for name, answer in answers.items() if isinstance(answer, RemoteFile)})
        refusals = [answer for answer in answers.values() if isinstance(answer, InputError)]
        reports_absent = reports_absent or None in answers.values()
        if refusals and (reports_absent or len(found.keys() & weights) < least):
            raise refusals[0]

    found: Files = {}
    ask([INDEX_NAME, SINGLE_NAME, CONFIG_NAME, WEIGHTS_NAME, *KNOWN_NAMES], [INDEX_NAME, SINGLE_NAME, WEIGHTS_NAME], 1)
    shards = _shards(found)
    ask(shards, shards, len(shards))
    if "config.json" in found:
        ask(_code(_json(found["config.json"])))
    return found, shards


def _stat_or_refusal(url: str, shown: str) -> RemoteFile | InputError | None:
    try:
        return stat_remote(url, shown)
    except UnsupportedError:
        raise
    except InputError as e:
        return e


def _reports_absent(url: Url) -> bool:
    """Request a file with a made-up name to see whether the server reports absent files, as opposed to refusing access.

    Raises
    ------
    UnsupportedError
        If the server returns such a file; existing files then cannot be distinguished from missing ones.
    """
    name = f"no-such-file-{token_hex(8)}.json"
    answer = _stat_or_refusal(*url.below(name))
    if isinstance(answer, RemoteFile):
        raise UnsupportedError(
            f"{url.shown}: the server answers every name, even {name}, so missing files cannot be detected; "
            "download them and name the directory"
        )
    return answer is None


def _code(config: dict[str, Any]) -> list[str]:
    """List the files of a model's own code to which its config refers."""
    auto_map = config.get("auto_map")
    values = auto_map.values() if isinstance(auto_map, dict) else ()
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    modules = dict.fromkeys(name.partition(".")[0] for name in names if isinstance(name, str) and "--" not in name)
    return [f"{module}.py" for module in modules if module.isidentifier()]


def _shards(files: Files) -> list[str]:
    return shards_of(_json(files[INDEX_NAME]), files[INDEX_NAME].shown) if INDEX_NAME in files else []


def _json(file: RemoteFile) -> dict[str, Any]:
    """Read a JSON object from an address, which messages name."""
    check_small(file.shown, file.size)
    raw = bytearray(file.size)
    read_range(file, memoryview(raw), 0)
    tree = _parsed(raw, file)
    if not isinstance(tree, dict):
        raise FormatError(f"{file.shown}: expected a JSON object, found {type(tree).__name__}; check the address")
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
        raise FormatError(
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
