"""Describe the models that an evaluation measured."""

from __future__ import annotations

from dataclasses import dataclass

from streamer.methods import METHODS, MethodName
from streamer.streaming.variants import Variant

BASE_ROW, ADAPTER_ROW = 0, 1
"""Row numbers of the first two variants."""

ORDER = (None, *METHODS)


@dataclass(frozen=True)
class EvaluatedVariant:
    """A model that was evaluated; `VariantRecord` explains the attributes."""

    name: str
    method: MethodName | None
    mitigation_lambda: float | None
    keep: float | None = None

    @classmethod
    def of(cls, variant: Variant) -> EvaluatedVariant:
        """Describe a variant that was run."""
        return cls(variant.name, variant.method, variant.mitigation_lambda, variant.keep)

    @property
    def order(self) -> tuple[int, float]:
        """Return the sort key for tables: the base and the adapter come first, then each method from its mildest variant on."""
        method = ORDER.index(self.method) if self.method in ORDER else len(ORDER)
        return method, -(self.mitigation_lambda or self.keep or 0.0)
