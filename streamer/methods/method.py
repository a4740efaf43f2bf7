"""Define what a mitigation method is: a formula for the mitigated delta, and what it needs.

The notation is as in `detection.intruders`: Δ (m, n) is the adapter's delta, and ``U_I Σ_I V_Iᵀ`` are the intruders' singular triplets of
``W0 + Δ``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from streamer.detection.selection import Selection
from streamer.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from streamer.detection.intruders import Detection
    from streamer.linalg.operators import Delta
    from streamer.methods.factors import FactorSet
    from streamer.methods.input_map import InputMap


MethodName = Literal["paper", "project", "shrink", "regmean", "nullspace"]
"""Names of the methods, for type checkers; `METHODS` maps them to classes."""


class Needs(Enum):
    """What a method needs in addition to the adapter."""

    NOTHING = "nothing"
    FINDINGS = "findings"
    COEFFICIENTS = "coefficients"
    MAP = "map"


@dataclass(frozen=True)
class Method(ABC):
    """A method with its options, which, with the findings, determine the mitigated delta Δ'.

    Attributes
    ----------
    mitigation_lambda
        Share to keep, of each intruder or of the whole delta: 1 changes nothing, 0 removes it (`Project` keeps the base's part
        of an intruder). None for a method without λ.
    select
        Which intruders to scale: ``all`` among the top k, or only the ``first`` (highest-ranked) of each matrix.
    coefficients
        Factors of a fit, for a method that needs them; else None.
    amplify
        Whether to allow λ outside [0, 1]: above 1 an intruder grows, below 0 its sign changes.
    map
        Map of the base's inputs, for a method that needs it; else None.
    name
        Name on the command line, in records and in tables.
    needs
        What the method needs in addition to the adapter.
    keeps_rank
        Whether Δ' has the rank of Δ, so that the adapter's own factors can hold it.
    keeps_left
        Whether the left factor stays unchanged, so that only ``lora_A`` is rewritten.
    about, card
        Description in help; description at the beginning of a model card.
    changes
        What the method changes in each matrix, for a table; a table shows the number of intruders for methods that scale them.
    default_lambda
        λ if none is given.
    """

    mitigation_lambda: float | None = None
    select: Selection = "all"
    coefficients: FactorSet | None = None
    amplify: bool = False
    map: InputMap | None = None

    name: ClassVar[MethodName]
    needs: ClassVar[Needs]
    keeps_rank: ClassVar[bool]
    keeps_left: ClassVar[bool] = False
    about: ClassVar[str]
    card: ClassVar[str]
    changes: ClassVar[str] = "as a whole"
    default_lambda: ClassVar[float | None] = 0.75

    def __post_init__(self) -> None:
        if self.select not in get_args(Selection):
            raise UsageError(f"select: expected one of {', '.join(get_args(Selection))}, found {self.select!r}")
        if self.map is None and self.needs is Needs.MAP:
            raise UsageError(f"method {self.name!r} needs a map of the base's inputs; make one with `streamer map`")
        if self.map is not None and self.needs is not Needs.MAP:
            raise UsageError(f"map: is not used by method {self.name!r}; leave one of the two out")
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Raise `UsageError` if an option is invalid."""

    @property
    @abstractmethod
    def label(self) -> str:
        """Return the name with λ, or with the share that the coefficients keep, for tables and figures: ``paper 0.75``."""

    @abstractmethod
    def mitigated(self, delta: Delta, detection: Detection | None, tensor: str = "") -> Delta:
        """Compute the mitigated delta Δ'; return the given delta object if nothing changes.

        Parameters
        ----------
        delta
            Δ, (m, n), in factors or dense.
        detection
            Findings for this matrix; None if they are not needed.
        tensor
            Name of the matrix, for looking up its coefficients.

        Returns
        -------
        LowRank or Dense
            Factors are in float64; a dense Δ' has the dtype of Δ.
        """

    @property
    def needs_detection(self) -> bool:
        """Test whether the result depends on findings at all."""
        return self.needs is Needs.FINDINGS and self.mitigation_lambda != 1

    def as_dict(self) -> dict[str, Any]:
        """Return everything that, with the findings, determines the mitigated delta, as JSON values; plans include it in their digests."""
        tree = self.as_json()
        return {"mitigation_lambda": tree.pop("lambda"), **tree}

    def as_json(self) -> dict[str, Any]:
        """Return the options under the names used in records and printed JSON."""
        files = {"coefficients": self.coefficients, "map": self.map}
        more = {name: file.record() for name, file in files.items() if file is not None}
        return {"method": self.name, "scale": self.select, "lambda": self.mitigation_lambda, **more}


class ByLambda(Method):
    """A method with a λ."""

    def check(self) -> None:
        """Refuse a λ that is not a share, and coefficients."""
        lam = self.mitigation_lambda
        if self.coefficients is not None:
            raise UsageError(f"coefficients: belong to method 'regmean', found {self.name!r}; pass one or the other")
        if not isinstance(lam, Real) or isinstance(lam, bool) or not math.isfinite(lam):
            raise UsageError(f"lambda must be a finite number, got {lam!r}; {_share_meant(lam)}".rstrip("; "))
        object.__setattr__(self, "mitigation_lambda", float(lam))
        if not (self.amplify or 0 <= lam <= 1):
            raise UsageError(
                f"lambda must be between 0 (remove) and 1 (keep), got {self.mitigation_lambda:.15g}; {_share_meant(lam)}"
                "`amplify=True` allows other values"
            )

    @property
    def label(self) -> str:
        """Return the name with λ."""
        return f"{self.name} {self.mitigation_lambda:g}"


class Scaling(ByLambda):
    """A method that scales intruders, or the whole delta, by λ."""

    card: ClassVar[str] = (
        "Intruder dimensions ([Shuttleworth et al., arXiv 2410.21228](https://arxiv.org/abs/2410.21228)) are leading singular "
        "directions of the fine-tuned weights that resemble none of the base's. They were scaled by λ: 1 keeps them, 0 removes them "
        "(method project keeps the base's part of them).\n"
    )

    def mitigated(self, delta: Delta, detection: Detection | None, tensor: str = "") -> Delta:
        """Compute Δ' by the formula; see `Method.mitigated`."""
        if self.mitigation_lambda == 1:
            return delta
        if self.needs is not Needs.FINDINGS:
            return self.formula(delta.precise())
        if detection is None:
            raise UsageError(f"method {self.name!r} at lambda {self.mitigation_lambda} needs findings")
        triplets = detection.factors(self.select)
        return self.formula(delta.precise(), *triplets) if len(triplets[1]) else delta

    @abstractmethod
    def formula(self, delta: Delta, *triplets: Tensor) -> Delta:
        """Compute Δ' from Δ in float64 and, if the method needs findings, from ``U_I`` (m, q), ``Σ_I`` (q,) and ``V_Iᵀ`` (q, n)."""


def _share_meant(lam: object) -> str:
    """Return a question whether a percentage, or a number in a string, was meant as a share; empty if neither is likely."""
    text = str(lam)
    try:
        number = float(text.rstrip("% "))
    except ValueError:
        return ""
    share = number / 100 if "%" in text or number >= 2 else number
    return f"did you mean {share:g}? " if 0 <= share <= 1 else ""
