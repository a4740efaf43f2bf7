"""Define the result of a fit for one share of the learning, independent of the method that uses it."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypedDict

from streamer.json_types import Sha256

if TYPE_CHECKING:
    from streamer.linalg.operators import Delta
    from streamer.plan.targets import Target


class CoefficientsRecord(TypedDict):
    """The set of a fit that a method uses."""

    keep: Annotated[float, "Share of the learning that the set was fitted to keep."]
    sha256: Annotated[Sha256, "Digest of the values of all matrices (SHA-256, hexadecimal)."]


@dataclass(frozen=True, eq=False, repr=False)
class FitSet(ABC):
    """Fitted values of all matrices for one share of the learning.

    Attributes
    ----------
    keep
        Share of the learning that the values were fitted to keep.
    matrices
        Values of each matrix, by `Target.tensor`.
    facts
        Inputs and options of the fit; see `Coefficients`, whose `select` sets them.
    name
        Name for messages.
    method
        Name of the method that uses the values.
    """

    keep: float
    matrices: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)
    name: str = "coefficients"
    method: ClassVar[str]

    @cached_property
    def digest(self) -> str:
        """Hash all values (SHA-256, hex), which determine the mitigated delta to the last bit."""
        digest = hashlib.sha256()
        for tensor in sorted(self.matrices):
            digest.update(f"{tensor}\n".encode())
            digest.update(self.stored(tensor))
        return digest.hexdigest()

    @abstractmethod
    def stored(self, tensor: str) -> bytes:
        """Return the values of a matrix as bytes, little-endian."""

    @abstractmethod
    def check(self) -> None:
        """Raise `UsageError` if no fit can produce these values."""

    @abstractmethod
    def fits(self, target: Target) -> bool:
        """Test whether there are values for a matrix, with its shape as far as the adapter's headers show it."""

    @abstractmethod
    def mitigated(self, delta: Delta, tensor: str) -> Delta:
        """Compute Δ' of a matrix from its delta."""

    def row(self, tensor: str) -> dict[str, Any]:
        """Return the values that a record's row of a matrix contains."""
        return {}

    def record(self) -> CoefficientsRecord:
        """Identify this set, for the record of an output."""
        return {"keep": self.keep, "sha256": self.digest}


def share_name(keep: float) -> str:
    """Write a share of the learning with six digits, as in tables, variants and commands; it is unique among the sets of a file.

    >>> share_name(0.9), share_name(1 / 3)
    ('0.9', '0.333333')
    """
    return f"{keep:g}"
