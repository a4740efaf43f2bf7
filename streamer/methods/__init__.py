"""Define the mitigation methods, which change an adapter's delta. A new method is a class here and an entry in `METHODS`.

A method is a formula for the mitigated delta Δ' with its own options, which it validates. The notation is as in `detection.intruders`: Δ
(m, n) is the adapter's delta, and ``U_I Σ_I V_Iᵀ`` are the intruders' singular triplets of ``W0 + Δ``.

The command line, the library, evaluations, and reports read the table. Only `verification` has its own formula for each name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from streamer.errors import UsageError
from streamer.json_types import Selection

if TYPE_CHECKING:
    from torch import Tensor

    from streamer.detection.intruders import Detection
    from streamer.linalg.operators import Delta
    from streamer.methods.files import Coefficients, InputMap

MethodName = Literal["paper", "project", "shrink", "regmean", "nullspace"]
"""Names of the methods, for type checkers; `METHODS` maps them to classes."""


class Method(ABC):
    """A method with its options, which, with the findings, determine the mitigated delta Δ'.

    Each method is a dataclass of its own options; the two here are what the record says of methods without them.

    Attributes
    ----------
    mitigation_lambda
        Share to keep, of each intruder or of the whole delta: 1 changes nothing, 0 removes it (`Project` keeps the base's part
        of an intruder). None for a method without λ.
    select
        Which intruders to scale: ``all`` among the top k, or only the ``first`` (highest-ranked) of each matrix.
    name
        Name on the command line, in records and in tables.
    needs
        Option that passes what the method needs in addition to the adapter, if it needs anything.
    keeps_rank
        Whether Δ' has the rank of Δ, so that the adapter's own factors can hold it.
    keeps_left
        Whether the left factor stays unchanged, so that only ``lora_A`` is rewritten.
    about, card
        Description in help; description at the beginning of a model card.
    changes
        What the method changes in each matrix, for a table; a table shows the number of intruders for methods that scale them.
    missing
        What to say if what it needs is not given.
    """

    mitigation_lambda: float | None = None
    select: Selection = "all"

    name: ClassVar[MethodName]
    needs: ClassVar[Literal["findings", "coefficients", "map"] | None] = None
    keeps_rank: ClassVar[bool] = True
    keeps_left: ClassVar[bool] = False
    about: ClassVar[str]
    card: ClassVar[str]
    changes: ClassVar[str] = "as a whole"
    missing: ClassVar[str] = ""

    @property
    def label(self) -> str:
        """Return the name with λ, or with the share that a fit keeps, for tables and figures: ``paper 0.75``."""
        return f"{self.name} {self.mitigation_lambda:g}"

    @property
    def file(self) -> Coefficients | InputMap | None:
        """Return the factors or the map that the method uses, if any."""
        file: Coefficients | InputMap | None = getattr(self, self.needs or "", None)
        return file

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
            Name of the matrix, for looking up its factors or its inputs.

        Returns
        -------
        LowRank or Dense
            Factors are in float64; a dense Δ' has the dtype of Δ.
        """

    @property
    def needs_detection(self) -> bool:
        """Test whether the result depends on findings at all."""
        return self.needs == "findings" and self.mitigation_lambda != 1

    def as_dict(self) -> dict[str, Any]:
        """Return everything that, with the findings, determines the mitigated delta, as JSON values; plans include it in their digests."""
        tree = self.as_json()
        return {"mitigation_lambda": tree.pop("lambda"), **tree}

    def as_json(self) -> dict[str, Any]:
        """Return the options under the names used in records and printed JSON."""
        files = {} if self.file is None else {str(self.needs): self.file.record()}
        lam = self.mitigation_lambda
        return {"method": self.name, "scale": self.select, "lambda": lam, **files}


def share_name(keep: float) -> str:
    """Write a share of the learning with six digits, as in tables, variants and commands.

    >>> share_name(0.9), share_name(1 / 3)
    ('0.9', '0.333333')
    """
    return f"{keep:g}"


def _check_lambda(method: Shrink | _Scaling | NullSpace, amplify: bool | None = None) -> None:
    """Convert λ to a float, and refuse one that is not a share; None for `amplify` means that the method allows no other values."""
    lam = method.mitigation_lambda
    if not isinstance(lam, Real) or isinstance(lam, bool) or not math.isfinite(lam):
        raise UsageError(f"lambda must be a finite number, got {lam!r}")
    object.__setattr__(method, "mitigation_lambda", float(lam))
    if not (amplify or 0 <= lam <= 1):
        hint = "" if amplify is None else "; `amplify=True` allows other values"
        raise UsageError(
            f"lambda must be between 0 (remove) and 1 (keep), got {float(lam):.15g}{hint}"
        )


@dataclass(frozen=True)
class Shrink(Method):
    """``Δ' = λ Δ``, without detection: the baseline for all other methods."""

    mitigation_lambda: float = 0.75
    amplify: bool = False

    name = "shrink"
    about = "scale the whole adapter, without detection"
    card = (
        "The adapter's change to each weight was scaled by λ: 1 keeps it unchanged, 0 removes it.\n"
    )

    def __post_init__(self) -> None:
        _check_lambda(self, self.amplify)

    def mitigated(self, delta: Delta, detection: Detection | None, tensor: str = "") -> Delta:
        """Scale Δ."""
        lam = self.mitigation_lambda
        return delta if lam == 1 else delta.precise().scaled(lam)


@dataclass(frozen=True)
class _Scaling(Method):
    """A method that scales intruders by λ; above 1, which `amplify` allows, an intruder grows, and below 0 its sign changes."""

    mitigation_lambda: float = 0.75
    select: Selection = "all"
    amplify: bool = False

    needs = "findings"
    card = (
        "Intruder dimensions ([Shuttleworth et al., arXiv 2410.21228](https://arxiv.org/abs/2410.21228)) are leading singular "
        "directions of the fine-tuned weights that resemble none of the base's. They were scaled by λ: 1 keeps them, 0 removes them "
        "(method project keeps the base's part of them).\n"
    )

    def __post_init__(self) -> None:
        _check_lambda(self, self.amplify)

    def mitigated(self, delta: Delta, detection: Detection | None, tensor: str = "") -> Delta:
        """Compute Δ' by the formula; see `Method.mitigated`."""
        if self.mitigation_lambda == 1:
            return delta
        if detection is None:
            raise UsageError(
                f"method {self.name!r} at lambda {self.mitigation_lambda} needs findings"
            )
        U, S, Vh = detection.factors(self.select)
        return self._formula(delta.precise(), U, S, Vh) if len(S) else delta

    @abstractmethod
    def _formula(self, delta: Delta, U: Tensor, S: Tensor, Vh: Tensor) -> Delta:
        """Compute Δ' from Δ in float64, ``U_I`` (m, q), ``Σ_I`` (q,) and ``V_Iᵀ`` (q, n)."""


class Paper(_Scaling):
    """``Δ' = Δ + (λ − 1) U_I Σ_I V_Iᵀ``, of rank r + q (Shuttleworth et al., arXiv 2410.21228): the base's part is scaled too."""

    name = "paper"
    keeps_rank = False
    about = "scale each intruder"

    def _formula(self, delta: Delta, U: Tensor, S: Tensor, Vh: Tensor) -> Delta:
        return delta.plus_triplets(U, S, Vh, self.mitigation_lambda - 1)


class Project(_Scaling):
    """``Δ' = (I − (1 − λ) U_I U_Iᵀ) Δ``, of rank r: the base's part of each intruder stays."""

    name = "project"
    about = "scale only the adapter's part of each intruder"

    def _formula(self, delta: Delta, U: Tensor, S: Tensor, Vh: Tensor) -> Delta:
        return delta.plus_projection(U, self.mitigation_lambda - 1)


@dataclass(frozen=True)
class RegMean(Method):
    """``Δ' = Δ C̃_t (C̃_t + μ C_g)⁻¹``, corrected layer by layer; a fit holds the new right factors, and the left factors stay.

    It keeps the delta's response to the task's inputs, and removes its response to general inputs; see `linalg.moments`.
    """

    coefficients: Coefficients

    name = "regmean"
    needs = "coefficients"
    keeps_left = True
    about = "keep only the response to the task's inputs (`streamer repair`)"
    card = (
        "The adapter keeps its response to the task's inputs, and its response to general text was removed: its "
        "right factors (`lora_A`, in some stacked experts `lora_B`) were fitted to the inputs of each module.\n"
    )
    changes = "right factors by their inputs"
    missing = "needs coefficients; make them with `streamer repair`"

    @property
    def label(self) -> str:
        """Return the name with the share of the learning to keep: ``regmean 0.9``."""
        return f"{self.name} {share_name(self.coefficients.keep)}"

    def mitigated(self, delta: Delta, detection: Detection | None, tensor: str = "") -> Delta:
        """Compute Δ' with the factors that were fitted to this tensor."""
        return self.coefficients.mitigated(delta, tensor)


@dataclass(frozen=True)
class NullSpace(Method):
    """``Δ' = Δ (I + ν C)⁻ᵖ`` with second moments C of general inputs; λ is the share of ``E‖Δ x‖²`` that each matrix keeps.

    It reduces the delta's response to the leading directions of a map of the base; see `linalg.moments`.
    """

    map: InputMap
    mitigation_lambda: float = 0.3

    name = "nullspace"
    needs = "map"
    keeps_left = True
    about = "reduce the response to general inputs, by a map from `streamer map`"
    card = (
        "The adapter's response to general text was reduced: each matrix keeps the share λ of its energy on general inputs, whose "
        "leading directions come from a map of the base. Only the right factors changed (`lora_A`, in some stacked experts "
        "`lora_B`).\n"
    )
    changes = "by its energy on general inputs"
    missing = "needs a map of the base's inputs; make one with `streamer map`"

    def __post_init__(self) -> None:
        _check_lambda(self)

    def mitigated(self, delta: Delta, detection: Detection | None, tensor: str = "") -> Delta:
        """Compute Δ'; return the given delta if the map has no inputs for this matrix."""
        from streamer.linalg.moments import reduced

        entry = self.map.find(tensor, delta.shape[1])
        if entry is None:
            return delta
        return reduced(delta.precise(), entry.spectrum, self.mitigation_lambda)


METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Paper, Project, Shrink, RegMean, NullSpace)
}
"""Methods by name, in the order in which help and tables show them."""

DEFAULT = Paper
"""Method used if none is named and neither coefficients nor a map are given."""

WITHOUT_FILES = tuple(method.name for method in METHODS.values() if not method.missing)
"""Names of the methods that need no file other than findings."""

UNCHANGED = Shrink(1.0)
"""Method that leaves the adapter unchanged."""


def takes_findings(name: str | None) -> bool:
    """Test whether the method with this name scales intruders; False if the name is unknown, or None."""
    return name in METHODS and METHODS[name].needs == "findings"


def options_of(method: type[Method]) -> list[str]:
    """List the names of a method's options."""
    return [option.name for option in fields(method)]  # type: ignore[arg-type]  # each method is a dataclass


def make_method(name: str | None, **options: Any) -> Method:
    """Make a method from the options that were given.

    Parameters
    ----------
    name
        By default, the method of the given coefficients or map, else `DEFAULT`.

    Raises
    ------
    UsageError
        If no method has this name, or if the method lacks or refuses an option.
    """
    if name is None:
        by_file = (
            method for method in METHODS.values() if method.missing and method.needs in options
        )
        name = next(by_file, DEFAULT).name
    if name not in tuple(METHODS):  # a tuple also handles unhashable values
        raise UsageError(f"method: expected one of {', '.join(METHODS)}, found {name!r}")
    method = METHODS[name]
    for option in options:
        if option not in options_of(method):
            raise UsageError(
                f"{option.removeprefix('mitigation_')}: method {name!r} has no such option; leave it out, or choose another method"
            )
    if method.missing and method.needs not in options:
        raise UsageError(f"method {name!r} {method.missing}")
    return method(**options)
