"""What a fit gives for one share of the learning that is kept, whatever a method makes of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypedDict

from streamer.json_types import Sha256

if TYPE_CHECKING:
    from streamer.linalg.operators import Delta
    from streamer.plan.targets import Target


class CoefficientsRecord(TypedDict):
    """The part of a fit that a method uses."""

    keep: Annotated[float, "Share of the learning that the set was fitted to keep."]
    sha256: Annotated[Sha256, "Digest of the values of all matrices (SHA-256, hexadecimal)."]


@dataclass(frozen=True, eq=False, repr=False)
class FitSet(ABC):
    """Values of all matrices for one share of the learning that is kept.

    Attributes
    ----------
    keep
        The share of what the adapter learned that they were fitted to keep.
    matrices
        By `Target.tensor`.
    facts
        What they were fitted to; see `Coefficients`, whose `select` puts them here.
    name
        Name them in messages.
    method
        Name of the method that uses them.
    """

    keep: float
    matrices: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)
    name: str = "coefficients"
    method: ClassVar[str]

    @property
    @abstractmethod
    def digest(self) -> str:
        """SHA-256 (hex) over all values: what they do to a delta, to the last bit."""

    @abstractmethod
    def check(self) -> None:
        """Raise `UsageError` if they are what no fit gives."""

    @abstractmethod
    def fits(self, target: Target) -> bool:
        """Test whether there are values for a matrix, of its form, as far as its adapter's headers tell."""

    @abstractmethod
    def mitigated(self, delta: Delta, tensor: str) -> Delta:
        """Compute Δ' of a matrix."""

    def row(self, tensor: str) -> dict[str, Any]:
        """Say what a record's row of a matrix holds of them."""
        return {}

    def record(self) -> CoefficientsRecord:
        """Say which they are, as an output has it."""
        return {"keep": self.keep, "sha256": self.digest}


def share_name(keep: float) -> str:
    """Name a share of the learning, in six digits, as tables, variants and commands have it; sets of one file differ in it.

    >>> share_name(0.9), share_name(1 / 3)
    ('0.9', '0.333333')
    """
    return f"{keep:g}"
