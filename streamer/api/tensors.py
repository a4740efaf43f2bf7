"""Offer the crash-safe writer of safetensors, and a reader, as functions of the library: one tensor in memory at a time."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamer import __version__
from streamer.errors import FormatError, MismatchError, UsageError
from streamer.storage import atomic_file, transaction
from streamer.storage.checkpoint import (
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    open_checkpoint,
    shard_names,
)
from streamer.storage.files import locked, make_directory
from streamer.storage.header import TensorInfo, layout, tensor_nbytes
from streamer.weights.base import SPELLINGS, as_bytes, as_tensor, in_memory

WRITTEN_BYTES = 4 << 20
"""Bytes of a tensor that are copied, hashed and written at a time."""

Pairs = Iterator[tuple[str, Any]]


def write_safetensors(
    path: str | Path,
    entries: Iterable[tuple[str, object, Sequence[int]]],
    tensors: Iterable[tuple[str, Tensor | np.ndarray[Any, Any] | atomic_file.Buffer]],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Write tensors as they come, one at a time, into files that appear only when they are complete and durable.

    An interrupted directory has no index, or no ``model.safetensors``; the same call starts it over.

    Parameters
    ----------
    path
        A name that ends in ``.safetensors`` for one file, else a directory: it gets ``model.safetensors``, or shards with an index, and
        ``streamer.json``, which lists the SHA-256 of each file.
    entries
        ``(name, dtype, shape)`` of each tensor, in the order of writing. The dtype is the format's, such as ``"BF16"``, torch's or numpy's.
    tensors
        ``(name, tensor)`` in the same order. A tensor is an array of torch or numpy with the dtype and shape of its entry, or its bytes. If
        torch lacks the dtype, flat uint8 counts as bytes. The caller may use a tensor's memory again when the next one is asked for.
    metadata
        Strings by name for each file's header; transformers expects ``{"format": "pt"}``.
    max_shard_bytes
        Most bytes of tensors in a file of a directory; a larger tensor gets a file of its own.
    overwrite
        Whether to replace a file, or an earlier output in the directory with the files that its record lists. Nothing of it changes
        until all new tensors are written beside it, so that an error leaves it as it was, and `tensors` may read from it.

    Raises
    ------
    StreamerError
        `UsageError` for an invalid argument, or an invalid or repeated entry; `MismatchError` for a tensor that is missing, is one too
        many, or differs from its entry; `OutputExistsError` for an output that is not replaced; `StorageError` if the disk refuses.
    """
    path = Path(path)
    pairs = map(_pair, tensors)
    ring = atomic_file.BufferRing(WRITTEN_BYTES)
    texts: Any = {} if metadata is None else metadata
    if not isinstance(texts, Mapping) or not all(
        isinstance(text, str) for text in chain.from_iterable(texts.items())
    ):
        raise UsageError(f"metadata: expected strings by name, found {texts}")
    if max_shard_bytes < 1:
        raise UsageError(f"max_shard_bytes: expected 1 or more, found {max_shard_bytes}")
    if path.suffix == ".safetensors":
        (plan,) = _planned(entries, texts, math.inf)
        _write_file(path, plan, _shard(plan, pairs, ring, is_last=True), overwrite)
        return
    plans = _planned(entries, texts, max_shard_bytes)
    shards = [(plan, _shard(plan, pairs, ring, plan is plans[-1])) for plan in plans]
    _write_directory(path, shards, overwrite)


def _write_file(
    path: Path, plan: atomic_file.ShardPlan, shard: atomic_file.Shard, overwrite: bool
) -> None:
    transaction.check_output_path(path.parent, (), path)
    transaction.refuse_within_output(path)
    transaction.check_name(path, atomic_file.partial_name(path.name))
    make_directory(path.parent)
    with locked(transaction.lock_of(path), path):
        transaction.check_replaced(path, overwrite, Path.is_file, "a file")
        atomic_file.remove_partials(path.parent, {path.name})
        atomic_file.write_shard(path.parent, replace(plan, name=path.name), shard)


def _write_directory(
    path: Path, shards: list[tuple[atomic_file.ShardPlan, atomic_file.Shard]], overwrite: bool
) -> None:
    plans = [plan for plan, _ in shards]
    files = {plan.name: plan.nbytes for plan in plans}
    index = atomic_file.index_bytes(
        {"weight_map": {info.name: plan.name for plan in plans for info in plan.header.tensors}},
        sum(plan.header.data_bytes for plan in plans),
    )
    other = INDEX_NAME
    if len(plans) > 1:
        files[INDEX_NAME] = len(index)
        other = SINGLE_NAME
    # One digest for all: no run is ever taken up, as nothing is known of the tensors to come.
    output = transaction.OutputPlan(
        path, tuple(files.items()), "tensors", {}, (), (other,), version=__version__
    )
    transaction.inspect_output(output, overwrite, resume=False)
    with (
        transaction.locked_outputs([output], overwrite, resume=False) as (begun,),
        contextlib.ExitStack() as undo,
    ):
        undo.callback(atomic_file.remove_partials, path, {SINGLE_NAME})
        # All partial files have one name, so that a run with another number of shards also finds and removes them.
        written = [
            atomic_file.write_shard(path, replace(plan, name=SINGLE_NAME), shard, renames=False)
            for plan, shard in shards
        ]
        out = undo.enter_context(begun)
        for plan, file in zip(plans, written, strict=True):
            out.take(plan.name, file.partial.absolute(), file.written, file.sha256)
        if len(plans) > 1:
            with out.file(INDEX_NAME, len(index)) as last:
                last.write(index)
        # Without a plan, no call counts the output as its own: what a finished output lacks is not replaced by other tensors.
        out.commit({"schema": "streamer.output/tensors", "version": __version__, "plan": ""})


def read_tensors(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(name, tensor)`` in file order, one tensor in memory at a time. The call itself checks headers and index.

    Parameters
    ----------
    path
        A ``.safetensors`` file, or a directory with ``model.safetensors`` or shards and their index.

    Yields
    ------
    name, tensor
        Tensors in memory of their own; of a dtype that torch lacks, the bytes, as flat uint8.

    Raises
    ------
    StreamerError
        `FormatError` for files or an index that are damaged or disagree, `MissingInputError` for missing ones, and `InputChangedError` for
        a file that changes in between.
    """
    return _read(open_checkpoint(path, "pread"))


def _read(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    for file in checkpoint.files.values():
        with file.read_through(by_several=False):
            for info in file.header.tensors:
                data = atomic_file.gather(file.chunks(info), info.nbytes)
                file.check_unchanged()
                yield info.name, as_tensor(data, *in_memory(info))


def _planned(
    entries: Iterable[tuple[str, object, Sequence[int]]], metadata: Mapping[str, str], limit: float
) -> list[atomic_file.ShardPlan]:
    """Plan the files of a directory, which hold up to `limit` bytes of tensors each."""
    checked = [*map(_checked, entries)]
    try:
        header, _ = layout(checked, metadata)
    except (FormatError, UnicodeEncodeError) as e:
        raise UsageError(f"entries and metadata: {e}") from None
    groups: list[list[TensorInfo]] = [[]]
    for info in header.tensors:
        if groups[-1] and info.end - groups[-1][0].start > limit:
            groups.append([])
        groups[-1].append(info)
    return [
        atomic_file.plan_shard(name, [(i.name, i.dtype, i.shape) for i in group], dict(metadata))
        for name, group in zip(shard_names(len(groups)), groups, strict=True)
    ]


def _checked(entry: tuple[str, object, Sequence[int]]) -> tuple[str, str, tuple[int, ...]]:
    """Check an entry, and spell its dtype as the format does."""
    try:
        name, dtype, sizes = entry
        spelled = str(_spelling(dtype))
        shape = tuple(map(operator.index, sizes))
        str.encode(name)
        if name == "__metadata__" or min(shape, default=0) < 0:
            raise ValueError("the name is the metadata's, or a size is negative")
        tensor_nbytes(spelled, shape)
    except (TypeError, ValueError) as e:
        raise UsageError(f"entry {entry!r}: {e}") from None
    return name, spelled, shape


def _spelling(dtype: object) -> object:
    """Spell a dtype of torch or numpy as the format does; any other is returned as it is."""
    if isinstance(dtype, type) and issubclass(dtype, np.generic):
        dtype = np.dtype(dtype)
    of_torch: Any = getattr(torch, str(dtype).removeprefix("torch."), None)
    return SPELLINGS.get(of_torch, dtype)


def _pair(item: Any) -> tuple[str, Any]:
    """Check that an item of the tensors is a pair of a name and a tensor."""
    if not (isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str)):
        raise UsageError(
            f"tensors: expected pairs (name, tensor), as a dict's items(), found {type(item).__name__}"
        )
    return item[0], item[1]


def _shard(
    plan: atomic_file.ShardPlan, pairs: Pairs, ring: atomic_file.BufferRing, is_last: bool
) -> atomic_file.Shard:
    for info in plan.header.tensors:
        yield info, _pieces(info, pairs, ring)
    if is_last and (surplus := next(pairs, None)) is not None:
        raise MismatchError(
            f"tensor {surplus[0]!r}: has no entry; give each tensor an entry, in the same order"
        )


def _pieces(
    info: TensorInfo, pairs: Pairs, ring: atomic_file.BufferRing
) -> Iterator[atomic_file.Piece]:
    """Take the next tensor, check it, and copy it piece by piece: its owner may change it while the last pieces are being written."""
    name, tensor = next(pairs, ("no more tensors", None))
    if name != info.name:
        raise MismatchError(
            f"tensor {info.name!r}: expected next, found {name!r}; give the tensors of all entries in their order"
        )
    data = _data(info, tensor)
    for at in range(0, info.nbytes, WRITTEN_BYTES):
        part = data[at : at + WRITTEN_BYTES]
        piece = ring.lease(len(part))
        piece.view[:] = part
        yield piece


def _data(info: TensorInfo, tensor: Any) -> memoryview:
    """View a tensor as bytes, after a check of its dtype, shape and number of bytes."""
    if isinstance(tensor, bytes | bytearray | memoryview):
        wanted = f"{info.nbytes} bytes"
        description = f"{memoryview(tensor).nbytes} bytes"
    else:
        dtype, shape = in_memory(info)
        wanted = f"{SPELLINGS[dtype]} {[*shape]}"
        found = _spelling(getattr(tensor, "dtype", type(tensor)))
        description = f"{found} {[*getattr(tensor, 'shape', ())]}"
    if wanted != description:
        raise MismatchError(
            f"tensor {info.name!r}: expected {wanted} by its entry, found {description}"
        )
    if isinstance(tensor, np.ma.MaskedArray):
        raise MismatchError(
            f"tensor {info.name!r}: expected plain values in memory, found a masked array; fill it"
        )
    try:
        if isinstance(tensor, Tensor):
            return as_bytes(tensor.detach().cpu())
        is_array = hasattr(tensor, "dtype")
        array = np.ascontiguousarray(tensor) if is_array else np.frombuffer(tensor, np.uint8)
        return array.reshape(-1).view(np.uint8).data
    # Of torch: sparse, on the meta device, or lazily conjugated.
    except (BufferError, RuntimeError) as e:
        raise MismatchError(f"tensor {info.name!r}: expected plain values in memory; {e}") from None
