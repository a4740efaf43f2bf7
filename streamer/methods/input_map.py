"""Hold the inputs of a base's modules on general text: the leading eigenvectors of each input's second moments.

Modules with the same inputs, such as q, k and v, share an entry. For one-hot inputs (of an embedding), the frequency of each is held.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from torch import Tensor

from streamer import __version__
from streamer.errors import MismatchError, UsageError
from streamer.json_types import Count, Sha256
from streamer.linalg.null_space import leading
from streamer.methods.input_map_file import MAP, parsed_inputs, save_inputs
from streamer.methods.mapped_input import MappedInput
from streamer.storage.identities import difference
from streamer.units import counted, listed
from streamer.weights.dtypes import as_bytes

VECTORS = 16
"""Default number of vectors kept for each input."""


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

    @property
    def base(self) -> dict[str, Any]:
        """Return what identifies the base and its config."""
        return {**self.facts["base"], **self.facts["configs"]["base"]}

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
        save_inputs(Path(path), self.inputs, self.facts, overwrite)


def load_map(path: str | Path) -> InputMap:
    """Read a map from a file.

    Raises
    ------
    FormatError
        If the file does not hold a map, or if its contents are incomplete or invalid.
    """
    return InputMap(*MAP.read(Path(path), parsed_inputs), Path(path))


def add_maps(maps: Sequence[InputMap], vectors: int | None = None) -> InputMap:
    """Add maps of one base on several texts, weighted by each text's tokens.

    The union of their vectors is truncated to `vectors` again. Along vectors that only another text's map holds, a text's second moment is
    taken to be the mean of its remainder.

    Parameters
    ----------
    vectors
        Number of vectors to keep; by default as many as the largest map.

    Raises
    ------
    MismatchError
        If the maps belong to different bases, or if matrices share inputs in some of the maps only.
    UsageError
        If a text is in two of the maps.
    """
    first, most = maps[0], vectors or max(one.facts["vectors"] for one in maps)
    found: dict[tuple[str, bool], list[MappedInput]] = {}
    for one in maps:
        if one.base != first.base:
            differs = difference(one.base, first.base)
            raise MismatchError(f"{one.name}: is of another base than {first.name} ({differs}); add maps of one")
        for inputs in one.inputs:
            found.setdefault(inputs.key, []).append(inputs)
            if (other := found[inputs.key][0]).names != inputs.names or other.size != inputs.size:
                raise MismatchError(f"{one.name}: the inputs of {inputs.names[0]!r} are of other matrices than in "
                                    f"{first.name}; make both maps with one version")  # fmt: skip
    texts = [text for one in maps for text in one.facts["texts"]]
    if len({text["sha256"] for text in texts}) < len(texts):
        raise UsageError(f"{first.name}: a text is in two of the maps; add maps of different texts")
    base = {key: first.facts[key] for key in ("base", "configs")}
    facts = {"version": __version__, **base, "texts": texts, "vectors": most}
    return InputMap(tuple(_sum(same, most) for same in found.values()), facts)


def _sum(same: Sequence[MappedInput], most: int) -> MappedInput:
    """Add the entries of the same inputs on several texts."""
    first, tokens = same[0], sum(one.tokens for one in same)
    shares, spectra = [one.tokens / tokens for one in same], [one.spectrum for one in same]
    weighted = list(zip(shares, spectra, strict=True))
    made = replace(first, tokens=tokens, trace=sum(s * one.trace for s, one in zip(shares, same, strict=True)))
    if first.vectors is None:
        return replace(made, values=_total(share * spectrum.values for share, spectrum in weighted))
    bases = [spectrum.vectors for spectrum in spectra if spectrum.vectors is not None]
    union, _, _ = torch.linalg.svd(torch.cat(bases, 1), full_matrices=False)
    products = _total(
        share * (spectrum.rest * union + V @ ((spectrum.values - spectrum.rest)[:, None] * (V.T @ union)))
        for (share, spectrum), V in zip(weighted, bases, strict=True)
    )
    values, vectors = leading(union, products)
    return replace(made, values=values[:most], vectors=vectors[:, :most].T.to(torch.bfloat16).contiguous())


def _total(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)
