"""Reduce the delta's response to general inputs, whose leading directions come from a map of the base; see `linalg.null_space`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from streamer.errors import UsageError
from streamer.methods.method import ByLambda, MethodName, Needs

if TYPE_CHECKING:
    from streamer.detection.intruders import Detection
    from streamer.linalg.operators import Delta


class NullSpace(ByLambda):
    """``Δ' = Δ (I + ν C)⁻ᵖ`` with second moments C of general inputs; λ is the share of ``E‖Δ x‖²`` that each matrix keeps."""

    name: ClassVar[MethodName] = "nullspace"
    needs: ClassVar[Needs] = Needs.MAP
    keeps_rank: ClassVar[bool] = True
    keeps_left: ClassVar[bool] = True
    default_lambda: ClassVar[float | None] = 0.6
    about: ClassVar[str] = "reduce the response to general inputs, by a map from `streamer map`"
    card: ClassVar[str] = (
        "The adapter's response to general text was reduced: each matrix keeps the share λ of its energy on general inputs, whose "
        "leading directions come from a map of the base. Only the right factors changed (`lora_A`, in some stacked experts "
        "`lora_B`).\n"
    )

    changes: ClassVar[str] = "by its energy on general inputs"

    def check(self) -> None:
        """Refuse a λ outside [0, 1], and coefficients."""
        super().check()
        lam = self.mitigation_lambda
        assert lam is not None
        if not 0 <= lam <= 1:
            raise UsageError(
                f"lambda: a share of the delta's energy is between 0 and 1, got {lam:g}; leave out --amplify"
            )

    def mitigated(self, delta: Delta, detection: Detection | None, tensor: str = "") -> Delta:
        """Compute Δ'; return the given delta if the map has no inputs for this matrix."""
        from streamer.linalg.null_space import reduced

        assert self.map is not None
        assert self.mitigation_lambda is not None
        found = self.map.find(tensor, delta.shape[1])
        return delta if found is None else reduced(delta.precise(), found.spectrum, self.mitigation_lambda)
