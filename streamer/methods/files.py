"""Hold the files of fits and maps: safetensors files of arrays and one JSON object, with a digest of the whole file.

A fit holds new right factors of an adapter's deltas, fitted to the inputs of its modules. ``Δ = L Rᵀ`` with L (m, r) and R (n, r) becomes
``Δ' = L R'ᵀ``: in a LoRA adapter, ``lora_A`` changes and ``lora_B`` stays. For each `Target.tensor` ``T``, the file holds
``T.right_factor`` (1, n, r), float32. The metadata's ``streamer.coefficients`` is JSON: the schema, the share that the factors keep, in a
list, and the facts.

A map holds the inputs of a base's modules on general text: the leading eigenvectors of each input's second moments. Modules with the same
inputs, such as q, k and v, share an entry. For one-hot inputs (of an embedding), the frequency of each is held. For each input, named after
its first matrix ``T``, the file holds ``T.vectors`` (k, n), bfloat16, and ``T.eigenvalues`` (k,), float64, or, for one-hot inputs,
``T.frequencies`` (n,), float64. The metadata's ``streamer.map`` is JSON: the schema, the names, tokens and traces of all inputs, and the
facts.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from torch import Tensor

from streamer.detection.findings import COEFFICIENTS
from streamer.errors import FormatError, InputError, MismatchError, UsageError
from streamer.json_types import Count, Sha256
from streamer.linalg.moments import Spectrum
from streamer.linalg.operators import Delta, LowRank
from streamer.methods import share_name
from streamer.storage.atomic_file import plan_shard, write_sealed
from streamer.storage.checkpoint import TensorFile
from streamer.storage.files import strict_json
from streamer.storage.header import DIGEST, NO_DIGEST
from streamer.storage.transaction import check_replaced
from streamer.units import counted, listed, quoted
from streamer.weights.base import SPELLINGS, TORCH_DTYPES, as_bytes, as_tensor


@dataclass(frozen=True)
class SealedKind:
    """A kind of file.

    Attributes
    ----------
    key
        Metadata key of the JSON object.
    schema
        Value of its key ``schema``; its number rises with the format.
    what, remedy
        Words for messages: what such a file holds, and how to make one.
    """

    key: str
    schema: str
    what: str
    remedy: str

    def is_at(self, path: Path) -> bool:
        """Test whether a file's header says that it is of this kind, in any version."""
        try:
            return self.key in TensorFile(path).header.metadata
        except (InputError, OSError):
            return False

    def save(
        self, path: Path, tree: Mapping[str, Any], arrays: Mapping[str, Tensor], overwrite: bool
    ) -> None:
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
        text = json.dumps(
            {**tree, "schema": self.schema}, sort_keys=True, ensure_ascii=False, allow_nan=False
        )
        entries = [(name, SPELLINGS[array.dtype], array.shape) for name, array in arrays.items()]
        shard = plan_shard(path.name, entries, {"format": "pt", self.key: text, DIGEST: NO_DIGEST})
        write_sealed(path.parent, shard, lambda info: [as_bytes(arrays[info.name])])

    def read(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Read a file: its JSON object without the schema, and its arrays.

        Raises
        ------
        FormatError
            If the file is of another kind or version, or is damaged; its digest shows that.
        """
        if path.is_dir():
            raise FormatError(
                f"{path}: expected {self.what}, found a directory; name the file in it"
            )
        file = TensorFile(path)
        metadata = file.header.metadata
        if self.key not in metadata:
            other = "findings" if "findings" in metadata else "another safetensors file"
            raise FormatError(
                f"{path}: expected {self.what} ({self.schema}), found {other}; {self.remedy}"
            )
        file.check_digest(self.remedy)
        tree = strict_json(metadata[self.key].encode())
        if (schema := tree.pop("schema")) != self.schema:
            raise FormatError(
                f"{path}: is of another version: expected {self.schema}, found {quoted(schema)}; {self.remedy}"
            )
        return tree, {
            t.name: as_tensor(file.view(t), TORCH_DTYPES[t.dtype], t.shape)
            for t in file.header.tensors
        }


FIT = SealedKind(
    COEFFICIENTS,
    "streamer.coefficients/3",
    "coefficients",
    "make coefficients with `streamer repair`",
)

FACTOR_SUFFIX = ".right_factor"
"""Suffix of the arrays' names."""


class CoefficientsRecord(TypedDict):
    """The fit that a method uses."""

    keep: Annotated[float, "Share of the learning that it was fitted to keep."]
    sha256: Annotated[Sha256, "Digest of the values of all matrices (SHA-256, hexadecimal)."]


@dataclass(frozen=True, eq=False, repr=False)
class Coefficients:
    """New right factors of all matrices for one share of the learning, and the facts of their fit.

    Attributes
    ----------
    keep
        Share of the learning that the factors were fitted to keep.
    matrices
        R' (n, r) of each matrix, float32, by `Target.tensor`.
    facts
        JSON values: the identities of ``base`` and ``adapter``, which tie the coefficients to these inputs; options, digests of texts,
        figures. No paths.
    source
        File from which they were read, for messages.
    """

    keep: float
    matrices: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)
    source: Path | None = None

    @property
    def name(self) -> str:
        """Return the name for messages: the file, or "coefficients"."""
        return "coefficients" if self.source is None else str(self.source)

    def __repr__(self) -> str:
        source = f" from {self.source}" if self.source else ""
        return f"<Coefficients: keep {share_name(self.keep)}, factors of {counted(len(self.matrices), 'matrix')}{source}>"

    @cached_property
    def digest(self) -> str:
        """Hash all values (SHA-256, hex), which determine the mitigated delta to the last bit."""
        digest = hashlib.sha256()
        for tensor in sorted(self.matrices):
            digest.update(f"{tensor}\n".encode())
            digest.update(self.matrices[tensor].contiguous().numpy().astype("<f4").tobytes())
        return digest.hexdigest()

    def check(self) -> None:
        """Refuse factors that are not matrices of finite numbers."""
        for tensor, factor in self.matrices.items():
            if factor.ndim != 2 or not bool(factor.isfinite().all()):
                raise UsageError(
                    f"{self.name}: the factor of {tensor!r} is not a matrix of finite numbers; use the factors of a fit"
                )

    def mitigated(self, delta: Delta, tensor: str) -> Delta:
        """Compute ``Δ' = L R'ᵀ``.

        Parameters
        ----------
        delta
            The adapter's delta, with factors L (m, r) and R (n, r).
        tensor
            Name of its matrix in the base.
        """
        factor = self.matrices[tensor]
        if not isinstance(delta, LowRank) or factor.shape != delta.R.shape:
            raise MismatchError(
                f"{self.name}: the factor of {tensor!r} does not have this adapter's shape; fit it to this adapter"
            )
        return LowRank(delta.L.double(), factor.double())

    def record(self) -> CoefficientsRecord:
        """Identify these coefficients, for the record of an output."""
        return {"keep": self.keep, "sha256": self.digest}

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the coefficients to a safetensors file; make missing directories.

        Parameters
        ----------
        path
            Path of the file, which appears complete or not at all.
        overwrite
            Whether to replace a file of coefficients. Other files are never replaced, except empty ones.

        Raises
        ------
        OutputExistsError
            If the path holds something that is not replaced; it is a `FileExistsError`.
        OutputError, StorageError
            If the file cannot be written there.
        """
        self.check()
        arrays = {
            name + FACTOR_SUFFIX: factor.float()[None] for name, factor in self.matrices.items()
        }
        FIT.save(Path(path), {**self.facts, "keeps": [self.keep]}, arrays, overwrite)


def load_coefficients(path: str | Path) -> Coefficients:
    """Read the result of a fit from its file.

    Raises
    ------
    FormatError
        If the file does not hold factors for one share, is damaged or of an earlier version.
    """
    tree, arrays = FIT.read(Path(path))
    if len(shares := tree.pop("keeps")) != 1:
        raise FormatError(
            f"{path}: expected factors for one share of the learning, found {len(shares)}; {FIT.remedy}"
        )
    matrices = {
        name.removesuffix(FACTOR_SUFFIX): array[0].clone() for name, array in arrays.items()
    }
    return Coefficients(float(shares[0]), matrices, tree, Path(path))


MAP = SealedKind("streamer.map", "streamer.map/2", "a map", "make a map with `streamer map`")


@dataclass(frozen=True, eq=False)
class MappedInput:
    """Inputs x (n,) of one or more matrices of the base.

    Attributes
    ----------
    names
        Names of these matrices, as in `Target.tensor`; the entry is named after the first.
    tokens
        Number of tokens over which C is a mean: all tokens of the text, even if only some of them reach an expert.
    size
        n.
    trace
        Trace of ``C = Σ x xᵀ / tokens``.
    values
        Leading eigenvalues of C (k,), descending; for one-hot inputs the frequencies (n,). Float64.
    vectors
        Eigenvectors (k, n), bfloat16; None for one-hot inputs.
    """

    names: tuple[str, ...]
    tokens: int
    size: int
    trace: float
    values: Tensor
    vectors: Tensor | None

    @property
    def spectrum(self) -> Spectrum:
        """Return what is known of C, with the rounded vectors made orthonormal again."""
        if self.vectors is None:
            return Spectrum(self.values)
        others = self.size - len(self.values)
        rest = max(0.0, self.trace - float(self.values.sum())) / others if others else 0.0
        return Spectrum(self.values, rest, torch.linalg.qr(self.vectors.double().T)[0])


class MapRecord(TypedDict):
    """The map of a base's inputs that was used."""

    vectors: Annotated[Count, "Largest number of leading vectors that it keeps for an input."]
    sha256: Annotated[Sha256, "Digest of its arrays (SHA-256, hexadecimal)."]


@dataclass(frozen=True, eq=False, repr=False)
class InputMap:
    """A map of a base's inputs.

    Attributes
    ----------
    inputs
        Entries, in any order.
    facts
        JSON values: ``base``, its identity, and ``configs``, its config; ``texts``, from which the map was made; ``vectors``, the most kept
        for an input. No paths.
    source
        File from which it was read, for messages.
    """

    inputs: tuple[MappedInput, ...]
    facts: Mapping[str, Any]
    source: Path | None = None

    @property
    def name(self) -> str:
        """Return the name for messages: the file, or "map"."""
        return "map" if self.source is None else str(self.source)

    def __repr__(self) -> str:
        matrices = counted(sum(len(entry.names) for entry in self.inputs), "matrix")
        inputs = counted(len(self.inputs), "input")
        texts = listed(text["name"] for text in self.facts["texts"])
        return f"<InputMap: {counted(self.facts['vectors'], 'vector')} of {inputs} of {matrices}, on {texts}>"

    @cached_property
    def digest(self) -> str:
        """Hash (SHA-256, hex) all arrays, their names, and the figures beside them."""
        digest = hashlib.sha256()
        # A tied matrix has two entries, one as the embedding and one as the head.
        for entry in sorted(self.inputs, key=lambda entry: (entry.names[0], entry.vectors is None)):
            digest.update(f"{entry.names} {entry.tokens} {entry.size} {entry.trace!r}\n".encode())
            for array in (entry.values, entry.vectors):
                digest.update(b"" if array is None else as_bytes(array))
        return digest.hexdigest()

    def record(self) -> MapRecord:
        """Identify this map, for the record of an output."""
        return {"vectors": self.facts["vectors"], "sha256": self.digest}

    def find(self, tensor: str, size: int) -> MappedInput | None:
        """Find the inputs of a matrix; None if there are none, or if two entries match.

        Parameters
        ----------
        tensor
            Name of the matrix's tensor in the base, as in findings.
        size
            Length of an input: the number of columns of the matrix's delta.
        """
        fitting = [entry for entry in self._by_name.get(tensor, ()) if entry.size == size]
        return fitting[0] if len(fitting) == 1 else None

    @cached_property
    def _by_name(self) -> dict[str, list[MappedInput]]:
        out = defaultdict[str, list[MappedInput]](list)
        for entry in self.inputs:
            for name in entry.names:
                out[name].append(entry)
        return out

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the map to a safetensors file; make missing directories.

        Parameters
        ----------
        path
            Path of the file, which appears complete or not at all.
        overwrite
            Whether to replace a map. Other files are never replaced, except empty ones.

        Raises
        ------
        OutputExistsError
            If the path holds something that is not replaced; it is a `FileExistsError`.
        OutputError, StorageError
            If the file cannot be written there.
        """
        arrays: dict[str, Tensor] = {}
        inputs = []
        for entry in self.inputs:
            name, *_ = entry.names
            is_one_hot = entry.vectors is None
            if entry.vectors is not None:
                arrays[f"{name}.vectors"] = entry.vectors
            arrays[f"{name}.{'frequencies' if is_one_hot else 'eigenvalues'}"] = entry.values
            inputs.append(
                {
                    "names": list(entry.names),
                    "tokens": entry.tokens,
                    "trace": entry.trace,
                    "one_hot": is_one_hot,
                }
            )
        MAP.save(Path(path), {**self.facts, "inputs": inputs}, arrays, overwrite)


def load_map(path: str | Path) -> InputMap:
    """Read a map from a file.

    Raises
    ------
    FormatError
        If the file does not hold a map, or if its contents are incomplete or invalid.
    """
    tree, arrays = MAP.read(Path(path))
    inputs = tuple(_input(entry, arrays) for entry in tree.pop("inputs"))
    return InputMap(inputs, tree, Path(path))


def _input(entry: dict[str, Any], arrays: dict[str, Tensor]) -> MappedInput:
    name, *_ = names = tuple(entry["names"])
    vectors = None
    if entry["one_hot"]:
        values = arrays[f"{name}.frequencies"]
        (size,) = values.shape
    else:
        values = arrays[f"{name}.eigenvalues"]
        vectors = arrays[f"{name}.vectors"]
        _, size = vectors.shape
    return MappedInput(names, entry["tokens"], size, entry["trace"], values, vectors)
