"""Open a base model on disk: one safetensors file, shards with an index, or a diffusers pipeline with such files in each component."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from streamer.errors import FormatError, InputError, MissingInputError, UnsupportedError
from streamer.storage.files import BaseIdentity, absent, open_regular, storage_errors, strict_json
from streamer.storage.header import TensorInfo
from streamer.storage.remote_source import read_manifest
from streamer.storage.tensor_file import IOMode, TensorFile
from streamer.units import format_size, quoted

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

_PLAIN = re.compile(r"(?![A-Za-z]:)[^./\\\x00-\x1f][^/\\\x00-\x1f]*\.safetensors")
"""File names that are not hidden and contain no drive, directory or control characters."""


def shard_names(count: int) -> list[str]:
    """Name the files of a model as transformers does: one file, or numbered shards."""
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)] if count > 1 else [SINGLE_NAME]


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
    def metadata(self) -> Mapping[str, str]:
        """Return the metadata of the first file."""
        return next((file.header.metadata for file in self.files.values()), {})

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

    def identity(self) -> BaseIdentity:
        """Return the identity of the model, independent of its path and computed once; see `checkpoint_identity`."""
        return self._identity

    @cached_property
    def _identity(self) -> BaseIdentity:
        return checkpoint_identity(self.files)

    def stamps(self) -> dict[str, Sequence[int]]:
        """Map the path of each file to its stamp."""
        return {str(f.path): list(f.stamp) for f in self.files.values()}


def checkpoint_identity(files: Mapping[str, TensorFile]) -> BaseIdentity:
    """Compute the names, sizes, header digests and sample digests of files, which together identify a model."""
    return {
        "files": [
            {"file": name, "bytes": f.header.file_bytes, "header_sha256": f.header.digest, "sample_sha256": f.sample()}
            for name, f in files.items()
        ]
    }


def read_json_object(path: Path, limit: int = MAX_INDEX_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file with the strict parser.

    Raises
    ------
    InputError
        If the file is missing, too large, not JSON, or not an object.
    """
    fd, _ = open_regular(path, "a JSON file")
    with storage_errors(path, "read"), open(fd, "rb") as f:
        raw = f.read(limit + 1)
    if len(raw) > limit:
        raise FormatError(f"{path}: over {format_size(limit)} of JSON; this is not such a file")
    try:
        tree = strict_json(raw)
    except ValueError as e:
        raise FormatError(f"{path}: bad JSON: {e}; get the file again") from None
    if not isinstance(tree, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(tree).__name__}")
    return tree


def check_shard_name(name: object, where: str | Path) -> str:
    """Check that a weight_map entry is one plain relative ``.safetensors`` name, and return it.

    Raises
    ------
    FormatError
        For anything else, such as ``../x.safetensors``: the names come from a download, and a path out of the directory is an attack.
    """
    if isinstance(name, str) and _PLAIN.fullmatch(name) and len(os.fsencode(name)) <= 255:
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
    index_path, single_path = path / INDEX_NAME, path / SINGLE_NAME
    if index_path.exists() and single_path.exists():
        raise InputError(
            f"{path}: holds both {SINGLE_NAME} and {INDEX_NAME}; name the file you mean, or remove one of them"
        )
    if single_path.exists():
        return _single(path, TensorFile(single_path, io))
    if index_path.exists():
        return _sharded(path, index_path, io)
    if is_pipeline(path):
        return _pipeline(path, io)
    raise _nothing_here(path)


def is_pipeline(path: Path) -> bool:
    """Test whether a directory is a diffusers pipeline."""
    return (path / PIPELINE_NAME).exists() and not any((path / name).exists() for name in (SINGLE_NAME, INDEX_NAME))


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
        if single.exists() and index.exists():
            raise InputError(f"{path / component}: holds both {single.name} and {index.name}; remove one of them")
        if single.exists():
            part = _single(path / component, TensorFile(single, io, f"{component}."))
        elif index.exists():
            part = _sharded(path / component, index, io, f"{component}.")
        else:
            continue
        files |= {f"{component}/{name}": file for name, file in part.files.items()}
        weight_map |= {tensor: f"{component}/{name}" for tensor, name in part.weight_map.items()}
        warnings += part.warnings
    if not files:
        raise InputError(
            f"{path}: is a diffusers pipeline without safetensors in any of {', '.join(COMPONENTS)} (a variant such as fp16 counts only "
            "under the plain name); save it again with save_pretrained"
        )
    return Checkpoint(path, files, weight_map, None, warnings)


def _single(path: Path, file: TensorFile) -> Checkpoint:
    weight_map = {t.name: file.path.name for t in file.header.tensors}
    return Checkpoint(path, {file.path.name: file}, weight_map, None)


def _sharded(path: Path, index_path: Path, io: IOMode, prefix: str = "") -> Checkpoint:
    index = read_json_object(index_path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index_path}: expected a weight_map, found none; get the file again")
    weight_map = {prefix + tensor: name for tensor, name in weight_map.items()}
    names = dict.fromkeys(check_shard_name(name, index_path) for name in weight_map.values())
    files = {name: TensorFile(path / name, io, prefix) for name in names}
    owner: dict[str, str] = {}
    for name, file in files.items():
        for t in file.header.tensors:
            if t.name in owner:
                raise FormatError(f"{file.path}: tensor {t.name!r} is in {owner[t.name]} as well; get the shards again")
            owner[t.name] = name
    for tensor, name in weight_map.items():
        if owner.get(tensor) != name:
            found = f"it is in {owner[tensor]}" if tensor in owner else "no shard has it"
            raise FormatError(f"{index_path}: tensor {tensor!r}: expected in {name}, but {found}; get the shards again")
    unlisted = [t for t in owner if t not in weight_map]
    if unlisted:
        raise FormatError(
            f"{index_path}: {len(unlisted)} tensors are in the shards but not in the index, "
            f"{unlisted[0]!r} first; get index and shards of one version"
        )
    data_bytes = sum(file.header.data_bytes for file in files.values())
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    warnings: tuple[str, ...] = ()
    if stated != data_bytes:
        said = "is absent" if stated is None else f"says {stated}"
        warnings = (f"{index_path}: total_size {said}, the shards hold {data_bytes} bytes; the output's will be right",)
    return Checkpoint(path, files, weight_map, index, warnings)


def _nothing_here(path: Path) -> InputError:
    if (path / "snapshots").is_dir():
        return InputError(f"{path}: is a hub cache entry, not a model; name a directory inside {path / 'snapshots'}")
    if any(path.glob("*.bin")) or any(path.glob("*.pth")):
        return UnsupportedError(f"{path}: holds weights as pickles only; convert them to safetensors first")
    if (path / "adapter_model.safetensors").exists():
        return InputError(f"{path}: is an adapter, not a base model; the order is BASE ADAPTER")
    others = sorted(p.name for p in path.glob("*.safetensors"))
    if others:
        return InputError(
            f"{path}: has no {SINGLE_NAME} and no {INDEX_NAME}, but {others[0]}; name the file itself if it is the model"
        )
    return MissingInputError(
        f"{path}: expected {SINGLE_NAME} or {INDEX_NAME}, found neither; check the path of the base model",
        path / SINGLE_NAME,
    )
