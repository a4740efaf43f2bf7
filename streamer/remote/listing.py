"""List an address's files and decide which are needed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from streamer.adapters.adapter_config import CONFIG_NAME, LORA_NAME, WEIGHTS_NAME
from streamer.errors import InputError, UnsupportedError
from streamer.plan.side_files import goes_along
from streamer.storage.checkpoint import INDEX_NAME, MAX_INDEX_BYTES, PIPELINE_NAME, SINGLE_NAME, check_shard_name
from streamer.storage.remote_manifest import RemoteFile
from streamer.units import format_sizes

ADAPTER_FILES = (CONFIG_NAME, WEIGHTS_NAME)
PIPELINE_FILES = {PIPELINE_NAME: "a diffusers pipeline", LORA_NAME: "an adapter of a diffusers pipeline"}


@dataclass(frozen=True)
class Listing:
    """Files at an address.

    Attributes
    ----------
    name
        Name of its local directory.
    address
        The address as given, without secrets.
    small
        Files that are always downloaded, by relative name.
    weights
        Files that hold tensors, by relative name.
    file
        The single file that was named; empty for a directory.
    """

    name: str
    address: str
    small: Mapping[str, RemoteFile]
    weights: Mapping[str, RemoteFile]
    file: str = ""

    @property
    def is_adapter(self) -> bool:
        """Return whether this is an adapter, which is small enough to be always downloaded."""
        return CONFIG_NAME in self.small and not {INDEX_NAME, SINGLE_NAME} & {*self.small, *self.weights}

    @property
    def files(self) -> dict[str, RemoteFile]:
        """Return all files."""
        return {**self.small, **self.weights}

    @property
    def nbytes(self) -> int:
        """Return the number of bytes of all files."""
        return sum(file.size for file in self.files.values())


def needed_names(names: Iterable[str], read_shards: Callable[[], list[str]]) -> tuple[list[str], list[str]]:
    """Choose among the files of a model or adapter: the small files to copy, and the files with its tensors.

    Parameters
    ----------
    read_shards
        Reads the shards' names from their index.
    """
    there = set(names)
    small = sorted(name for name in there if goes_along(name) and _is_safe(name))
    weights = [name for name in (SINGLE_NAME, WEIGHTS_NAME) if name in there]
    if INDEX_NAME in there:
        small = sorted({*small, INDEX_NAME})
        weights += [name for name in read_shards() if name in there and name not in weights]
    return small, weights


def shards_of(index: Mapping[str, Any], where: str) -> list[str]:
    """List the shards named in an index from an address, after checking that each is a plain name."""
    weight_map = index.get("weight_map")
    values = weight_map.values() if isinstance(weight_map, dict) else ()
    return [check_shard_name(name, where) for name in dict.fromkeys(map(str, values))]


def refuse_pipeline(shown: str, names: Collection[str]) -> None:
    """Refuse a diffusers pipeline or its adapter, by the names of the files at an address."""
    if {INDEX_NAME, SINGLE_NAME, *ADAPTER_FILES}.isdisjoint(names):
        for kind in (kind for name, kind in PIPELINE_FILES.items() if name in names):
            raise UnsupportedError(f"{shown}: {kind} is not read remotely; download it and name its directory")


def check_small(shown: str, size: int) -> None:
    """Refuse a file too large for one without weights, because it would always be downloaded."""
    if size > MAX_INDEX_BYTES:
        most, found = format_sizes(MAX_INDEX_BYTES, size)
        raise InputError(f"{shown}: expected at most {most} for such a file, found {found}; check the address")


def _is_safe(name: str) -> bool:
    """Test whether a name listed by a server stays below its directory."""
    return all(part not in ("", ".", "..") and "\\" not in part and "\0" not in part for part in name.split("/"))
