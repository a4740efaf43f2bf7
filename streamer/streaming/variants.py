"""Name the variants of a model to compare: the base, the unchanged adapter, and each method at each λ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamer.detection.selection import Selection
from streamer.errors import UsageError
from streamer.methods import BY_LAMBDA, UNCHANGED, MethodName, NullSpace, Shrink, make_method, takes_findings, takes_map
from streamer.methods.coefficients import Coefficients
from streamer.methods.input_map import InputMap
from streamer.methods.method import Method

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
        factors = self.mitigation and self.mitigation.coefficients
        return factors.keep if factors else None


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
    for name in methods:
        if name not in BY_LAMBDA:  # refuses unknown names, and missing coefficients or maps
            make_method(name, coefficients=None if coefficients is None else coefficients.sets[0])
    make_method(Shrink.name, select=select)  # refuses a bad selection, whatever the methods
    by_lambda = [name for name in methods if name in BY_LAMBDA]
    if mapped is not None and NullSpace.name not in by_lambda:
        by_lambda.append(NullSpace.name)
    made = [
        make_method(
            name,
            lam,
            select if takes_findings(name) else "all",
            amplify=amplify,
            map=mapped if takes_map(name) else None,
        )
        for name in by_lambda
        for lam in lambdas
    ]
    if coefficients is not None:
        made += [make_method(None, coefficients=coefficients.select(keep)) for keep in coefficients.keeps]
    return (Variant(BASE, None), Variant(ADAPTER, UNCHANGED), *map(Variant.of, made))
