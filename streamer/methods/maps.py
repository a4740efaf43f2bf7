"""Hold the inputs of a base's modules on general text: the leading eigenvectors of each input's second moments; and their file.

Modules with the same inputs, such as q, k and v, share an entry. For one-hot inputs (of an embedding), the frequency of each is held.

The file is a safetensors file. For each input, named after its first matrix ``T``, it holds ``T.vectors`` (k, n), bfloat16, and
``T.eigenvalues`` (k,), float64, or, for one-hot inputs, ``T.frequencies`` (n,), float64. The metadata's ``streamer.map`` is JSON: the
schema, the names, tokens and traces of all inputs, and the facts. See `SealedKind`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from torch import Tensor

from streamer.json_types import Count, Sha256
from streamer.linalg.moments import Spectrum
from streamer.storage.files import check_identities
from streamer.units import counted, listed
from streamer.weights.base import as_bytes
from streamer.weights.sealed_file import SealedKind

VECTORS = 16
"""Default number of vectors kept for each input."""

MAP = SealedKind("streamer.map", "streamer.map/2", "a map", "make a map with `streamer map`")

SKEW = 0.05
"""Largest product of two different vectors, and largest difference of a squared length from 1; rounding to bfloat16 causes less than a
tenth of this."""


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
    def key(self) -> tuple[str, bool]:
        """Return a unique key; a tied matrix has two entries, one as the embedding and one as the head."""
        return self.names[0], self.vectors is None

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
        matrices = counted(sum(len(one.names) for one in self.inputs), "matrix")
        inputs = counted(len(self.inputs), "input")
        texts = listed(text["name"] for text in self.facts["texts"])
        return f"<InputMap: {counted(self.facts['vectors'], 'vector')} of {inputs} of {matrices}, on {texts}>"

    @cached_property
    def digest(self) -> str:
        """Hash (SHA-256, hex) all arrays, their names, and the figures beside them."""
        digest = hashlib.sha256()
        for one in sorted(self.inputs, key=lambda one: one.key):
            digest.update(f"{one.names} {one.tokens} {one.size} {one.trace!r}\n".encode())
            for array in (one.values, one.vectors):
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
        found = [one for one in self._by_name.get(tensor, ()) if one.size == size]
        return found[0] if len(found) == 1 else None

    @cached_property
    def _by_name(self) -> dict[str, list[MappedInput]]:
        out: dict[str, list[MappedInput]] = {}
        for one in self.inputs:
            for name in one.names:
                out.setdefault(name, []).append(one)
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
        for one in self.inputs:
            name = one.names[0]
            if one.vectors is None:
                arrays[f"{name}.frequencies"] = one.values
            else:
                arrays |= {f"{name}.vectors": one.vectors, f"{name}.eigenvalues": one.values}
        inputs = [
            {"names": list(one.names), "tokens": one.tokens, "trace": one.trace, "one_hot": one.vectors is None}
            for one in self.inputs
        ]
        MAP.save(Path(path), {**self.facts, "inputs": inputs}, arrays, overwrite)


def load_map(path: str | Path) -> InputMap:
    """Read a map from a file.

    Raises
    ------
    FormatError
        If the file does not hold a map, or if its contents are incomplete or invalid.
    """
    return InputMap(*MAP.read(Path(path), _parsed), Path(path))


def _parsed(tree: dict[str, Any], arrays: dict[str, Tensor]) -> tuple[tuple[MappedInput, ...], dict[str, Any]]:
    """Parse what a file holds as inputs and facts; raise `ValueError` if they are not whole."""
    inputs = tuple(_input(one, arrays) for one in tree["inputs"])
    if arrays or not inputs:
        raise ValueError("its arrays do not match its inputs")
    facts = {key: value for key, value in tree.items() if key not in ("schema", "inputs")}
    texts, vectors = facts["texts"], facts["vectors"]
    check_identities(facts["base"])
    if not isinstance(facts["configs"]["base"], dict):
        raise ValueError("the base's config is of another type")
    if not (isinstance(texts, list) and type(vectors) is int and vectors >= 1):
        raise ValueError("texts or vectors are of another type")
    if not all(isinstance(text[key], str) for text in texts for key in ("name", "sha256")):
        raise ValueError("a text has no name or no digest")
    return inputs, facts


def _input(tree: dict[str, Any], arrays: dict[str, Tensor]) -> MappedInput:
    names, trace, tokens = tuple(tree["names"]), tree["trace"], tree["tokens"]
    if not (names and all(isinstance(name, str) for name in names)):
        raise ValueError("the names of an input are not strings")
    first = names[0]
    if not (math.isfinite(trace) and trace >= 0 and type(tokens) is int and tokens > 0):
        raise ValueError(f"{first!r} has an invalid trace or number of tokens")
    values = arrays.pop(f"{first}.{'frequencies' if tree['one_hot'] else 'eigenvalues'}")
    if values.dtype != torch.float64 or values.ndim != 1 or not bool((values.isfinite() & (values >= 0)).all()):
        raise ValueError(f"{first!r} has invalid eigenvalues")
    if tree["one_hot"]:
        return MappedInput(names, tokens, len(values), float(trace), values, None)
    vectors = arrays.pop(f"{first}.vectors")
    if vectors.dtype != torch.bfloat16 or vectors.ndim != 2 or not 0 < len(values) == len(vectors) <= vectors.shape[1]:
        raise ValueError(f"{first!r} has vectors of another dtype or shape")
    gram = vectors.float() @ vectors.float().T
    if not bool(((gram - torch.eye(len(vectors))).abs() <= SKEW).all()):
        raise ValueError(f"the vectors of {first!r} are not orthonormal")
    return MappedInput(names, tokens, vectors.shape[1], float(trace), values, vectors)
