"""Hold new right factors of an adapter's deltas, fitted to the inputs of its modules.

``Δ = L Rᵀ`` with L (m, r) and R (n, r) becomes ``Δ' = L R'ᵀ``: in a LoRA adapter, ``lora_A`` changes and ``lora_B`` stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from streamer.errors import MismatchError, UsageError
from streamer.linalg.low_rank import LowRank
from streamer.methods.fit_set import FitSet, share_name
from streamer.units import counted

if TYPE_CHECKING:
    from streamer.linalg.operators import Delta
    from streamer.plan.targets import Target


@dataclass(frozen=True, eq=False, repr=False)
class FactorSet(FitSet):
    """New right factors of all matrices: R' (n, r), float32, by `Target.tensor`; see `FitSet`."""

    matrices: Mapping[str, Tensor]
    method: ClassVar[str] = "regmean"

    def stored(self, tensor: str) -> bytes:
        """Return the factor of a matrix in float32."""
        return self.matrices[tensor].contiguous().numpy().astype("<f4").tobytes()

    def check(self) -> None:
        """Refuse factors that are not matrices of finite numbers."""
        for tensor, factor in self.matrices.items():
            if factor.ndim != 2 or not bool(torch.isfinite(factor).all()):
                raise UsageError(
                    f"{self.name}: the factor of {tensor!r} is not a matrix of finite numbers; use the factors of a fit"
                )

    def fits(self, target: Target) -> bool:
        """Test whether there is a factor for a matrix, with its number of inputs and its rank."""
        factor = self.matrices.get(target.tensor)
        if factor is None or not target.module.low_rank:
            return False
        return tuple(factor.shape) == (target.module.shape[1], target.module.factor_rank)

    def mitigated(self, delta: Delta, tensor: str) -> Delta:
        """Compute ``Δ' = L R'ᵀ``."""
        factor = self.matrices[tensor]
        if not isinstance(delta, LowRank) or factor.shape != delta.R.shape:
            raise MismatchError(
                f"{self.name}: the factor of {tensor!r} does not have this adapter's shape; fit it to this adapter"
            )
        return LowRank(delta.L.double(), factor.double())

    def __repr__(self) -> str:
        return f"<FactorSet: keep {share_name(self.keep)}, factors of {counted(len(self.matrices), 'matrix')}>"
