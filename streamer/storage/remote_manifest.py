"""Describe a directory whose files come from a URL: read by ranges when needed, or downloaded.

A manifest counts only inside this user's cache: a directory from elsewhere could contain one that names any URL.
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
    """One version of a file at a URL.

    Attributes
    ----------
    url
        URL for reading; it may contain a signature and is never shown.
    shown
        The URL without secrets, for messages.
    size
        Size in bytes.
    version
        Its ETag, generation or modification time, depending on the server.
    token
        Whether requests include the hub's token.
    """

    url: str
    shown: str
    size: int
    version: str
    token: bool = False

    @property
    def stamp(self) -> Stamp:
        """Return a stamp in the form of a local file's, made from URL and version."""
        digest = hashlib.sha256(f"{self.shown}\n{self.version}".encode()).digest()
        return 0, 0, self.size, int.from_bytes(digest[:7], "little")


@dataclass(frozen=True)
class Manifest:
    """The remote content that a directory represents.

    Attributes
    ----------
    address
        The URL as the user gave it, without secrets.
    files
        Files that are read by ranges, by name; the file of that name in the directory is only a note for people.
    to_download
        Bytes that a run would download first, if only a forecast was requested.
    """

    address: str
    files: Mapping[str, RemoteFile]
    to_download: int = 0

    def write(self, directory: Path) -> None:
        """Write the manifest, readable only by this user: URLs may contain signatures."""
        tree = {"address": self.address, "to_download": self.to_download,
                "files": {name: asdict(file) for name, file in self.files.items()}}  # fmt: skip
        path = directory / MANIFEST_NAME
        with storage_errors(path, "write"):
            new = directory / f"{MANIFEST_NAME}.{token_hex(8)}"
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as f:
                f.write(json.dumps(tree).encode())
            new.replace(path)


def cache_directory() -> Path:
    """Return this user's cache: ``$XDG_CACHE_HOME/streamer``, by default ``~/.cache/streamer``."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "streamer"


def read_manifest(directory: Path) -> Manifest | None:
    """Read a directory's manifest; None if it has none, or none of ours."""
    path = directory / MANIFEST_NAME
    try:
        modified = path.stat().st_mtime_ns
        ours = Path(os.path.realpath(directory)).is_relative_to(os.path.realpath(cache_directory()))
    except (OSError, RuntimeError):  # there is no manifest, or no home directory
        return None
    return _parsed(path, modified) if ours else None


def remote_file(path: Path) -> RemoteFile | None:
    """Return the remote file that is read by ranges instead of a path; None if the file is on disk."""
    manifest = read_manifest(path.parent)
    return None if manifest is None else manifest.files.get(path.name)


@lru_cache(maxsize=16)
def _parsed(path: Path, modified: int) -> Manifest | None:
    try:
        tree = json.loads(path.read_bytes())
        files = {name: RemoteFile(**entry) for name, entry in tree["files"].items()}
        return Manifest(tree["address"], files, tree["to_download"])
    except (OSError, KeyError, TypeError, ValueError):  # torn: it will be made again with the directory
        return None
