"""Define the options that determine an evaluation's result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from streamer.detection.selection import Selection
from streamer.errors import UsageError
from streamer.evaluation.suggestion import check_keep
from streamer.linalg.torch_state import has_fast_bfloat16
from streamer.methods import WITHOUT_FILES, MethodName
from streamer.methods.fits import Coefficients, CoefficientsRecord
from streamer.methods.maps import InputMap
from streamer.plan.plan import Plan
from streamer.streaming.values import VariantSet
from streamer.streaming.variants import Variant, make_variants

ProductDtype = Literal["float32", "bf16"]
"""Dtype to which base weights and activations are rounded before they are multiplied; the product is float32."""

LAMBDAS = (0.75, 0.5)
"""λ of each method, beside those that keep the share."""


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation. `api.evaluate_variants` explains them; for `dtype` see also `bfloat16_products`."""

    methods: tuple[MethodName, ...] = WITHOUT_FILES
    lambdas: tuple[float, ...] = LAMBDAS
    select: Selection = "all"
    sequences: int = 32
    length: int = 512
    keep: float = 0.9
    projected: bool = False
    dtype: ProductDtype = "float32"
    coefficients: Coefficients | None = None
    amplify: bool = False
    map: InputMap | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        _ = self.variants
        for name in ("sequences", "length"):
            value = getattr(self, name)
            if type(value) is not int or value < 2:
                raise UsageError(f"{name}: expected a whole number from 2, found {value!r}")
        check_dtype(self.dtype)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """List the variants: ``base``, ``adapter``, each method at each λ, then each set of coefficients."""
        return make_variants(self.methods, self.lambdas, self.select, self.coefficients, self.amplify, self.map)

    def job(self, plan: Plan, device: torch.device) -> VariantSet:
        """Describe how to compute all variants; deltas that need findings are available only once findings are set."""
        return VariantSet(plan, self.variants, None, self.projected, self.dtype == "bf16", device)

    def fitted_record(self) -> list[CoefficientsRecord]:
        """Describe the sets of coefficients that are evaluated."""
        return [] if self.coefficients is None else [one.record() for one in self.coefficients.sets]


def check_dtype(dtype: str) -> None:
    """Refuse an unknown dtype, or a dtype in which this processor multiplies slowly."""
    if dtype not in get_args(ProductDtype):
        raise UsageError(f"dtype: expected one of {', '.join(get_args(ProductDtype))}, found {dtype!r}")
    if dtype == "bf16" and not has_fast_bfloat16():
        raise UsageError(
            "dtype: bf16 needs a processor that multiplies bfloat16 matrices (AMX), and a torch that makes it do so; "
            "use float32 here"
        )
