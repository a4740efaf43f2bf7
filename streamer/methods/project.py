"""Scale the adapter's part of each intruder's direction; the base's part stays."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from streamer.methods.method import MethodName, Needs, Scaling

if TYPE_CHECKING:
    from torch import Tensor

    from streamer.linalg.operators import Delta


class Project(Scaling):
    """``Δ' = (I − (1 − λ) U_I U_Iᵀ) Δ``, of rank r."""

    name: ClassVar[MethodName] = "project"
    needs: ClassVar[Needs] = Needs.FINDINGS
    keeps_rank: ClassVar[bool] = True
    about: ClassVar[str] = "scale only the adapter's part of each intruder"

    def formula(self, delta: Delta, *triplets: Tensor) -> Delta:
        """Compute Δ' from Δ and ``U_I``."""
        assert self.mitigation_lambda is not None
        return delta.plus_projection(triplets[0], self.mitigation_lambda - 1)
