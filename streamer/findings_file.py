"""Write a findings file: its layout, what stands beside it meanwhile, and one that is written at once.

On disk findings are one safetensors file. For the base tensor ``T`` it holds ``T/U`` (m, q), ``T/S`` (q,), ``T/Vh`` (q, n), the
intruders' triplets; ``T/singular_values``, ``T/similarity``, ``T/similarity_low``, ``T/similarity_high`` (k,) float64;
``T/intruders`` (q,) int64. The metadata's ``findings`` is JSON: identity, options, and the figures of each matrix.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from streamer.errors import InputError, OutputError, OutputExistsError
from streamer.findings_records import AdapterIdentity, BaseIdentity, MatrixFigures, OptionsRecord
from streamer.storage.atomic import Buffer, locked, make_directory, partial_name, remove_partials
from streamer.storage.header import TensorInfo
from streamer.storage.place import check_name, check_place, check_space, refuse_symlink
from streamer.storage.shards import ShardPlan, plan_shard, write_shard
from streamer.storage.tensorfile import TensorFile

SCHEMA = "streamer.findings/1"

ARRAYS = ("U", "S", "Vh", "singular_values", "similarity", "similarity_low", "similarity_high", "intruders")
"""The arrays of a matrix, in file order."""

DTYPE_NAMES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}

Entry = tuple[str, str, tuple[int, ...]]
"""A tensor's name, dtype and shape."""


def journal_of(path: Path) -> Path:
    """Where the journal of a findings file stands while it is being made."""
    return path.with_name(f".{path.name}.journal")


def lock_of(path: Path) -> Path:
    """Where the lock of a findings file stands while it is being made."""
    return path.with_name(f".{path.name}.lock")


def remove_leftovers(path: Path) -> None:
    """Remove what stands beside a findings file after a run that was killed: journal, lock, partials.

    Raises
    ------
    LockedError
        If a run is at work there.
    """
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    if any(p.name.startswith((f".{path.name}.", f"..{path.name}.")) for p in beside):
        with locked(lock_of(path), path):
            remove_partials(path.parent, {path.name, journal_of(path).name})
            journal_of(path).unlink(missing_ok=True)


def check_findings_place(path: Path, make_parent: bool) -> None:
    """Refuse a path where no findings file can be written: a directory, a symlink, a hub cache, a missing or locked directory.

    Parameters
    ----------
    make_parent
        Whether the file's directory may still be missing.
    """
    if path.is_dir():
        raise OutputError(f"{path}: is a directory, expected the name of a file to write; add one to the path")
    if not make_parent and not path.parent.exists():
        raise OutputError(f"{path}: directory {path.parent} does not exist; create it first")
    check_name(path, partial_name(journal_of(path).name))
    refuse_symlink(path)
    if make_parent:
        refuse_symlink(path.parent)
    check_place(path.parent.resolve(), (), path)


def matrix_entries(tensor: str, arrays: Mapping[str, Tensor]) -> list[Entry]:
    """The entries of one matrix."""
    return [(f"{tensor}/{key}", DTYPE_NAMES[t.dtype], tuple(t.shape)) for key, t in arrays.items()]


def plan_findings_file(
    name: str,
    base: BaseIdentity,
    adapter: AdapterIdentity,
    options: OptionsRecord,
    matrices: Sequence[MatrixFigures],
    entries: Iterable[Entry],
) -> ShardPlan:
    """Lay out a findings file: the same findings give the same bytes, however they are written."""
    text = json.dumps({"base": base, "adapter": adapter, "options": options, "matrices": matrices})
    return plan_shard(name, list(entries), {"schema": SCHEMA, "findings": text})


def is_findings_file(path: Path) -> bool:
    """Whether a file's header says that it holds findings of this schema."""
    try:
        return TensorFile(path).header.metadata.get("schema") == SCHEMA
    except InputError:
        return False


def save_findings_file(
    path: Path, shard: ShardPlan, source: Callable[[TensorInfo], Iterable[Buffer]], overwrite: bool
) -> None:
    """Write a findings file at once, atomically; missing directories are made.

    Parameters
    ----------
    path
        The file.
    shard
        Its layout.
    source
        Gives the bytes of each tensor.
    overwrite
        Whether to replace findings at the path, and the journal of an interrupted run. An empty file is replaced in any case.

    Raises
    ------
    OutputExistsError
        If something else stands there.
    OutputError, StorageError, LockedError
        If it cannot be written there.
    """
    check_findings_place(path, make_parent=True)
    if path.exists() and path.stat().st_size > 0:
        if not overwrite:
            raise OutputExistsError(f"{path}: exists; choose another output, or pass overwrite=True", path)
        if not is_findings_file(path):  # it may be weights
            raise OutputExistsError(
                f"{path}: exists and is not findings, which is all that is replaced; choose another output", path
            )
    if journal_of(path).exists() and not overwrite:
        raise OutputExistsError(
            f"{path}: an interrupted run has its journal there; finish that one, choose another output, or pass overwrite=True",
            journal_of(path),
        )
    check_space(path, shard.nbytes)
    make_directory(path.parent)
    with locked(lock_of(path), path):
        remove_partials(path.parent, {path.name, journal_of(path).name})
        write_shard(path.parent, shard, source, lambda _size, _sha256: None)
        journal_of(path).unlink(missing_ok=True)
