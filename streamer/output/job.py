"""Describe one mitigation of an adapter's deltas: the plan, the options, and the source of the findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch

from streamer.adapters.rules import mitigated_before
from streamer.detection.findings import Findings
from streamer.detection.findings_size import FindingsSize, findings_bytes
from streamer.detection.intruders import Detection
from streamer.detection.matrices import detect_matrix
from streamer.detection.options import DetectionOptions
from streamer.detection.stamps import STAMP, DetectionRecord, detection_record, stamp
from streamer.errors import NumericError
from streamer.events import Monitor
from streamer.linalg.operators import Delta, all_finite
from streamer.linalg.torch_state import threads
from streamer.methods import Method
from streamer.output.records import SCHEMA
from streamer.plan.plan import Plan
from streamer.plan.targets import Target


@dataclass(frozen=True)
class GivenFindings:
    """Existing findings; `given` distinguishes them from findings that the job detects itself."""

    findings: Findings
    given: ClassVar[bool] = True

    @property
    def options(self) -> DetectionOptions:
        """Return the options with which they were made."""
        return self.findings.options

    @property
    def bits(self) -> str:
        """Hash their last bits, which depend on the number of threads."""
        return self.findings.digest()

    @property
    def nbytes(self) -> int:
        """Return the number of bytes of their factors, which a run reads."""
        return sum(f.nbytes for m in self.findings for f in (m.detection.U, m.detection.S, m.detection.Vh))

    def detection(self, target: Target) -> Detection:
        """Return the detection for one matrix."""
        return self.findings.by_tensor[target.tensor].detection

    def most_intruders(self, target: Target) -> int:
        """Return the number of its intruders, or an upper bound before the findings exist."""
        return len(self.detection(target).intruders)

    def certified(self, targets: Sequence[Target]) -> int:
        """Return the number of matrices with certified decisions, or an upper bound before the findings exist."""
        return sum(self.detection(target).certified for target in targets)

    def decisions(self) -> Any:
        """Return as JSON what determines the intruders, besides base and adapter."""
        return self.findings.decisions_digest()


@dataclass(frozen=True)
class FindingsToMake:
    """Findings that this run computes first, in its own file, before outputs need them; `GivenFindings` then replace this object."""

    options: DetectionOptions
    given: ClassVar[bool] = False
    bits: ClassVar[str] = ""
    nbytes: ClassVar[int] = 0

    def detection(self, target: Target) -> Detection:
        """Raise, because the file does not exist yet."""
        raise LookupError(f"findings on {target.tensor!r} are yet to be made; please report this")

    def most_intruders(self, target: Target) -> int:
        """Return the number of judged directions."""
        return self.options.directions(target.module.shape)

    def certified(self, targets: Sequence[Target]) -> int:
        """Return the number of matrices."""
        return len(targets)

    def decisions(self) -> Any:
        """Return the options."""
        return self.options.as_dict()


@dataclass(frozen=True)
class DetectedOnTheWay(FindingsToMake):
    """Findings that are made one matrix at a time, together with its tensors.

    Attributes
    ----------
    resident
        Bytes in memory between two steps; see `resident_bytes`.
    threads
        Torch's threads for detection, on which its last bits depend; merging rows in between uses one.
    monitor
        Receives events of the detection.
    last
        Findings for the last matrix: its quantized values and their scales are made one after the other.
    """

    plan: Plan
    device: torch.device
    resident: int
    monitor: Monitor
    threads: int = field(default_factory=torch.get_num_threads)
    last: dict[str, Detection] = field(default_factory=dict)

    def detection(self, target: Target) -> Detection:
        """Detect in one matrix, unless it is the last one again."""
        if target.tensor not in self.last:
            with threads(self.threads):
                found = detect_matrix(self.plan, target, self.options, self.device, self.resident, monitor=self.monitor)
            self.last.clear()
            self.last[target.tensor] = found.detection
        return self.last[target.tensor]


FindingsSource = GivenFindings | FindingsToMake
"""Source of a job's findings; `DetectedOnTheWay` is a `FindingsToMake` that writes none."""


@dataclass(frozen=True)
class Job:
    """One mitigation, ready to run.

    Attributes
    ----------
    detection
        Options for detection if no findings are given, and the allowed memory of the run.
    findings
        Source of the findings; used only if the method needs them.
    dequantize
        Whether a merged model of a quantized base is written as a plain one.
    card
        Whether the output's ``README.md`` describes how it was made.
    measured
        Measurements, one line each, for the record and the card.
    """

    plan: Plan
    method: Method
    detection: DetectionOptions
    device: torch.device
    findings: FindingsSource
    dequantize: bool = False
    card: bool = True
    measured: tuple[str, ...] = ()

    @cached_property
    def findings_size(self) -> FindingsSize:
        """Compute the size of the findings that the job makes; see `findings_bytes`."""
        return findings_bytes(self.plan, self.detection)

    @property
    def detects(self) -> bool:
        """Test whether the job makes its own findings."""
        return self.method.needs_detection and not self.findings.given

    @property
    def warnings(self) -> list[str]:
        """Warn of an adapter whose intruders were already scaled."""
        if self.method.mitigation_lambda == 1:
            return []
        return mitigated_before(self.plan.adapter.files[0].header.metadata)

    def intruders(self, target: Target) -> int:
        """Return the largest number of directions that Δ' adds."""
        return self.findings.most_intruders(target) if self.method.needs_detection else 0

    def mitigated(self, target: Target) -> tuple[Delta, Delta, Detection | None]:
        """Return Δ, Δ' and the findings of one matrix: Δ twice if nothing changes, None if no findings are needed."""
        delta = self.plan.finite_delta(target)
        found = self.findings.detection(target) if self.method.needs_detection else None
        if found is not None and not (all_finite(found.U) and all_finite(found.Vh)):
            raise NumericError(f"findings: those on {target.tensor!r} hold NaN or Inf; run detect again")
        return delta, self.method.mitigated(delta, found, target.tensor), found

    def decisions(self) -> dict[str, Any]:
        """Return everything besides the inputs that determines the output's bytes, except last bits of given findings."""
        return {
            "schema": SCHEMA,
            "mitigation": self.method.as_dict(),
            "detection": self.findings.decisions() if self.method.needs_detection else None,
            "dequantize": self.dequantize,
            "card": self.card,
            **({"measured": list(self.measured)} if self.measured else {}),
        }

    @property
    def bits(self) -> str:
        """Return the digest of the last bits that the output's bytes depend on; see `GivenFindings.bits`."""
        return self.findings.bits if self.method.needs_detection else ""

    def detection_record(self, certified: int) -> DetectionRecord | None:
        """Return how intruders are found; None if the method does not need them."""
        if not self.method.needs_detection:
            return None
        return detection_record(self.findings.options, certified, len(self.plan.targets))

    def stamp(self, command: str, written: Sequence[Target] | None = None) -> dict[str, str]:
        """Return the stamp for the metadata of the output's files, or the longest possible one before the findings exist.

        `written` are the matrices in the output; by default all.
        """
        targets = self.plan.targets if written is None else written
        certified = self.findings.certified(targets) if self.method.needs_detection else 0
        return {STAMP: stamp(command, *self.plan.sources, self.detection_record(certified), self.method.as_json())}
