"""Scale the whole delta: the baseline for all other methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from streamer.methods.method import MethodName, Needs, Scaling

if TYPE_CHECKING:
    from torch import Tensor

    from streamer.linalg.operators import Delta


class Shrink(Scaling):
    """``Δ' = λ Δ``, without detection."""

    name: ClassVar[MethodName] = "shrink"
    needs: ClassVar[Needs] = Needs.NOTHING
    keeps_rank: ClassVar[bool] = True
    about: ClassVar[str] = "scale the whole adapter, without detection"
    card: ClassVar[str] = "The adapter's change to each weight was scaled by λ: 1 keeps it unchanged, 0 removes it.\n"

    def formula(self, delta: Delta, *triplets: Tensor) -> Delta:
        """Compute Δ' from Δ."""
        assert self.mitigation_lambda is not None
        return delta.scaled(self.mitigation_lambda)
