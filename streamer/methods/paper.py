"""Apply the paper's method: scale each intruder's singular value, including the base's own part of that direction."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from streamer.methods.method import MethodName, Needs, Scaling

if TYPE_CHECKING:
    from torch import Tensor

    from streamer.linalg.operators import Delta


class Paper(Scaling):
    """``Δ' = Δ + (λ − 1) U_I Σ_I V_Iᵀ``, of rank r + q (Shuttleworth et al., arXiv 2410.21228)."""

    name: ClassVar[MethodName] = "paper"
    needs: ClassVar[Needs] = Needs.FINDINGS
    keeps_rank: ClassVar[bool] = False
    about: ClassVar[str] = "scale each intruder"

    def formula(self, delta: Delta, *triplets: Tensor) -> Delta:
        """Compute Δ' from Δ, ``U_I``, ``Σ_I`` and ``V_Iᵀ``."""
        assert self.mitigation_lambda is not None
        U, S, Vh = triplets
        return delta.plus_triplets(U, S, Vh, self.mitigation_lambda - 1)
