"""Say where the findings of a job come from: given ones, a file that the run makes first, or detection as each tensor is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch

from streamer.detection.findings import Findings
from streamer.detection.intruders import Detection
from streamer.detection.matrix_finding import MatrixFinding
from streamer.detection.options import DetectionOptions
from streamer.detection.run import detect_matrix
from streamer.events import Monitor
from streamer.linalg.torch_state import threads
from streamer.plan.plan import Plan
from streamer.plan.targets import Target


@dataclass(frozen=True)
class GivenFindings:
    """Findings that are at hand; `given` tells them from those that the job detects itself."""

    findings: Findings
    given: ClassVar[bool] = True

    @property
    def options(self) -> DetectionOptions:
        """The options that they were made with."""
        return self.findings.options

    @property
    def bits(self) -> str:
        """A digest of their last bits, which depend on the threads that they were made on."""
        return self.findings.digest()

    @property
    def nbytes(self) -> int:
        """Bytes of their factors, which a run reads."""
        return sum(f.nbytes for m in self.findings for f in (m.detection.U, m.detection.S, m.detection.Vh))

    @cached_property
    def _by_tensor(self) -> dict[str, MatrixFinding]:
        return self.findings.by_tensor

    def detection(self, target: Target) -> Detection:
        """Look one matrix up."""
        return self._by_tensor[target.tensor].detection

    def most_intruders(self, target: Target) -> int:
        """Count its intruders; of findings yet to be made, as many as there may be."""
        return len(self.detection(target).intruders)

    def certified(self, targets: Sequence[Target]) -> int:
        """Count the matrices with certified decisions; of findings yet to be made, as many as there may be."""
        return sum(self.detection(target).certified for target in targets)

    def decisions(self) -> Any:
        """Say as JSON what decides the intruders, besides base and adapter."""
        return self.findings.decisions_digest()


@dataclass(frozen=True)
class OwnFile:
    """Findings that the run makes before it writes what needs them, into a file of its own; `GivenFindings` take this one's place then."""

    options: DetectionOptions
    given: ClassVar[bool] = False
    bits: ClassVar[str] = ""
    nbytes: ClassVar[int] = 0

    def detection(self, target: Target) -> Detection:
        """Raise, the file being yet to be made."""
        raise LookupError(f"findings on {target.tensor!r} are yet to be made; please report this")

    def most_intruders(self, target: Target) -> int:
        """Count all directions that are judged."""
        return self.options.directions(target.module.shape)

    def certified(self, targets: Sequence[Target]) -> int:
        """Count all matrices."""
        return len(targets)

    def decisions(self) -> Any:
        """Return the options."""
        return self.options.as_dict()


@dataclass(frozen=True)
class DetectedOnTheWay(OwnFile):
    """Findings that are made one matrix at a time, as its tensors are.

    Attributes
    ----------
    resident
        Bytes that stay in memory between two steps; see `resident_bytes`.
    threads
        Torch's threads for detection amid the merging of rows, which has one: its last bits depend on them.
    monitor
        Told of what happens in it.
    last
        The findings on the last matrix: its quantized values and their scales are made one after the other.
    """

    plan: Plan
    device: torch.device
    resident: int
    monitor: Monitor
    threads: int = field(default_factory=torch.get_num_threads)
    last: dict[str, Detection] = field(default_factory=dict)

    def detection(self, target: Target) -> Detection:
        """Detect in one matrix, if it is another than the last."""
        if target.tensor not in self.last:
            with threads(self.threads):
                found = detect_matrix(self.plan, target, self.options, self.device, self.resident, monitor=self.monitor)
            self.last.clear()
            self.last[target.tensor] = found.detection
        return self.last[target.tensor]


FindingsSource = GivenFindings | OwnFile
"""Where the findings of a job come from; `DetectedOnTheWay` is an `OwnFile` that writes none."""
