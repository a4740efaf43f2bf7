"""One mitigation of an adapter's deltas: the plan, the options, and where the findings come from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from streamer.detection.findings_size import FindingsSize, findings_bytes
from streamer.detection.intruders import Detection
from streamer.detection.options import DetectionOptions
from streamer.detection.stamps import STAMP, DetectionRecord, detection_record, stamp
from streamer.errors import NumericError
from streamer.linalg import deltas
from streamer.linalg.deltas import Delta
from streamer.linalg.operators import all_finite
from streamer.output.findings_source import FindingsSource
from streamer.output.mitigation import MitigationOptions, mitigate
from streamer.output.records import SCHEMA
from streamer.plan.plan import Plan
from streamer.plan.provenance import mitigated_before
from streamer.plan.targets import Target


@dataclass(frozen=True)
class Job:
    """One mitigation, ready to run.

    Attributes
    ----------
    detection
        How findings are made that are not given, and the memory that the run may take.
    findings
        Where the findings come from; asked only where the options need any.
    dequantize
        Whether a merged model is written plain where the base is quantized.
    card
        Whether the output's ``README.md`` says how it was made.
    """

    plan: Plan
    options: MitigationOptions
    detection: DetectionOptions
    device: torch.device
    findings: FindingsSource
    dequantize: bool = False
    card: bool = True

    @cached_property
    def findings_size(self) -> FindingsSize:
        """See `findings_bytes`; of the findings that the job makes."""
        return findings_bytes(self.plan, self.detection)

    @property
    def detects(self) -> bool:
        """Whether the job makes findings of its own."""
        return self.options.needs_detection and not self.findings.given

    @property
    def warnings(self) -> list[str]:
        """Warnings about the mitigation: of an adapter whose intruders were scaled before."""
        if self.options.mitigation_lambda == 1:
            return []
        return mitigated_before(self.plan.adapter.files[0].header.metadata)

    def intruders(self, target: Target) -> int:
        """Count the directions that Δ' takes up, at most."""
        return self.findings.most_intruders(target) if self.options.needs_detection else 0

    def mitigated(self, target: Target) -> tuple[Delta, Delta, Detection | None]:
        """Return Δ, Δ' and the findings of one matrix: Δ itself twice where nothing changes, no findings where none are needed."""
        delta = self.plan.delta(target)
        for what, pieces in deltas.named_parts(delta):
            if not all(map(all_finite, pieces)):
                raise NumericError(
                    f"{self.plan.adapter.file.path}: {what} of module {target.module.name!r} holds NaN or Inf; check the adapter"
                )
        found = self.findings.detection(target) if self.options.needs_detection else None
        if found is not None and not (all_finite(found.U) and all_finite(found.Vh)):
            raise NumericError(f"findings: those on {target.tensor!r} hold NaN or Inf; run detect again")
        return delta, mitigate(delta, found, self.options), found

    def decisions(self) -> dict[str, Any]:
        """Return everything besides the inputs that decides the output's bytes, but for the last bits of given findings."""
        return {
            "schema": SCHEMA,
            "mitigation": self.options.as_dict(),
            "detection": self.findings.decisions() if self.options.needs_detection else None,
            "dequantize": self.dequantize,
            "card": self.card,
        }

    @property
    def bits(self) -> str:
        """The last bits that the output's are made of; see `FindingsSource.bits`."""
        return self.findings.bits if self.options.needs_detection else ""

    def detection_record(self, certified: int) -> DetectionRecord | None:
        """Return how intruders are found; None where that does not matter."""
        if not self.options.needs_detection:
            return None
        return detection_record(self.findings.options, certified, len(self.plan.targets))

    def stamp(self, command: str) -> dict[str, str]:
        """Return what the metadata of the output's files says; before the findings are there, at its longest."""
        certified = self.findings.certified(self.plan.targets) if self.options.needs_detection else 0
        return {STAMP: stamp(command, *self.plan.sources, self.detection_record(certified), self.options.as_json())}
