"""Keep what detection needs of a base alone in a directory, a file for each matrix, for all adapters on that base.

On disk the leading triplets of a matrix (out, in) are one safetensors file of ``U`` (out, q), ``S`` (q,) float64 and ``V`` (in, q),
with q from 0 to 64. It is named for the tensor and for a digest of sampled values: that of ``model.layers.0.mlp.up_proj.weight`` with
digest ``5f0c…`` is ``model.layers.0.mlp.up_proj.weight.5f0c….safetensors``, so that a base which has changed finds none. Each file is
written in one step and stays as it is, so that any number of runs and workers may share a directory.

A process that begins from triplets which are none of its matrix measures that (`GolubKahan`), settles nothing, and the matrix is done
without them. That none of the leading triplets is lacking between others is not measured: it rests, as in a process without an index, on
the random columns of the process that found them, and a digest over the file's values says that they are as they were written.
"""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import torch
from torch import Tensor

from streamer.detection.fingerprints import matrix_digest
from streamer.detection.solvers import matrix_scale
from streamer.errors import FormatError, LockedError
from streamer.linalg.golub_kahan import KnownTriplets
from streamer.linalg.known_triplets import KNOWN, known_triplets
from streamer.linalg.operators import Matrix, all_finite
from streamer.linalg.torch_state import full_float32
from streamer.storage.atomic_file import remove_partials
from streamer.storage.files import make_directory
from streamer.storage.header import TensorInfo
from streamer.storage.lock import locked
from streamer.storage.output_checks import check_output_path, check_space
from streamer.storage.shard_writer import plan_shard, write_shard
from streamer.storage.tensor_file import TensorFile
from streamer.weights.base import Weight
from streamer.weights.dtypes import SPELLINGS, TORCH_DTYPES, as_bytes, as_tensor

SCHEMA = "streamer.base-index/1"

HEADER_BYTES = 4096
"""Of a file's header, at most: names have some hundreds."""

DTYPES = {"U": "F32", "S": "F64", "V": "F32"}

ORTHONORMAL = 2e-5
"""How far entries of the vectors' Gram matrix may be from the identity's: rounding leaves 2e-6, and bounds may be off by 64 times that."""


class BaseIndex:
    """Leading singular triplets of a base's matrices, read from a directory, or made and written there.

    Parameters
    ----------
    directory
        Made with the first file.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def check(self, inputs: Sequence[Path], shapes: Mapping[str, tuple[int, int]]) -> None:
        """Refuse a directory that is an input, lies in one, or cannot be written, and a disk that has too little room.

        Parameters
        ----------
        inputs
            Directories and files.
        shapes
            Of the matrices that it may get files of, by tensor.

        Raises
        ------
        OutputError, StorageError
            If it is refused.
        """
        check_output_path(self.directory, inputs)
        there = {p.name.rsplit(".", 2)[0] for p in self.directory.iterdir()} if self.directory.exists() else set()
        lacking = [shape for tensor, shape in shapes.items() if _quoted(tensor) not in there]
        check_space(
            self.directory, sum(4 * KNOWN * (m + n) + 8 * KNOWN + HEADER_BYTES for m, n in lacking), at_most=True
        )

    def triplets(self, tensor: str, weight: Weight, transposed: bool, base: Matrix) -> KnownTriplets | None:
        """Read those of a matrix, or make and write them; None where it is zero or not finite.

        Parameters
        ----------
        tensor, weight, transposed
            Its name and values, and whether they are stored as (in, out).
        base
            The matrix as (out, in), for its products.

        Raises
        ------
        FormatError
            If another kind of file has the name.
        """
        digest = matrix_digest(weight, transposed)
        path = self.directory / f"{_quoted(tensor)}.{digest}.safetensors"
        if path.exists():
            _remove_leftovers(path)
            return _read(path, base.shape)
        scale = matrix_scale(base)
        if not scale:
            return None
        generator = torch.Generator().manual_seed(zlib.crc32(f"index of {tensor}".encode()))
        with full_float32():
            found = known_triplets(base.scaled(scale), generator).scaled(1 / scale)
        make_directory(self.directory)
        with contextlib.suppress(LockedError):  # another run is writing it
            return _write(path, found, {"schema": SCHEMA, "tensor": tensor, "values": digest})
        return found


def _write(path: Path, found: KnownTriplets, metadata: dict[str, str]) -> KnownTriplets:
    """Write a file, unless another run has in the meantime; what it holds then."""
    arrays = found._asdict()
    metadata = metadata | {"sha256": _digest(found)}
    entries = [(name, SPELLINGS[t.dtype], t.shape) for name, t in arrays.items()]

    def source(info: TensorInfo) -> list[memoryview]:
        return [as_bytes(arrays[info.name])]

    with locked(_lock_of(path), path):
        remove_partials(path.parent, {path.name})
        if path.exists():
            return _read(path, (len(found.U), len(found.V)))
        write_shard(path.parent, plan_shard(path.name, entries, metadata), source, lambda _size, _sha256: None)
    return found


def _quoted(tensor: str) -> str:
    return quote(tensor, safe="")


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _remove_leftovers(path: Path) -> None:
    """Remove the lock of a run that was killed just after the file got its name."""
    if _lock_of(path).exists():
        with contextlib.suppress(LockedError), locked(_lock_of(path), path):
            remove_partials(path.parent, {path.name})


def _read(path: Path, shape: tuple[int, int]) -> KnownTriplets:
    file = TensorFile(path, "pread")
    if file.header.metadata.get("schema") != SCHEMA or {t.name: t.dtype for t in file.header.tensors} != DTYPES:
        raise FormatError(f"{path}: is no part of a base index of this version; remove it, or give another directory")
    infos = file.header.by_name
    found = KnownTriplets(*(_read_array(file, infos[name]) for name in DTYPES))
    if not _sound(found, shape) or file.header.metadata.get("sha256") != _digest(found):
        raise FormatError(
            f"{path}: holds no singular triplets of a {shape[0]}x{shape[1]} matrix; remove it: it is made again"
        )
    return found


def _read_array(file: TensorFile, info: TensorInfo) -> Tensor:
    # A copy: LAPACK's bits depend on the alignment of its input, and a view has any.
    return as_tensor(file.view(info), TORCH_DTYPES[info.dtype], info.shape).clone()


def _digest(found: KnownTriplets) -> str:
    digest = hashlib.sha256()
    for array in found:
        digest.update(as_bytes(array))
    return digest.hexdigest()


def _sound(found: KnownTriplets, shape: tuple[int, int]) -> bool:
    """Test whether these are falling values and orthonormal vectors of these sizes, on which the process relies."""
    q = len(found.S)
    if [t.shape for t in found] != [(shape[0], q), (q,), (shape[1], q)]:
        return False
    finite = all(map(all_finite, found))
    falling = bool((found.S[:-1] >= found.S[1:]).all()) and bool((found.S > 0).all())
    return finite and falling and _orthonormal(found.U) and _orthonormal(found.V)


def _orthonormal(vectors: Tensor) -> bool:
    gram = vectors.T @ vectors - torch.eye(vectors.shape[1])
    return gram.numel() == 0 or float(gram.abs().max()) < ORTHONORMAL
