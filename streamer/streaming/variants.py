"""Name the variants of a model to compare: the base, the unchanged adapter, and each method at each λ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamer.detection.selection import Selection
from streamer.errors import UsageError
from streamer.methods import METHODS, UNCHANGED, Method, MethodName, NullSpace, Paper, RegMean, make_method, options_of
from streamer.methods.fits import Coefficients
from streamer.methods.maps import InputMap

BASE, ADAPTER = "base", "adapter"
"""Names of the first two variants: the model without the adapter, and with the unchanged adapter."""


@dataclass(frozen=True)
class Variant:
    """A model to evaluate: the base with an adapter mitigated by one method.

    Attributes
    ----------
    name
        ``base``, ``adapter``, or method and λ: ``paper 0.5``; for a fit the share that it keeps: ``regmean 0.9``.
    mitigation
        The method that computes Δ'; None for the base, which does not use the adapter.
    """

    name: str
    mitigation: Method | None

    @classmethod
    def of(cls, method: Method) -> Variant:
        """Make the variant for a method, named by its label."""
        return cls(method.label, method)

    @property
    def method(self) -> MethodName | None:
        """Return the name of the method; None for ``base`` and ``adapter``."""
        return self.mitigation.name if self.mitigation and self.name != ADAPTER else None

    @property
    def mitigation_lambda(self) -> float | None:
        """Return λ; None for ``base``, ``adapter`` and a fit."""
        return self.mitigation.mitigation_lambda if self.mitigation and self.name != ADAPTER else None

    @property
    def scales_intruders(self) -> bool:
        """Test whether the variant depends on findings."""
        return self.mitigation is not None and self.mitigation.needs_detection

    @property
    def keep(self) -> float | None:
        """Return the share of the learning that a fit keeps; None for all other variants."""
        return self.mitigation.coefficients.keep if isinstance(self.mitigation, RegMean) else None


def make_variants(
    methods: Sequence[MethodName],
    lambdas: Sequence[float],
    select: Selection,
    coefficients: Coefficients | None = None,
    amplify: bool = False,
    mapped: InputMap | None = None,
) -> tuple[Variant, ...]:
    """List ``base``, ``adapter``, each method at each λ, and each set of coefficients, in this order.

    Listed among other methods, ``regmean`` adds nothing to the coefficients; alone, it leaves out the other methods. If a map is given, the
    method that uses it is evaluated as well.

    Raises
    ------
    UsageError
        If there is no method or no λ, one is given twice, λ is 1 (the unchanged adapter), ``regmean`` has no coefficients, or an option
        makes no sense.
    """
    for what, values in (("method", methods), ("lambda", lambdas)):
        if not values:
            raise UsageError(f"{what}: expected at least one, found none")
        if len(set(values)) < len(values):
            raise UsageError(f"{what}: expected different values, found {list(values)}")
    if 1 in lambdas:
        raise UsageError("lambda: 1 is the unchanged adapter, which is always evaluated; omit it")
    Paper(select=select)  # refuses a bad selection, whatever the methods
    if mapped is not None and NullSpace.name not in methods:
        methods = (*methods, NullSpace.name)
    files = {"map": mapped, "coefficients": None if coefficients is None else coefficients.sets[0]}
    given = {"select": select, "amplify": amplify, **{name: file for name, file in files.items() if file is not None}}
    made: list[Method] = []
    for name in methods:
        own = options_of(METHODS[name]) if name in METHODS else []
        options = {option: value for option, value in given.items() if option in own}
        made += [make_method(name, mitigation_lambda=lam, **options) for lam in lambdas if "mitigation_lambda" in own]
        if "mitigation_lambda" not in own:  # refuses an unknown name, and missing coefficients
            make_method(name, **options)
    if coefficients is not None:
        made += [RegMean(coefficients.select(keep)) for keep in coefficients.keeps]
    return (Variant(BASE, None), Variant(ADAPTER, UNCHANGED), *map(Variant.of, made))
