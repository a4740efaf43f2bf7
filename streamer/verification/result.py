"""Define the result of a verification: the object of `streamer verify --json`, schema ``streamer.verification/1``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final, Literal, NotRequired, TypedDict

from streamer.json_types import Amount, Count

SCHEMA: Final = "streamer.verification/1"
RECORD_NAME = "streamer.json"
"""Name of an output's record, in its directory."""


class NotRecomputed(Exception):  # a reason, not an error
    """Reason why a matrix is not recomputed or a tensor not compared: a kind, size or encoding that no formula here covers."""


# fmt: off
class DifferenceRecord(TypedDict):
    """A difference."""
    file: Annotated[str, "Path of the file that differs, or that states something else."]
    tensor: Annotated[str | None, "The tensor that it is about, or null."]
    expected: Annotated[str, "What the record or the inputs state."]
    found: Annotated[str, "What was found."]
    message: Annotated[str, "The line on stderr: file, tensor, expected and found."]

class RecomputedRecord(TypedDict):
    """A matrix that was recomputed."""
    tensor: Annotated[str, "Name of the tensor in the base."]
    error: Annotated[Amount, "The largest error found, as a share of what rounding permits: at most 1 if nothing differs."]

class SkippedRecord(TypedDict):
    """A matrix that was not recomputed, or a tensor that was not compared."""
    tensor: Annotated[str, "Its name; for a matrix, the name of the tensor in the base, followed by [N] in a stack of experts."]
    reason: Annotated[str, "Why not."]

class TotalsRecord(TypedDict):
    """Counts."""
    files: Annotated[Count, "Files that were compared with their digests; 1 for findings."]
    bytes: Annotated[Count, "Their bytes."]
    matrices: Annotated[Count, "Matrices that the record or the findings list."]
    recomputed: Annotated[Count, "Matrices that were recomputed."]
    not_recomputed: Annotated[Count, "Matrices that were tried but cannot be recomputed."]
    tensors: Annotated[Count, "Other tensors of the output, and tensors of the inputs that it lacks; 0 for findings or without inputs."]
    compared: Annotated[Count, "Of `tensors`, those compared with the inputs, byte by byte or within a rounding; 0 without --sample all."]
    not_compared: Annotated[Count, "Matrices that were not recomputed, and other tensors that were not compared."]
    differences: Annotated[Count, "Differences."]

class _Inputs(TypedDict):
    base: Annotated[str, "The base."]
    adapter: Annotated[str, "The adapter."]

class Verification(TypedDict):
    """What `streamer verify --json` prints, whether it is verified or not (exit code 7)."""
    schema: Literal["streamer.verification/1"]
    output: Annotated[str, "Path of the output, as given."]
    kind: Annotated[Literal["model", "adapter", "findings"], "What it is: a merged model, a mitigated adapter, or findings."]
    verified: Annotated[bool, "Whether nothing differs, and everything that was asked for was recomputed and compared."]
    inputs: NotRequired[Annotated[_Inputs, "Paths of base and adapter, as given; absent without them."]]
    totals: Annotated[TotalsRecord, "Counts."]
    recomputed: Annotated[list[RecomputedRecord], "The matrices that were recomputed, with those that differ."]
    not_recomputed: Annotated[list[SkippedRecord], "The matrices that were tried but cannot be recomputed."]
    not_compared: Annotated[list[SkippedRecord], "Other tensors that --sample all could not compare."]
    differences: Annotated[list[DifferenceRecord], "The differences, each listed once."]
# fmt: on


@dataclass
class Outcome:
    """Differences and recomputed matrices of one output, and what could not be recomputed or compared though it was asked for."""

    output: Path
    kind: Literal["model", "adapter", "findings"]
    files: int = 0
    nbytes: int = 0
    matrices: int = 0
    tensors: int = 0
    compared: int = 0
    unmet: str = ""
    recomputed: list[RecomputedRecord] = field(default_factory=list)
    not_recomputed: list[SkippedRecord] = field(default_factory=list)
    not_compared: list[SkippedRecord] = field(default_factory=list)
    differences: list[DifferenceRecord] = field(default_factory=list)

    def differ(self, file: Path, expected: str, found: str, tensor: str | None = None) -> None:
        """Note a difference, which becomes one line."""
        line = f"{file}: {'' if tensor is None else f'tensor {tensor!r}: '}expected {expected}, found {found}"
        told = DifferenceRecord(file=str(file), tensor=tensor, expected=expected, found=found, message=line)
        self.differences.append(told)

    def result(self, inputs: _Inputs | None) -> Verification:
        """Return the object to print."""
        totals: TotalsRecord = {
            "files": self.files, "bytes": self.nbytes, "matrices": self.matrices, "recomputed": len(self.recomputed),
            "not_recomputed": len(self.not_recomputed), "tensors": self.tensors, "compared": self.compared,
            "not_compared": self.matrices - len(self.recomputed) + self.tensors - self.compared, "differences": len(self.differences),
        }  # fmt: skip
        result: Verification = {
            "schema": SCHEMA, "output": str(self.output), "kind": self.kind, "verified": not (self.differences or self.unmet),
            "totals": totals, "recomputed": self.recomputed, "not_recomputed": self.not_recomputed,
            "not_compared": self.not_compared, "differences": self.differences,
        }  # fmt: skip
        return result if inputs is None else {**result, "inputs": inputs}
