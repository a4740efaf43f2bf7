"""State what a verification compared and what differed: the object of `streamer verify --json`, schema ``streamer.verification/1``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, NotRequired, TypedDict

SCHEMA = "streamer.verification/1"


class NotRecomputed(Exception):  # a reason, and no fault of anyone
    """Say why a matrix is not recomputed: a kind, a size or an encoding that no plain formula here covers."""


class DifferenceRecord(TypedDict):
    """State one difference; `message` is ``FILE: expected EXPECTED, found FOUND``, `tensor` the tensor's name or null."""

    file: str
    tensor: str | None
    expected: str
    found: str
    message: str


class RecomputedRecord(TypedDict):
    """State how one matrix was recomputed; `error` as a share of what rounding permits, `decisions` whether similarities were as well."""

    tensor: str
    error: float
    decisions: bool


class SkippedRecord(TypedDict):
    """Name a matrix that was not recomputed, or another tensor that was not compared, and say why."""

    tensor: str
    reason: str


class TotalsRecord(TypedDict):
    """Count what was compared: `bytes` of the files that were read whole; `tensors` besides the matrices; files are no tensors' here."""

    files: int
    bytes: int
    matrices: int
    recomputed: int
    not_recomputed: int
    tensors: int
    compared: int
    not_compared: int
    differences: int


class Verification(TypedDict):
    """Hold what `streamer verify --json` prints."""

    schema: str
    output: str
    kind: Literal["model", "adapter", "findings"]
    verified: bool
    totals: TotalsRecord
    recomputed: list[RecomputedRecord]
    not_recomputed: list[SkippedRecord]
    not_compared: list[SkippedRecord]
    differences: list[DifferenceRecord]
    inputs: NotRequired[dict[str, str]]


class Checked(NamedTuple):
    """State the result of a recomputation: the largest error as a share of what rounding permits; whether decisions were recomputed too."""

    error: float
    decisions: bool


@dataclass
class Outcome:
    """Collect differences and recomputed matrices of one output while it is verified."""

    output: Path
    kind: Literal["model", "adapter", "findings"]
    files: int = 0
    nbytes: int = 0
    matrices: int = 0
    tensors: int = 0
    compared: int = 0
    recomputed: list[RecomputedRecord] = field(default_factory=list)
    not_recomputed: list[SkippedRecord] = field(default_factory=list)
    not_compared: list[SkippedRecord] = field(default_factory=list)
    differences: list[DifferenceRecord] = field(default_factory=list)

    def differ(self, file: Path, expected: str, found: str, tensor: str | None = None) -> None:
        """Note a difference; it becomes one line."""
        where = f"{file}: " if tensor is None else f"{file}: tensor {tensor!r}: "
        line = f"{where}expected {expected}, found {found}"
        self.differences.append(
            {"file": str(file), "tensor": tensor, "expected": expected, "found": found, "message": line}
        )

    def differing(self, file: Path) -> bool:
        """Tell whether a difference of this file was noted."""
        return any(d["file"] == str(file) for d in self.differences)

    def result(self, inputs: dict[str, str] | None) -> Verification:
        """Return the object that is printed."""
        result: Verification = {
            "schema": SCHEMA,
            "output": str(self.output),
            "kind": self.kind,
            "verified": not self.differences,
            "totals": {
                "files": self.files,
                "bytes": self.nbytes,
                "matrices": self.matrices,
                "recomputed": len(self.recomputed),
                "not_recomputed": len(self.not_recomputed),
                "tensors": self.tensors,
                "compared": self.compared,
                "not_compared": self.matrices - len(self.recomputed) + self.tensors - self.compared,
                "differences": len(self.differences),
            },
            "recomputed": self.recomputed,
            "not_recomputed": self.not_recomputed,
            "not_compared": self.not_compared,
            "differences": self.differences,
        }
        if inputs is not None:
            result["inputs"] = inputs
        return result
