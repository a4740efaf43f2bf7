"""Hold new right factors of an adapter's deltas, fitted to the inputs of its modules.

``Δ = L Rᵀ`` with L (m, r) and R (n, r) becomes ``Δ' = L R'ᵀ``: in a LoRA adapter, ``lora_A`` changes and ``lora_B`` stays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from streamer.errors import MismatchError, UsageError
from streamer.json_types import Sha256
from streamer.units import counted

if TYPE_CHECKING:
    from torch import Tensor

    from streamer.linalg.operators import Delta
    from streamer.plan.targets import Target


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

    def fits(self, target: Target) -> bool:
        """Test whether there is a factor for a matrix, with its number of inputs and its rank."""
        factor, module = self.matrices.get(target.tensor), target.module
        return factor is not None and module.low_rank and factor.shape == (module.shape[1], module.factor_rank)

    def mitigated(self, delta: Delta, tensor: str) -> Delta:
        """Compute ``Δ' = L R'ᵀ``."""
        from streamer.linalg.low_rank import LowRank

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


def share_name(keep: float) -> str:
    """Write a share of the learning with six digits, as in tables, variants and commands; it is unique among the sets of a file.

    >>> share_name(0.9), share_name(1 / 3)
    ('0.9', '0.333333')
    """
    return f"{keep:g}"
