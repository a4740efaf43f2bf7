"""Manifest of a directory whose files come from an address: read by ranges when their turn comes, or downloaded.

It is honoured only below the cache of this user: a directory that was downloaded by other means could hold one that names any address.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from secrets import token_hex

from streamer.storage.files import Stamp, storage_errors

MANIFEST_NAME = ".streamer.remote.json"


@dataclass(frozen=True)
class RemoteFile:
    """A file at an address, of one version.

    Attributes
    ----------
    url
        That it is read from; it may hold a signature, and is never shown.
    shown
        The address without secrets, for messages.
    size
        In bytes.
    version
        Its ETag, generation or time of change, whatever its server tells versions by.
    token
        Whether the token of the hub goes along.
    """

    url: str
    shown: str
    size: int
    version: str
    token: bool = False

    @property
    def stamp(self) -> Stamp:
        """A stamp of the form that files on a disk have: of the address and the version."""
        digest = hashlib.sha256(f"{self.shown}\n{self.version}".encode()).digest()
        return 0, 0, self.size, int.from_bytes(digest[:7], "little")


@dataclass(frozen=True)
class Manifest:
    """What a directory stands for.

    Attributes
    ----------
    address
        The address as the user gave it, without secrets.
    files
        Files that are read by ranges, by name; what stands in the directory under that name is a note for people.
    to_download
        Bytes that a run downloads before it begins, where only a forecast was asked for.
    """

    address: str
    files: Mapping[str, RemoteFile]
    to_download: int = 0

    def write(self, directory: Path) -> None:
        """Write the manifest, readable by this user alone: addresses may hold signatures."""
        tree = {"address": self.address, "to_download": self.to_download,
                "files": {name: asdict(file) for name, file in self.files.items()}}  # fmt: skip
        path = directory / MANIFEST_NAME
        with storage_errors(path, "write"):
            new = directory / f"{MANIFEST_NAME}.{token_hex(8)}"
            with open(
                os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "w"
            ) as f:
                json.dump(tree, f)
            new.replace(path)


def cache_directory() -> Path:
    """Find the cache of this user: ``$XDG_CACHE_HOME/streamer``, by default ``~/.cache/streamer``."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "streamer"


def read_manifest(directory: Path) -> Manifest | None:
    """Read the manifest of a directory; None where it has none, or none of ours."""
    path = directory / MANIFEST_NAME
    try:
        modified = path.stat().st_mtime_ns
        ours = Path(os.path.realpath(directory)).is_relative_to(os.path.realpath(cache_directory()))
    except (OSError, RuntimeError):  # there is none, or no home
        return None
    return _parsed(path, modified) if ours else None


def remote_file(path: Path) -> RemoteFile | None:
    """Find where a file is read from by ranges; None of one that is on the disk."""
    manifest = read_manifest(path.parent)
    return None if manifest is None else manifest.files.get(path.name)


@lru_cache(maxsize=16)
def _parsed(path: Path, modified: int) -> Manifest | None:
    try:
        tree = json.loads(path.read_text())
        files = {name: RemoteFile(**entry) for name, entry in tree["files"].items()}
        return Manifest(tree["address"], files, tree["to_download"])
    except (OSError, KeyError, TypeError, ValueError):  # torn: it is made again with the directory
        return None
