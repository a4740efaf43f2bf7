"""Write and read safetensors files of arrays and one JSON object, with a digest of the whole file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from streamer.errors import FormatError, InputError
from streamer.storage.atomic_file import plan_shard, write_sealed
from streamer.storage.files import strict_json
from streamer.storage.header import DIGEST, NO_DIGEST
from streamer.storage.output_checks import check_replaced
from streamer.storage.tensor_file import TensorFile
from streamer.units import quoted
from streamer.weights.base import SPELLINGS, TORCH_DTYPES, as_bytes, as_tensor

Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class SealedKind:
    """A kind of file.

    Attributes
    ----------
    key
        Metadata key of the JSON object.
    schema
        Value of its key ``schema``; its number rises with the format.
    what, again
        Words for messages: what such a file holds, and how to make it.
    """

    key: str
    schema: str
    what: str
    again: str

    def is_at(self, path: Path) -> bool:
        """Test whether a file's header says that it is of this kind, in any version."""
        try:
            return self.key in TensorFile(path).header.metadata
        except (InputError, OSError):
            return False

    def save(self, path: Path, tree: Mapping[str, Any], arrays: Mapping[str, Tensor], overwrite: bool) -> None:
        """Write a file atomically: it appears complete or not at all; make missing directories.

        Parameters
        ----------
        overwrite
            Whether to replace a file of this kind. Other files are never replaced, except empty ones.

        Raises
        ------
        OutputError
            If the path holds something that is not replaced, or cannot be a file.
        StorageError
            If the system refuses to write.
        """
        check_replaced(path, overwrite, self.is_at, self.what)
        text = json.dumps({**tree, "schema": self.schema}, sort_keys=True, ensure_ascii=False, allow_nan=False)
        entries = [(name, SPELLINGS[array.dtype], array.shape) for name, array in arrays.items()]
        shard = plan_shard(path.name, entries, {"format": "pt", self.key: text, DIGEST: NO_DIGEST})
        write_sealed(path.parent, shard, lambda info: [as_bytes(arrays[info.name])])

    def read(self, path: Path, parse: Callable[[dict[str, Any], dict[str, Tensor]], Parsed]) -> Parsed:
        """Read a file and parse its JSON object and its arrays.

        Parameters
        ----------
        parse
            Makes the result; a `KeyError`, `TypeError` or `ValueError` from it means that the file does not follow the schema.

        Raises
        ------
        FormatError
            If the file is of another kind or version, is damaged, or does not follow the schema.
        """
        if path.is_dir():
            raise FormatError(f"{path}: expected {self.what}, found a directory; name the file in it")
        file = TensorFile(path)
        metadata = file.header.metadata
        if self.key not in metadata:
            other = "findings" if "findings" in metadata else "another safetensors file"
            raise FormatError(f"{path}: expected {self.what} ({self.schema}), found {other}; {self.again}")
        try:
            tree = strict_json(metadata[self.key].encode())
            if tree["schema"] != self.schema:
                raise FormatError(
                    f"{path}: is of another version: expected {self.schema}, found {quoted(tree['schema'])}; {self.again}"
                )
            file.check_digest(self.again)
            arrays = {t.name: as_tensor(file.view(t), TORCH_DTYPES[t.dtype], t.shape) for t in file.header.tensors}
            return parse(tree, arrays)
        except FormatError:
            raise
        except (KeyError, TypeError, ValueError) as e:
            says = f"lacks {e}" if isinstance(e, KeyError) else str(e)
            raise FormatError(f"{path}: is not as {self.schema} has it ({says}); {self.again}") from e
