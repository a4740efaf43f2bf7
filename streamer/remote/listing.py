"""What an address holds, and which of its files are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from streamer.adapters.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from streamer.errors import InputError
from streamer.plan.side_files import goes_along
from streamer.storage.checkpoint import INDEX_NAME, MAX_INDEX_BYTES, SINGLE_NAME, check_shard_name
from streamer.storage.remote_manifest import RemoteFile
from streamer.units import format_sizes

ADAPTER_FILES = (CONFIG_NAME, WEIGHTS_NAME)


@dataclass(frozen=True)
class Listing:
    """Files at an address.

    Attributes
    ----------
    name
        What its directory is called here.
    address
        As the user gave it, without secrets.
    small
        Files that are downloaded in any case, by relative name.
    weights
        Those that hold tensors.
    file
        The one file that was named, in place of a directory; empty for a directory.
    """

    name: str
    address: str
    small: Mapping[str, RemoteFile]
    weights: Mapping[str, RemoteFile]
    file: str = ""

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter, which is small enough to be downloaded in any case."""
        return CONFIG_NAME in self.small and not {INDEX_NAME, SINGLE_NAME} & {*self.small, *self.weights}

    @property
    def files(self) -> dict[str, RemoteFile]:
        """All of them."""
        return {**self.small, **self.weights}

    @property
    def nbytes(self) -> int:
        """Count the bytes of all files."""
        return sum(file.size for file in self.files.values())


def needed_names(names: Iterable[str], read_shards: Callable[[], list[str]]) -> tuple[list[str], list[str]]:
    """Choose among the files of a model or adapter: the small ones that go along, and those that hold its tensors.

    Parameters
    ----------
    read_shards
        Reads the names of the shards from their index.
    """
    there = set(names)
    small = sorted(name for name in there if goes_along(name) and _is_safe(name))
    weights = [name for name in (SINGLE_NAME, WEIGHTS_NAME) if name in there]
    if INDEX_NAME in there:
        small = sorted({*small, INDEX_NAME})
        weights += [name for name in read_shards() if name in there and name not in weights]
    return small, weights


def shards_of(index: Mapping[str, Any], where: str) -> list[str]:
    """List the names of the shards in an index that was read from an address, each a plain name."""
    weight_map = index.get("weight_map")
    values = weight_map.values() if isinstance(weight_map, dict) else ()
    return [check_shard_name(name, where) for name in dict.fromkeys(map(str, values))]


def check_small(shown: str, size: int) -> None:
    """Refuse a file of this size that is no weights: it would be downloaded in any case."""
    if size > MAX_INDEX_BYTES:
        most, found = format_sizes(MAX_INDEX_BYTES, size)
        raise InputError(f"{shown}: expected {most} at most of such a file, found {found}; check the address")


def _is_safe(name: str) -> bool:
    """Say whether a listed name stays below its directory: it comes from a server."""
    return all(part not in ("", ".", "..") and "\\" not in part and "\0" not in part for part in name.split("/"))
