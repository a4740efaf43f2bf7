"""Output shards: planned from headers alone, then streamed tensor by tensor.

A planned file is a header and, for each tensor in offset order, a source of bytes. Nothing is held but the piece in hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamer.errors import NumericError
from streamer.storage.atomic_file import AtomicFile, Buffer
from streamer.storage.header import Header, TensorInfo, layout, read_header

Source = Callable[[TensorInfo], Iterable[Buffer]]
"""Gives the bytes of a planned tensor, in pieces; each must stay as it is until `QUEUE` more were asked for."""


@dataclass(frozen=True)
class ShardPlan:
    """Name, header and header's bytes of an output file, whose size is exact before a byte is written."""

    name: str
    header: Header
    raw_header: bytes

    @property
    def nbytes(self) -> int:
        """Count the bytes of the whole file."""
        return self.header.file_bytes

    def with_metadata(self, key: str, value: str) -> ShardPlan:
        """Replace a value in the metadata by one that is no longer; spaces in the header keep the planned size."""
        if self.header.metadata.get(key) == value:
            return self
        entries = [(t.name, t.dtype, t.shape) for t in self.header.tensors]
        header, raw = layout(entries, {**self.header.metadata, key: value}, len(self.raw_header) - 8)
        if header.file_bytes != self.nbytes:
            raise NumericError(f"{self.name}: its header outgrew the plan; please report this")
        return ShardPlan(self.name, header, raw)


def plan_shard(name: str, entries: Iterable[tuple[str, str, Iterable[int]]], metadata: dict[str, str]) -> ShardPlan:
    """Plan a file from (tensor name, dtype, shape) in file order."""
    header, raw = layout(entries, metadata)
    return ShardPlan(name, header, raw)


def like(name: str, header: Header, metadata: Mapping[str, str] | None = None) -> ShardPlan:
    """Plan a file with the tensors, order and metadata of an existing one, and more metadata."""
    entries = [(t.name, t.dtype, t.shape) for t in header.tensors]
    return plan_shard(name, entries, {**header.metadata, **(metadata or {})})


def write_shard(directory: Path, plan: ShardPlan, source: Source, before_rename: Callable[[int, str], None]) -> None:
    """Write a planned file; see `shard_steps`."""
    for _ in shard_steps(directory, plan, source, before_rename):
        pass


def write_partial(directory: Path, plan: ShardPlan, source: Source) -> tuple[str, int, str]:
    """Write a planned file, and leave it under the name of a partial one; return that name, its size and its SHA-256."""
    found: list[tuple[int, str]] = []
    name = ""
    for _, f in shard_steps(directory, plan, source, lambda *one: found.append(one), renames=False):
        name = f.partial.name
    return name, *found[0]


def shard_steps(
    directory: Path, plan: ShardPlan, source: Source, before_rename: Callable[[int, str], None], renames: bool = True
) -> Generator[tuple[TensorInfo, AtomicFile], None, None]:
    """Write a planned file through an `AtomicFile`, which is given with each tensor before that is written.

    Before the rename the header is read back from the disk by the strict reader and must equal the plan's; then
    `before_rename` is called with its size and SHA-256; it may raise to stop the rename.
    """

    def check(fd: int) -> None:
        if read_header(fd, str(directory / plan.name)).digest != plan.header.digest:
            raise NumericError(
                f"{directory / plan.name}: the header read back differs from what was written; check the disk"
            )
        before_rename(f.written, f.sha256)

    with AtomicFile(directory / plan.name, plan.nbytes, check, renames) as f:
        f.write(plan.raw_header)
        for info in plan.header.tensors:
            yield info, f
            begun = f.written
            piece: Buffer = b""
            for piece in source(info):
                f.write(piece)
            del piece  # not to be held while other files are written
            if f.written - begun != info.nbytes:
                raise NumericError(
                    f"tensor {info.name!r}: planned {info.nbytes} bytes, got {f.written - begun}; please report this"
                )


def index_bytes(index: dict[str, Any], total_size: int) -> bytes:
    """Make the JSON of an output's index from the base's, with the exact ``total_size``."""
    metadata = index.get("metadata")
    tree = {**index, "metadata": {**(metadata if isinstance(metadata, dict) else {}), "total_size": total_size}}
    return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
