"""Open models on disk: safetensors files, and the checkpoints that they form (one file, shards with an index, or a diffusers pipeline).

A file is opened read-only, once, and stays open, so that reads see the planned file even if its name is replaced. A tensor
is read through a window that maps only its own bytes, or into a buffer; dropping the view releases it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from streamer.errors import FormatError, InputError
from streamer.storage.atomic_file import BufferRing, Piece
from streamer.storage.files import (
    BaseIdentity,
    absent,
    lacks,
    open_regular,
    storage_errors,
    strict_json,
)
from streamer.storage.header import DIGEST, NO_DIGEST, TensorInfo
from streamer.storage.local_source import IOMode, LocalSource
from streamer.storage.remote_source import RemoteSource, read_manifest
from streamer.units import format_size, listed, quoted

__all__ = ["SAMPLE_BYTES", "IOMode", "TensorFile", "sampled_bytes"]

SAMPLE_BYTES = 4096
"""Number of bytes of each tensor that identify a model."""

HASHED_BYTES = 1 << 20
"""Number of bytes read at a time to hash a file."""

SAMPLES_AT_ONCE = 256
"""Number of samples read at a time: from a remote file, many are requested together."""


class TensorFile:
    """An open safetensors file with a validated header, which gives views of its tensors.

    Parameters
    ----------
    path
        The file; symlinks are followed (hub caches consist of them). If a manifest beside it names it, it is read from its URL.
    io
        ``mmap`` maps each tensor while it is used; ``pread`` copies it, for network file systems, where a map is slow
        and a page that vanishes is fatal.
    prefix
        Added to the names of all tensors.

    Attributes
    ----------
    source
        The source of its bytes.
    remote
        Whether each read crosses a network.
    """

    remote = False
    source: LocalSource | RemoteSource
    _keeps_pages = False
    _read_through = False

    def __init__(self, path: Path, io: IOMode = "mmap", prefix: str = "") -> None:
        self.path = path
        manifest = read_manifest(path.parent)
        far = None if manifest is None else manifest.files.get(path.name)
        source: LocalSource | RemoteSource = (
            LocalSource(path, io) if far is None else RemoteSource(far)
        )
        with contextlib.ExitStack() as undo:
            undo.callback(source.close)
            self.header = source.header().prefixed(prefix)
            undo.pop_all()
        self.source = source
        self.io = source.io
        self.stamp = source.stamp
        self.remote = source.remote

    def close(self) -> None:
        """Close the file; existing views stay valid."""
        if hasattr(self, "source"):  # not if opening failed
            self.source.close()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():  # modules are gone then, `sys` too, and files are closed
            self.close()

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError(
            f"{self.path}: is open, and a process cannot give that to another; it would close a file of the other's"
        )

    def check_unchanged(self) -> None:
        """Raise `InputChangedError` unless the path still names the same, unmodified file."""
        self.source.check_unchanged()

    def view(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> memoryview:
        """Map or read the bytes ``[start, stop)`` of a tensor, relative to its first; by default all of them.

        Raises
        ------
        InputChangedError
            If the file has become shorter than its header says.
        """
        stop = info.nbytes if stop is None else stop
        return self.source.view(self.header.data_start + info.start + start, stop - start)

    def data(self) -> memoryview:
        """Return the bytes of all tensors at once, for many small tensors that stay in use; each is a slice of the result."""
        return self.source.view(self.header.data_start, self.header.data_bytes)

    def chunks(self, info: TensorInfo, size: int = 4 << 20) -> Iterator[Piece]:
        """Yield a tensor's bytes in pieces that the caller releases, while the disk reads ahead."""
        source = self.source
        first = self.header.data_start + info.start
        end = self.header.file_bytes if self._read_through else first + info.nbytes
        ring = BufferRing(min(size, info.nbytes))
        for start in range(0, info.nbytes, size):
            at = first + start
            stop = first + min(start + size, info.nbytes)
            piece = ring.lease(stop - at)
            source.prefetch(at, stop, end)
            source.read_into(piece.view, at)
            if not self._keeps_pages:
                source.release(at, stop)
            yield piece

    @contextlib.contextmanager
    def read_through(self, by_several: bool) -> Iterator[None]:
        """Tell `chunks` that all tensors are read, in file order.

        Parameters
        ----------
        by_several
            Whether several readers take turns with each tensor: its pages then stay in the page cache until `release_pages`. For one
            reader, `chunks` reads ahead beyond the tensor.
        """
        self._read_through = not by_several
        self._keeps_pages = by_several
        try:
            yield
        finally:
            self._read_through = self._keeps_pages = False

    def release_pages(self, stop: int) -> None:
        """Drop pages before `stop`, relative to the first tensor, from the page cache: all readers are done with them."""
        self.source.release(0, self.header.data_start + stop)

    def check_digest(self, again: str) -> None:
        """Compare the whole file with the digest in its metadata, at about 1 s per gigabyte; see `ShardPlan.sealed`.

        Parameters
        ----------
        again
            How to make the file again, for messages.

        Raises
        ------
        FormatError
            If they differ, or the file has no digest, as in versions before 0.2: such a file cannot be checked for damage.
        """
        stated = self.header.metadata.get(DIGEST)
        if stated is None:
            found = "found none, as in files of versions before 0.2"
            raise FormatError(
                f"{self.path}: expected a SHA-256 of the file in its metadata, {found}; {again}"
            )
        source = self.source
        at = self.header.data_start
        end = self.header.file_bytes
        header = bytes(source.view(0, at))
        digest = hashlib.sha256(header.replace(stated.encode(), NO_DIGEST.encode(), 1))
        buffer = memoryview(bytearray(HASHED_BYTES))
        while at < end:
            piece = buffer[: end - at]
            source.read_into(piece, at)
            digest.update(piece)
            at += len(piece)
        if (found := digest.hexdigest()) != stated:
            fault = f"expected SHA-256 {stated[:16]}… by its metadata, found {found[:16]}…"
            raise FormatError(f"{self.path}: is damaged: {fault}; copy it again, or {again}")

    def sample(self) -> str:
        """Compute the SHA-256 (hex) of the header and the middle `SAMPLE_BYTES` of every tensor.

        Two models of one architecture have equal headers; the samples distinguish them without reading everything. This is not a
        checksum: a change outside the samples goes unnoticed.
        """
        digest = hashlib.sha256(self.header.digest.encode())
        tensors = self.header.tensors
        for i in range(0, len(tensors), SAMPLES_AT_ONCE):
            pieces = []
            for t in tensors[i : i + SAMPLES_AT_ONCE]:
                middle = max(0, (t.nbytes - SAMPLE_BYTES) // 2)
                out = memoryview(bytearray(min(SAMPLE_BYTES, t.nbytes)))
                pieces.append((out, self.header.data_start + t.start + middle))
            self.source.read_pieces(pieces)
            for out, _ in pieces:
                digest.update(out)
        return digest.hexdigest()


def sampled_bytes(files: Iterable[TensorFile]) -> int:
    """Count the bytes that are read to identify files by headers and samples."""
    return sum(
        f.header.data_start + sum(min(SAMPLE_BYTES, t.nbytes) for t in f.header.tensors)
        for f in files
    )


INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_INDEX_BYTES = 200_000_000

PIPELINE_NAME = "model_index.json"
"""File that makes a directory a diffusers pipeline, unless a model lies beside it."""

COMPONENTS = {
    "unet": "diffusion_pytorch_model",
    "transformer": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""Components of a pipeline that adapters change, with the name of their files without its endings."""

_SHARD_NAME = re.compile(r"(?![A-Za-z]:)[^./\\\x00-\x1f][^/\\\x00-\x1f]*\.safetensors")
"""File names that are not hidden and contain no drive, directory or control characters."""


def shard_names(count: int) -> list[str]:
    """Name the files of a model as transformers does: one file, or numbered shards."""
    if count > 1:
        return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    return [SINGLE_NAME]


@dataclass(frozen=True)
class Checkpoint:
    """Open files of a model, the map from tensors to files, and the rest of the index.

    Attributes
    ----------
    path
        The path that the user named: a directory or a single file.
    files
        Open files by name, in the order of first mention in the index; in a pipeline by relative path, component by component.
    weight_map
        Tensor name → file name, in the index's own order (for a single file in offset order). In a pipeline, a name begins with its
        component: ``unet.conv_in.weight``.
    index
        The index as JSON, or None for a single file or a pipeline.
    warnings
        Descriptions of odd but harmless facts, one line each.
    """

    path: Path
    files: dict[str, TensorFile]
    weight_map: dict[str, str]
    index: dict[str, Any] | None
    warnings: tuple[str, ...] = ()

    @property
    def directory(self) -> Path | None:
        """Return the directory whose other files belong to the model; None if the user named a single file."""
        return self.path if self.path.is_dir() else None

    @property
    def data_bytes(self) -> int:
        """Count the bytes of all tensors without headers: the index's ``total_size``."""
        return sum(f.header.data_bytes for f in self.files.values())

    @property
    def remote(self) -> bool:
        """Return whether tensors are read from a URL by ranges."""
        return any(f.remote for f in self.files.values())

    @property
    def to_download(self) -> int:
        """Return the number of bytes that a run would download first, if the model is only inspected now."""
        manifest = read_manifest(self.path if self.path.is_dir() else self.path.parent)
        return 0 if manifest is None else manifest.to_download

    def locate(self, name: str) -> tuple[TensorFile, TensorInfo]:
        """Find a tensor's file and entry."""
        file = self.files[self.weight_map[name]]
        return file, file.header.by_name[name]

    def info(self, name: str) -> TensorInfo:
        """Find a tensor's entry."""
        return self.locate(name)[1]

    def check_unchanged(self) -> None:
        """Raise `InputChangedError` if any file changed since it was opened."""
        for file in self.files.values():
            file.check_unchanged()

    @cached_property
    def identity(self) -> BaseIdentity:
        """Return the identity of the model, independent of its path; see `checkpoint_identity`."""
        return checkpoint_identity(self.files)

    def stamps(self) -> dict[str, Sequence[int]]:
        """Map the path of each file to its stamp."""
        return {str(f.path): list(f.stamp) for f in self.files.values()}


def checkpoint_identity(files: Mapping[str, TensorFile]) -> BaseIdentity:
    """Compute the names, sizes, header digests and sample digests of files, which together identify a model."""
    return {
        "files": [
            {
                "file": name,
                "bytes": f.header.file_bytes,
                "header_sha256": f.header.digest,
                "sample_sha256": f.sample(),
            }
            for name, f in files.items()
        ]
    }


def read_json_object(path: Path, parse: Callable[[bytes], Any] = strict_json) -> dict[str, Any]:
    """Read a JSON object from a file, by default with the strict parser.

    Raises
    ------
    InputError
        If the file is missing, too large, not JSON, or not an object.
    """
    fd, _ = open_regular(path, "a JSON file")
    with storage_errors(path, "read"), open(fd, "rb") as f:
        raw = f.read(MAX_INDEX_BYTES + 1)
    if len(raw) > MAX_INDEX_BYTES:
        raise FormatError(
            f"{path}: over {format_size(MAX_INDEX_BYTES)} of JSON; this is not such a file"
        )
    try:
        tree = parse(raw)
    except (ValueError, RecursionError) as e:
        raise FormatError(f"{path}: bad JSON: {e}; get the file again") from None
    if not isinstance(tree, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(tree).__name__}")
    return tree


def _single(path: Path, file: TensorFile) -> Checkpoint:
    weight_map = {t.name: file.path.name for t in file.header.tensors}
    return Checkpoint(path, {file.path.name: file}, weight_map, None)


def check_shard_name(name: object, where: str | Path) -> str:
    """Check that a weight_map entry is one plain relative ``.safetensors`` name, and return it.

    Raises
    ------
    FormatError
        For anything else, such as ``../x.safetensors``: the names come from a download, and a path out of the directory is an attack.
    """
    if isinstance(name, str) and _SHARD_NAME.fullmatch(name) and len(os.fsencode(name)) <= 255:
        return name
    raise FormatError(
        f"{where}: weight_map names {quoted(name)}: expected a plain .safetensors file name; do not trust this file"
    )


def open_checkpoint(path: str | Path, io: IOMode = "mmap") -> Checkpoint:
    """Open a base model: a directory with ``model.safetensors`` or an index, or one ``.safetensors`` file.

    Every indexed file must exist and hold exactly the tensors that the index lists for it.

    Raises
    ------
    InputError
        If the path is neither; the message says what was found.
    FormatError
        If a header or the index is broken, or they disagree.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InputError(f"{path}: expected a directory or a .safetensors file")
        return _single(path, TensorFile(path, io))
    if not path.is_dir():
        raise absent(path, "base model")
    if (model := _model(path, path / SINGLE_NAME, path / INDEX_NAME, io)) is not None:
        return model
    if is_pipeline(path):
        return _pipeline(path, io)
    raise lacks(
        path,
        SINGLE_NAME,
        "name a directory with that or an index, or the file itself, in the order BASE ADAPTER",
    )


def is_pipeline(path: Path) -> bool:
    """Test whether a directory is a diffusers pipeline."""
    return (path / PIPELINE_NAME).exists() and not any(
        (path / name).exists() for name in (SINGLE_NAME, INDEX_NAME)
    )


def component_files(component: str) -> tuple[str, str]:
    """Return the relative paths of a component's single file and of its index."""
    stem = f"{component}/{COMPONENTS[component]}.safetensors"
    return stem, f"{stem}.index.json"


def _pipeline(path: Path, io: IOMode) -> Checkpoint:
    """Open the components that adapters change and that have safetensors under their usual names."""
    files: dict[str, TensorFile] = {}
    weight_map: dict[str, str] = {}
    warnings: tuple[str, ...] = ()
    for component in COMPONENTS:
        single, index = (path / name for name in component_files(component))
        if (part := _model(path / component, single, index, io, f"{component}.")) is None:
            continue
        files |= {f"{component}/{name}": file for name, file in part.files.items()}
        weight_map |= {tensor: f"{component}/{name}" for tensor, name in part.weight_map.items()}
        warnings += part.warnings
    if not files:
        lacks = f"without safetensors under plain names in any of {', '.join(COMPONENTS)}"
        raise InputError(f"{path}: is a diffusers pipeline {lacks}; save it again")
    return Checkpoint(path, files, weight_map, None, warnings)


def _model(
    path: Path, single: Path, index_path: Path, io: IOMode, prefix: str = ""
) -> Checkpoint | None:
    """Open a model by its single file or its index; None if there is neither."""
    if single.exists():
        if index_path.exists():
            advice = "name the file you mean, or remove one of them"
            raise InputError(f"{path}: holds both {single.name} and {index_path.name}; {advice}")
        return _single(path, TensorFile(single, io, prefix))
    if not index_path.exists():
        return None
    index = read_json_object(index_path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index_path}: expected a weight_map, found none; get the file again")
    weight_map = {prefix + tensor: name for tensor, name in weight_map.items()}
    names = dict.fromkeys(check_shard_name(name, index_path) for name in weight_map.values())
    files = {name: TensorFile(path / name, io, prefix) for name in names}
    holders: dict[str, list[str]] = {}
    for name, file in files.items():
        for t in file.header.tensors:
            holders.setdefault(t.name, []).append(name)
    for tensor in {**weight_map, **holders}:
        if holders.get(tensor) != [weight_map.get(tensor)]:
            there = listed(holders.get(tensor, ["no shard"]))
            expected = weight_map.get(tensor, "no shard")
            what = f"tensor {tensor!r}: expected in {expected}, found in {there}; get index and shards of one version"
            raise FormatError(f"{index_path}: {what}")
    data_bytes = sum(file.header.data_bytes for file in files.values())
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    warnings: tuple[str, ...] = ()
    if stated != data_bytes:
        said = "is absent" if stated is None else f"says {stated}"
        warnings = (
            f"{index_path}: total_size {said}, the shards hold {data_bytes} bytes; the output's will be right",
        )
    return Checkpoint(path, files, weight_map, index, warnings)
