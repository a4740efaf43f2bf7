"""Layout of a findings file, the paths of its journal and its lock, and writing one at once.

On disk findings are one safetensors file. For the base tensor ``T`` it holds ``T/U`` (m, q), ``T/S`` (q,), ``T/Vh`` (q, n), the
intruders' triplets; ``T/singular_values``, ``T/similarity``, ``T/similarity_low``, ``T/similarity_high``,
``T/base_singular_values`` (k,) float64; ``T/intruders`` (q,) int64. The metadata's ``findings`` is JSON: identity, options, and the
figures of each matrix.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import torch
from torch import Tensor

from streamer.detection.findings_records import MatrixFigures
from streamer.detection.stamps import STAMP, detection_record, stamp
from streamer.errors import FormatError, InputError, OutputError, OutputExistsError, UsageError
from streamer.plan.sources import Source
from streamer.storage.atomic_file import Buffer, partial_name, remove_partials
from streamer.storage.files import make_directory
from streamer.storage.header import TensorInfo
from streamer.storage.lock import locked
from streamer.storage.output_checks import check_name, check_output_path, check_space, refuse_address, refuse_symlink
from streamer.storage.shard_writer import ShardPlan, plan_shard, write_shard
from streamer.storage.tensor_file import TensorFile

if TYPE_CHECKING:
    from streamer.detection.findings import Findings

SCHEMA: Final = "streamer.findings/1"

COEFFICIENTS = "streamer.coefficients"
"""Key in the metadata of files of coefficients, which are named where one is given in place of findings."""

DIGEST = "sha256"
"""The key in the metadata of a digest over all of the file."""

FACTORS = ("U", "S", "Vh")
NUMBERS = ("singular_values", "similarity", "similarity_low", "similarity_high", "base_singular_values")
ARRAYS = (*FACTORS, *NUMBERS, "intruders")
"""The arrays of a matrix, in file order."""

DTYPE_NAMES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}

Entry = tuple[str, str, tuple[int, ...]]
"""A tensor's name, dtype and shape."""


def journal_of(path: Path) -> Path:
    """Give the path of the journal of a findings file that is being made: ``dir/f.safetensors`` → ``dir/.f.safetensors.journal``."""
    return path.with_name(f".{path.name}.journal")


def lock_of(path: Path) -> Path:
    """Give the path of the lock of a findings file that is being made: ``dir/f.safetensors`` → ``dir/.f.safetensors.lock``."""
    return path.with_name(f".{path.name}.lock")


def remove_leftovers(path: Path) -> None:
    """Remove the journal, lock and partials that a killed run left for a findings file.

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


def check_findings_path(path: Path) -> None:
    """Refuse a path where no findings file can be written: an address, a directory, a symlink, a hub cache. Its parent may be missing."""
    refuse_address(path)
    if path.is_dir():
        raise OutputError(f"{path}: is a directory, expected the name of a file to write; add one to the path")
    check_name(path, partial_name(journal_of(path).name))
    refuse_symlink(path)
    check_output_path(path.parent.resolve(), (), path)


def check_findings_name(path: Path) -> None:
    """Refuse the name of a findings file that other programs would not take for one."""
    if path.suffix != ".safetensors" and not path.is_dir():
        raise UsageError(f"{path}: expected a name that ends in .safetensors, such as {path}.safetensors")


def matrix_entries(tensor: str, arrays: Mapping[str, Tensor]) -> list[Entry]:
    """List the entries of one matrix: ``q.weight`` → ``q.weight/U``, ``q.weight/S`` and so on."""
    return [(f"{tensor}/{key}", DTYPE_NAMES[t.dtype], tuple(t.shape)) for key, t in arrays.items()]


def plan_findings_file(
    name: str, head: Findings, matrices: Sequence[MatrixFigures], entries: Iterable[Entry]
) -> ShardPlan:
    """Lay out a findings file. Equal findings give equal bytes, whether written at once or through a journal.

    Parameters
    ----------
    head
        Identity and options; its matrices are not used.
    """
    tree = {"base": head.base, "adapter": head.adapter, "options": head.options.as_dict(), "matrices": matrices}
    metadata = {"schema": SCHEMA, "findings": json.dumps(tree), DIGEST: "0" * 64}
    if head.sources:
        detection = detection_record(head.options, sum(m["certified"] is True for m in matrices), len(matrices))
        base, adapter = (cast(Source, head.sources[what]) for what in ("base", "adapter"))
        metadata[STAMP] = stamp("detect", base, adapter, detection)
    return plan_shard(name, list(entries), metadata)


def seal(shard: ShardPlan, source: Callable[[TensorInfo], Iterable[Buffer]]) -> ShardPlan:
    """Put into the metadata the SHA-256 (hex) of the whole file, taken with zeros in the digest's own place."""
    digest = hashlib.sha256(shard.raw_header)
    for info in shard.header.tensors:
        for piece in source(info):
            digest.update(piece)
    return shard.with_metadata(DIGEST, digest.hexdigest())


def check_digest(file: TensorFile) -> None:
    """Compare an open findings file with the digest that it states of itself, which takes about 1 s for a gigabyte.

    Raises
    ------
    FormatError
        If they differ, or it states none, as files of versions before 0.2: whether such a file is intact cannot be known.
    """
    stated = file.header.metadata.get(DIGEST)
    if stated is None:
        raise FormatError(
            f"{file.path}: expected a SHA-256 of the file in its metadata, found none, as in findings of versions before 0.2; "
            "run detect again"
        )
    if (found := file.digest_without(stated)) != stated:
        raise FormatError(
            f"{file.path}: is damaged: expected SHA-256 {stated[:16]}… by its metadata, found {found[:16]}…; copy it again, or run detect "
            "again"
        )


def is_findings_file(path: Path) -> bool:
    """Say whether a file's header states findings of this schema."""
    try:
        return TensorFile(path).header.metadata.get("schema") == SCHEMA
    except InputError:
        return False


def refuse_foreign(path: Path) -> None:
    """Refuse to replace a file that is not findings: it may be weights."""
    if not is_findings_file(path):
        raise OutputExistsError(
            f"{path}: exists and is not findings, which is all that is replaced; choose another output", path
        )


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
    check_findings_path(path)
    if path.exists() and path.stat().st_size > 0:
        if not overwrite:
            raise OutputExistsError(f"{path}: exists; choose another output, or pass overwrite=True", path)
        refuse_foreign(path)
    if journal_of(path).exists() and not overwrite:
        raise OutputExistsError(
            f"{path}: an interrupted run has its journal there; finish that one, choose another output, or pass overwrite=True",
            journal_of(path),
        )
    check_space(path, shard.nbytes)
    make_directory(path.parent)
    with locked(lock_of(path), path):
        remove_partials(path.parent, {path.name, journal_of(path).name})
        write_shard(path.parent, seal(shard, source), source, lambda _size, _sha256: None)
        journal_of(path).unlink(missing_ok=True)
