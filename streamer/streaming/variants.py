"""List the variants of an adapted model: the base, the adapter, and the adapter after each mitigation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from streamer.detection.findings import Findings
from streamer.errors import UsageError
from streamer.json_types import Selection
from streamer.linalg.torch_state import CPU
from streamer.methods import (
    METHODS,
    UNCHANGED,
    Method,
    MethodName,
    NullSpace,
    RegMean,
    make_method,
    options_of,
)
from streamer.methods.files import Coefficients, InputMap
from streamer.plan.plan import Plan

BASE = "base"
ADAPTER = "adapter"
"""Names of the first two variants: the model without the adapter, and with the unchanged adapter."""

BASE_ROW = 0
ADAPTER_ROW = 1
"""Numbers of the first two variants."""


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
        return (
            self.mitigation.mitigation_lambda if self.mitigation and self.name != ADAPTER else None
        )

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
    """List ``base``, ``adapter``, each method at each λ, and last the one with the given coefficients.

    If coefficients or a map are given, the method that uses them is listed, whether named or not.

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
    if mapped is not None and NullSpace.name not in methods:
        methods = (*methods, NullSpace.name)
    if coefficients is not None:
        methods = (*(name for name in methods if name != RegMean.name), RegMean.name)
    files = {"map": mapped, "coefficients": coefficients}
    stated = {
        "select": select,
        "amplify": amplify,
        **{name: file for name, file in files.items() if file is not None},
    }
    mitigations: list[Method] = []
    for name in methods:
        names = options_of(METHODS[name]) if name in METHODS else []
        options = {option: value for option, value in stated.items() if option in names}
        if "mitigation_lambda" in names:
            mitigations += [make_method(name, mitigation_lambda=lam, **options) for lam in lambdas]
        else:  # refuses an unknown name, and missing coefficients
            mitigations.append(make_method(name, **options))
    return (Variant(BASE, None), Variant(ADAPTER, UNCHANGED), *map(Variant.of, mitigations))


@dataclass(frozen=True)
class VariantSet:
    """Variants of one adapted model, and what their deltas are computed from.

    Attributes
    ----------
    findings
        Findings on all matrices; None if no variant needs them.
    projected
        Whether deltas are projected onto the adapter's rank, as `mitigate` writes them, instead of kept complete, as `merge` does.
    rounds_products
        Whether the base's weights, and the inputs and results of their products, are rounded to bfloat16.
    device
        Device on which the model runs; everything read from files is copied to it here.
    """

    plan: Plan
    variants: tuple[Variant, ...]
    findings: Findings | None
    projected: bool = False
    rounds_products: bool = False
    device: torch.device = CPU

    def __post_init__(self) -> None:
        if self.rounds_products and self.device != CPU:
            raise UsageError(
                f"bf16 products run only on the CPU; with --device {self.device}, use --dtype float32"
            )
