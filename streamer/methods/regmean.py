"""Keep the delta's response to the task's inputs, and remove its response to general inputs; see `linalg.regmean`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from streamer.errors import UsageError
from streamer.methods.factors import share_name
from streamer.methods.method import Method, MethodName, Needs

if TYPE_CHECKING:
    from streamer.detection.intruders import Detection
    from streamer.linalg.operators import Delta


class RegMean(Method):
    """``Δ' = Δ C̃_t (C̃_t + μ C_g)⁻¹``, corrected layer by layer; a fit holds the new right factors, and the left factors stay."""

    name: ClassVar[MethodName] = "regmean"
    needs: ClassVar[Needs] = Needs.COEFFICIENTS
    keeps_rank: ClassVar[bool] = True
    keeps_left: ClassVar[bool] = True
    default_lambda: ClassVar[float | None] = None
    about: ClassVar[str] = "keep only the response to the task's inputs (`streamer fit`)"
    card: ClassVar[str] = (
        "The adapter keeps its response to the task's inputs, and its response to general text was removed: its "
        "right factors (`lora_A`, in some stacked experts `lora_B`) were fitted to the inputs of each module.\n"
    )
    changes: ClassVar[str] = "right factors by their inputs"

    def check(self) -> None:
        """Refuse a λ, and missing factors."""
        if self.coefficients is None:
            raise UsageError(f"method {self.name!r} needs coefficients; make them with `streamer fit`")
        if (lam := self.mitigation_lambda) is not None:
            raise UsageError(f"lambda: method {self.name!r} uses coefficients instead, got {lam!r}; leave it out")

    @property
    def label(self) -> str:
        """Return the name with the share of the learning to keep: ``regmean 0.9``."""
        assert self.coefficients is not None
        return f"{self.name} {share_name(self.coefficients.keep)}"

    def mitigated(self, delta: Delta, detection: Detection | None, tensor: str = "") -> Delta:
        """Compute Δ' with the factors that were fitted to this tensor."""
        assert self.coefficients is not None
        return self.coefficients.mitigated(delta, tensor)
