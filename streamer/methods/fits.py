"""Hold new right factors of an adapter's deltas, fitted to the inputs of its modules, and the file of a fit.

``Δ = L Rᵀ`` with L (m, r) and R (n, r) becomes ``Δ' = L R'ᵀ``: in a LoRA adapter, ``lora_A`` changes and ``lora_B`` stays.

The file is a safetensors file. For each `Target.tensor` ``T`` and K sets, it holds ``T.right_factor`` (K, n, r), float32. The metadata's
``streamer.coefficients`` is JSON: the schema, the shares that the sets keep, and the facts. See `SealedKind`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from torch import Tensor

from streamer.detection.findings_file import COEFFICIENTS
from streamer.errors import MismatchError, UsageError
from streamer.json_types import Sha256
from streamer.linalg.operators import Delta, LowRank
from streamer.methods import share_name
from streamer.storage.files import check_identities
from streamer.units import counted, listed
from streamer.weights.sealed_file import SealedKind

FIT = SealedKind(COEFFICIENTS, "streamer.coefficients/3", "coefficients", "make coefficients with `streamer fit`")

FACTOR = ".right_factor"
"""Suffix of the arrays' names."""


class CoefficientsRecord(TypedDict):
    """The set of a fit that a method uses."""

    keep: Annotated[float, "Share of the learning that the set was fitted to keep."]
    sha256: Annotated[Sha256, "Digest of the values of all matrices (SHA-256, hexadecimal)."]


@dataclass(frozen=True, eq=False, repr=False)
class FactorSet:
    """New right factors of all matrices for one share of the learning.

    Attributes
    ----------
    keep
        Share of the learning that the factors were fitted to keep.
    matrices
        R' (n, r) of each matrix, float32, by `Target.tensor`.
    facts
        Inputs and options of the fit; see `Coefficients`, whose `select` sets them.
    name
        Name for messages.
    """

    keep: float
    matrices: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)
    name: str = "coefficients"

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
        """Compute ``Δ' = L R'ᵀ``."""
        factor = self.matrices[tensor]
        if not isinstance(delta, LowRank) or factor.shape != delta.R.shape:
            raise MismatchError(
                f"{self.name}: the factor of {tensor!r} does not have this adapter's shape; fit it to this adapter"
            )
        return LowRank(delta.L.double(), factor.double())

    def record(self) -> CoefficientsRecord:
        """Identify this set, for the record of an output."""
        return {"keep": self.keep, "sha256": self.digest}

    def __repr__(self) -> str:
        return f"<FactorSet: keep {share_name(self.keep)}, factors of {counted(len(self.matrices), 'matrix')}>"


@dataclass(frozen=True, eq=False, repr=False)
class Coefficients:
    """Sets of factors, one for each share of the learning to keep, and the facts of their fit.

    Attributes
    ----------
    sets
        At least one set. Sets have different shares and the same matrices.
    facts
        JSON values: the identities of ``base`` and ``adapter``, which tie the coefficients to these inputs; options, digests of texts,
        figures. No paths.
    source
        File from which they were read, for messages.
    """

    sets: tuple[FactorSet, ...]
    facts: Mapping[str, Any]
    source: Path | None = None

    @property
    def name(self) -> str:
        """Return the name for messages: the file, or "coefficients"."""
        return "coefficients" if self.source is None else str(self.source)

    def __repr__(self) -> str:
        source = f" from {self.source}" if self.source else ""
        return "\n ".join([f"<Coefficients: {counted(len(self.sets), 'set')}{source}", *map(repr, self.sets)]) + ">"

    @property
    def keeps(self) -> list[float]:
        """List the shares to keep, in the order of the sets."""
        return [one.keep for one in self.sets]

    def select(self, keep: float | None = None) -> FactorSet:
        """Select the set for a share, or the only set. Shares are compared as `share_name` writes them.

        Raises
        ------
        UsageError
            If no set has that share, or if there are several sets and no share is given.
        """
        shares = listed(map(share_name, self.keeps))
        found = [one for one in self.sets if keep is None or share_name(one.keep) == share_name(keep)]
        if len(found) > 1:
            raise UsageError(
                f"keep: expected one of {shares}, the {len(found)} sets of coefficients in {self.name}; choose one"
            )
        if not found:
            raise UsageError(f"{self.name}: holds no coefficients that keep {keep:g}; the shares in it are {shares}")
        return replace(found[0], facts=self.facts, name=self.name)

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
        for one in self.sets:
            one.check()
        arrays = {
            tensor + FACTOR: torch.stack([one.matrices[tensor] for one in self.sets]).float()
            for tensor in self.sets[0].matrices
        }
        FIT.save(Path(path), {**self.facts, "keeps": self.keeps}, arrays, overwrite)


def load_coefficients(path: str | Path) -> Coefficients:
    """Read the result of a fit from its file.

    Raises
    ------
    FormatError
        If the file does not hold factors, is damaged or of an earlier version, or if an array is not finite.
    """
    return Coefficients(*FIT.read(Path(path), _parsed), Path(path))


def _parsed(tree: dict[str, Any], arrays: dict[str, Tensor]) -> tuple[tuple[FactorSet, ...], dict[str, Any]]:
    keeps = tree["keeps"]
    shares = isinstance(keeps, list) and all(type(keep) in (int, float) and 0 < keep <= 1 for keep in keeps)
    if not (shares and keeps and len(set(map(share_name, keeps))) == len(keeps)):
        raise ValueError("keeps are not different shares in (0, 1]")
    for name, array in arrays.items():
        if not name.endswith(FACTOR) or array.dtype != torch.float32 or array.ndim != 3 or len(array) != len(keeps):
            raise ValueError(f"{name!r} does not hold {len(keeps)} factors in float32")
        if not bool(array.isfinite().all()):
            raise ValueError(f"{name!r} has a value that is NaN or Inf")
    if not arrays:
        raise ValueError("it has no factors")
    check_identities(*(tree[key] for key in ("base", "adapter") if isinstance(tree.get(key), dict)))
    own = {name.removesuffix(FACTOR): array.clone() for name, array in arrays.items()}
    sets = (FactorSet(float(keep), {tensor: f[k] for tensor, f in own.items()}) for k, keep in enumerate(keeps))
    return tuple(sets), {key: value for key, value in tree.items() if key not in ("schema", "keeps")}
