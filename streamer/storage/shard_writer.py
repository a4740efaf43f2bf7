"""Plan output shards from headers alone, then stream them tensor by tensor.

A planned file is a header and, for each tensor in offset order, pieces of bytes that the writer pulls and releases.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamer.errors import NumericError
from streamer.storage.atomic_file import AtomicFile
from streamer.storage.buffers import Buffer, Piece
from streamer.storage.files import make_directory
from streamer.storage.header import DIGEST, Header, TensorInfo, layout, read_header

Shard = Iterable[tuple[TensorInfo, Iterable[Piece]]]
"""The tensors of a file in file order, with the pieces of each."""


@dataclass(frozen=True)
class ShardPlan:
    """Name, header and header bytes of an output file, whose exact size is known before a byte is written."""

    name: str
    header: Header
    raw_header: bytes

    @property
    def nbytes(self) -> int:
        """Return the number of bytes of the whole file."""
        return self.header.file_bytes

    def sealed(self, source: Callable[[TensorInfo], Iterable[Buffer]]) -> ShardPlan:
        """Put the SHA-256 (hex) of the whole file into its metadata in place of `NO_DIGEST`, with which it is computed."""
        digest = hashlib.sha256(self.raw_header)
        for info in self.header.tensors:
            for piece in source(info):
                digest.update(piece)
        return self.with_metadata(DIGEST, digest.hexdigest())

    def with_metadata(self, key: str, value: str) -> ShardPlan:
        """Replace a metadata value by one that is not longer; spaces in the header keep the planned size."""
        if self.header.metadata.get(key) == value:
            return self
        prefix = self.header.prefix
        entries = [(t.name.removeprefix(prefix), t.dtype, t.shape) for t in self.header.tensors]
        header, raw = layout(entries, {**self.header.metadata, key: value}, len(self.raw_header) - 8)
        if header.file_bytes != self.nbytes:
            raise NumericError(f"{self.name}: its header outgrew the plan; please report this")
        return ShardPlan(self.name, header.prefixed(prefix), raw)


def plan_shard(name: str, entries: Iterable[tuple[str, str, Iterable[int]]], metadata: dict[str, str]) -> ShardPlan:
    """Plan a file from (tensor name, dtype, shape) in file order; the names of a pipeline's tensors begin with their component."""
    prefix = component_prefix(name)
    header, raw = layout([(tensor.removeprefix(prefix), dtype, shape) for tensor, dtype, shape in entries], metadata)
    return ShardPlan(name, header.prefixed(prefix), raw)


def component_prefix(name: str) -> str:
    """Return the prefix of the names of a file's tensors: ``unet/diffusion_pytorch_model.safetensors`` → ``unet.``."""
    component, slash, _ = name.rpartition("/")
    return f"{component}." if slash else ""


class ShardFile(AtomicFile):
    """A planned file, written as an `AtomicFile`: its tensors are pulled one by one, in the plan's order."""

    def __init__(self, directory: Path, plan: ShardPlan, renames: bool = True) -> None:
        make_directory((directory / plan.name).parent)
        super().__init__(directory / plan.name, plan.nbytes, plan.raw_header, renames)
        self._plan, self._following = plan, iter(plan.header.tensors)

    def add(self, info: TensorInfo, pieces: Iterable[Piece]) -> None:
        """Pull the next tensor's pieces, hash and write them, and check their total size."""
        begun = self.written
        if next(self._following, None) != info:
            raise NumericError(f"tensor {info.name!r}: the plan has another one here; please report this")
        for piece in pieces:
            self.append(piece)
        if (found := self.written - begun) != info.nbytes:
            raise NumericError(f"tensor {info.name!r}: planned {info.nbytes} bytes, got {found}; please report this")

    def complete(self) -> None:
        """Check and fsync, then read the header back from disk with the strict reader: it must equal the plan's."""
        super().complete()
        if read_header(self._fd, str(self.path)).digest != self._plan.header.digest:
            raise NumericError(f"{self.path}: the header read back differs from what was written; check the disk")


def write_shard(directory: Path, plan: ShardPlan, shard: Shard, renames: bool = True) -> ShardFile:
    """Write a planned file, pulling its tensors in the plan's order, and return it closed."""
    with ShardFile(directory, plan, renames) as file:
        for tensor, pieces in shard:
            file.add(tensor, pieces)
    return file


def write_sealed(directory: Path, plan: ShardPlan, source: Callable[[TensorInfo], Iterable[Buffer]]) -> None:
    """Write a planned file with a digest of all of it, pulling each tensor's bytes twice."""
    write_shard(directory, plan.sealed(source), ((info, map(Piece, source(info))) for info in plan.header.tensors))


def index_bytes(index: dict[str, Any], total_size: int) -> bytes:
    """Make the JSON of an output's index from the base's, with the exact ``total_size``."""
    metadata = index.get("metadata")
    tree = {**index, "metadata": {**(metadata if isinstance(metadata, dict) else {}), "total_size": total_size}}
    return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
