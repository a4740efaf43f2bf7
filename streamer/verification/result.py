"""Define the result of a verification: the object of `streamer verify --json`, schema ``streamer.verification/1``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple, NotRequired, TypedDict

from streamer.json_types import Amount, Count

SCHEMA: Final = "streamer.verification/1"
RECORD_NAME = "streamer.json"
"""Name of an output's record, in its directory."""


class NotRecomputed(Exception):  # a reason, not an error
    """Reason why a matrix is not recomputed: a kind, size or encoding that no plain formula here covers."""


# fmt: off
class DifferenceRecord(TypedDict):
    """A difference."""
    file: Annotated[str, "Path of the file that differs, or that states something else."]
    tensor: Annotated[str | None, "The tensor that it is about, or null."]
    expected: Annotated[str, "What the record, the index, the other file or the inputs state."]
    found: Annotated[str, "What was found."]
    message: Annotated[str, "The line on stderr: file, tensor, expected and found."]

class RecomputedRecord(TypedDict):
    """A matrix that was recomputed."""
    tensor: Annotated[str, "Name of the tensor in the base."]
    error: Annotated[Amount, "The largest error found, as a share of what rounding permits: at most 1 if nothing differs."]
    decisions: Annotated[bool, "Whether its similarities were recomputed too, with a full SVD (if its short side is at most 2048)."]

class SkippedRecord(TypedDict):
    """A matrix that was not recomputed, or a tensor or file that was not compared."""
    tensor: Annotated[str, "Its name; for a matrix, the name of the tensor in the base, followed by [N] in a stack of experts."]
    reason: Annotated[str, "Why not."]

class TotalsRecord(TypedDict):
    """Counts."""
    files: Annotated[Count, "Files that the record lists; 1 for findings."]
    bytes: Annotated[Count, "Bytes of the files that were hashed."]
    matrices: Annotated[Count, "Matrices that the record or the findings list."]
    recomputed: Annotated[Count, "Matrices that were recomputed."]
    not_recomputed: Annotated[Count, "Matrices that were tried but cannot be recomputed."]
    tensors: Annotated[Count, "Other tensors of the output, and tensors of the base that it lacks; 0 for findings or without inputs."]
    compared: Annotated[Count, "Of `tensors`, those compared with the inputs, byte by byte or within a rounding; 0 without --sample all."]
    not_compared: Annotated[Count, "Matrices that were not recomputed, and other tensors that were not compared."]
    differences: Annotated[Count, "Differences."]

class _Inputs(TypedDict):
    base: Annotated[str, "The base."]
    adapter: Annotated[str, "The adapter."]

class Verification(TypedDict):
    """What `streamer verify --json` prints, whether anything differs (exit code 7) or not."""
    schema: Literal["streamer.verification/1"]
    output: Annotated[str, "Path of the output, as given."]
    kind: Annotated[Literal["model", "adapter", "findings"], "What it is: a merged model, a mitigated adapter, or findings."]
    verified: Annotated[bool, "Whether nothing differs."]
    inputs: NotRequired[Annotated[_Inputs, "Paths of base and adapter, as given; absent without them."]]
    totals: Annotated[TotalsRecord, "Counts."]
    recomputed: Annotated[list[RecomputedRecord], "The matrices that were recomputed, with those that differ."]
    not_recomputed: Annotated[list[SkippedRecord], "The matrices of the sample that were not recomputed; only their digests are verified."]
    not_compared: Annotated[list[SkippedRecord], "Other tensors, and files from neither input, that --sample all could not compare."]
    differences: Annotated[list[DifferenceRecord], "The differences, each listed once."]
# fmt: on


class Checked(NamedTuple):
    """Result of a recomputation: the largest error in units of its tolerance, and whether decisions were recomputed too."""

    error: float
    decisions: bool


@dataclass
class Outcome:
    """Differences and recomputed matrices of one output, collected during verification."""

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
        """Note a difference, which becomes one line."""
        where = f"{file}: " if tensor is None else f"{file}: tensor {tensor!r}: "
        line = f"{where}expected {expected}, found {found}"
        self.differences.append(
            {"file": str(file), "tensor": tensor, "expected": expected, "found": found, "message": line}
        )

    def misrecorded(self, expected: str, found: str, tensor: str | None = None) -> None:
        """Note a difference in the output's record."""
        self.differ(self.output / RECORD_NAME, expected, found, tensor)

    def differing(self, file: Path) -> bool:
        """Test whether a difference of this file was noted."""
        return any(d["file"] == str(file) for d in self.differences)

    def result(self, inputs: _Inputs | None) -> Verification:
        """Return the object to print."""
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
