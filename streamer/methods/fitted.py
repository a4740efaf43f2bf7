"""Apply the result of a fit: a coefficient for each singular direction of the delta, or new right factors."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from streamer.errors import UsageError
from streamer.methods.fit_set import share_name
from streamer.methods.method import Method, MethodName, Needs

if TYPE_CHECKING:
    from streamer.detection.intruders import Detection
    from streamer.linalg.operators import Delta


class ByFit(Method):
    """A method that applies the result of a fit, without λ and without detection."""

    needs: ClassVar[Needs] = Needs.COEFFICIENTS
    keeps_rank: ClassVar[bool] = True
    default_lambda: ClassVar[float | None] = None

    def check(self) -> None:
        """Refuse a λ, missing coefficients, and coefficients of another method."""
        if self.coefficients is None:
            raise UsageError(f"method {self.name!r} needs coefficients; make them with `streamer fit`")
        if self.coefficients.method != self.name:
            raise UsageError(
                f"{self.coefficients.name}: was fitted for method {self.coefficients.method!r}, found {self.name!r}; do not name a method"
            )
        if (lam := self.mitigation_lambda) is not None:
            raise UsageError(f"lambda: method {self.name!r} uses coefficients instead, got {lam!r}; leave it out")

    @property
    def label(self) -> str:
        """Return the name with the share of the learning to keep: ``fitted 0.9``."""
        assert self.coefficients is not None
        return f"{self.name} {share_name(self.coefficients.keep)}"

    def mitigated(self, delta: Delta, detection: Detection | None, tensor: str = "") -> Delta:
        """Compute Δ' with the values that were fitted to this tensor."""
        assert self.coefficients is not None
        return self.coefficients.mitigated(delta, tensor)


class Fitted(ByFit):
    """``Δ' = U diag(c) Uᵀ Δ`` with the singular vectors U of Δ itself, of rank r."""

    name: ClassVar[MethodName] = "fitted"
    about: ClassVar[str] = "scale each of the adapter's own directions by its coefficient, from `streamer fit`"
    card: ClassVar[str] = (
        "Each singular direction of the adapter's change to a weight was scaled by a coefficient, fitted to text of the task and to "
        "general text: 1 keeps the direction unchanged, 0 removes it.\n"
    )
    changes: ClassVar[str] = "each direction by its coefficient"
