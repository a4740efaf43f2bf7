"""Scale each singular direction of the delta by a coefficient of its own, fitted to text."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from streamer.errors import UsageError
from streamer.methods.method import Method, MethodName, Needs

if TYPE_CHECKING:
    from streamer.detection.intruders import Detection
    from streamer.linalg.operators import Delta
    from streamer.methods.coefficients import CoefficientSet


class Fitted(Method):
    """``Δ' = U diag(c) Uᵀ Δ`` with the singular vectors U of Δ itself, of rank r; no λ and no detection."""

    name: ClassVar[MethodName] = "fitted"
    needs: ClassVar[Needs] = Needs.COEFFICIENTS
    keeps_rank: ClassVar[bool] = True
    colour: ClassVar[str] = "#a64d86"
    about: ClassVar[str] = "each of the adapter's own directions by its coefficient"
    default_lambda: ClassVar[float | None] = None

    @classmethod
    def of(cls, coefficients: CoefficientSet) -> Fitted:
        """Take one set of coefficients."""
        return cls(coefficients=coefficients)

    def check(self) -> None:
        """Refuse a λ, and a lack of coefficients."""
        if self.coefficients is None:
            raise UsageError(f"method {self.name!r} needs coefficients; make them with `streamer fit`")
        if (lam := self.mitigation_lambda) is not None:
            raise UsageError(f"lambda: method {self.name!r} uses coefficients instead, got {lam!r}; leave it out")

    @property
    def label(self) -> str:
        """Name it with the share of the learning that its coefficients keep: ``fitted 0.9``."""
        assert self.coefficients is not None
        return f"{self.name} {self.coefficients.keep:g}"

    def mitigated(self, delta: Delta, detection: Detection | None, tensor: str = "") -> Delta:
        """Compute Δ' by the coefficients of this tensor."""
        from streamer.methods.coefficients import fitted_delta  # it needs torch, and the command line's help does not

        assert self.coefficients is not None
        return fitted_delta(delta, self.coefficients.matrices[tensor], tensor)
