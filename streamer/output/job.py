"""Describe one mitigation of an adapter's deltas: the plan, the options, and the findings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from streamer.adapters.rules import mitigated_before
from streamer.detection.findings import Findings
from streamer.detection.findings_size import FindingsSize, findings_bytes
from streamer.detection.intruders import Detection
from streamer.detection.options import DetectionOptions
from streamer.detection.stamps import STAMP, DetectionRecord, detection_record, stamp
from streamer.errors import NumericError
from streamer.linalg.operators import Delta, all_finite
from streamer.methods import Method
from streamer.output.records import SCHEMA
from streamer.plan.memory_estimate import factor_bytes
from streamer.plan.plan import Plan
from streamer.plan.targets import Target

THIN = 48
"""Bytes for each row, column and rank of a mitigated delta: its factors in float64, the factors of its inputs, and their thin QRs."""

PROJECTED = 80
"""Bytes if it is also projected onto a rank."""


@dataclass(frozen=True)
class Job:
    """One mitigation, ready to run.

    Attributes
    ----------
    detection
        Options for detection if no findings are given, and the allowed memory of the run.
    findings
        Findings; None if the run makes them first, in its own file. Used only if the method needs them.
    dequantize
        Whether a merged model of a quantized base is written as a plain one.
    card
        Whether the output's ``README.md`` describes how it was made.
    measured
        Measurements, one line each, for the record and the card.
    detect
        Makes the findings of one matrix if they are made together with its tensors, and no file of them.
    """

    plan: Plan
    method: Method
    detection: DetectionOptions
    device: torch.device
    findings: Findings | None = None
    dequantize: bool = False
    card: bool = True
    measured: tuple[str, ...] = ()
    detect: Callable[[Target], Detection] | None = None

    @cached_property
    def findings_size(self) -> FindingsSize:
        """Compute the size of the findings that the job makes; see `findings_bytes`."""
        return findings_bytes(self.plan, self.detection)

    @property
    def detects(self) -> bool:
        """Test whether the job makes its own findings."""
        return self.method.needs_detection and self.findings is None

    @property
    def warnings(self) -> list[str]:
        """Warn of an adapter whose intruders were already scaled."""
        if self.method.mitigation_lambda == 1:
            return []
        return mitigated_before(self.plan.adapter.files[0].header.metadata)

    def intruders(self, target: Target) -> int:
        """Return the largest number of directions that Δ' adds."""
        if self.detects:
            return self.detection.directions(target.module.shape)
        return len(self._found(target).intruders) if self.method.needs_detection else 0

    def mitigation_bytes(self, target: Target, projected: bool = False) -> int:
        """Estimate the memory for Δ, Δ' and the norms of one matrix, in addition to resident memory.

        Parameters
        ----------
        projected
            Whether Δ' is projected onto the adapter's rank.
        """
        module, itemsize = target.module, self.plan.weights[target.tensor].compute.itemsize
        m, n = module.shape
        if module.low_rank:
            size = (PROJECTED if projected else THIN) * (m + n) * (module.factor_rank + self.intruders(target))
        else:
            # Δ, Δ', and one more if Δ is scaled.
            size = max(module.peak_bytes(itemsize), 3 * itemsize * m * n)
        return size + factor_bytes(self.plan, target, itemsize)

    def mitigated(self, target: Target) -> tuple[Delta, Delta, Detection | None]:
        """Return Δ, Δ' and the findings of one matrix: Δ twice if nothing changes, None if no findings are needed."""
        delta = self.plan.finite_delta(target)
        found = self._found(target) if self.method.needs_detection else None
        if found is not None and not (all_finite(found.U) and all_finite(found.Vh)):
            raise NumericError(f"findings: those on {target.tensor!r} hold NaN or Inf; run detect again")
        return delta, self.method.mitigated(delta, found, target.tensor), found

    def _found(self, target: Target) -> Detection:
        if self.detect is not None:
            return self.detect(target)
        assert self.findings is not None, "the findings are yet to be made"
        return self.findings.by_tensor[target.tensor].detection

    def decisions(self) -> dict[str, Any]:
        """Return everything besides the inputs that determines the output's bytes, except last bits of given findings."""
        detection = self.detection.as_dict() if self.findings is None else self.findings.decisions_digest()
        return {"schema": SCHEMA, "mitigation": self.method.as_dict(),
                "detection": detection if self.method.needs_detection else None, "dequantize": self.dequantize, "card": self.card,
                **({"measured": list(self.measured)} if self.measured else {})}  # fmt: skip

    @property
    def bits(self) -> str:
        """Return the digest of the last bits of given findings, which depend on the number of threads, if the output's bytes need them."""
        return self.findings.digest() if self.findings is not None and self.method.needs_detection else ""

    def detection_record(self, certified: int) -> DetectionRecord | None:
        """Return how intruders are found; None if the method does not need them."""
        if not self.method.needs_detection:
            return None
        options = self.detection if self.findings is None else self.findings.options
        return detection_record(options, certified, len(self.plan.targets))

    def stamp(self, command: str, written: Sequence[Target] | None = None) -> dict[str, str]:
        """Return the stamp for the metadata of the output's files, or the longest possible one before the findings exist.

        `written` are the matrices in the output; by default all.
        """
        targets = self.plan.targets if written is None else written
        needed = self.method.needs_detection
        certified = sum(self.findings is None or self._found(t).certified for t in targets) if needed else 0
        return {STAMP: stamp(command, *self.plan.sources, self.detection_record(certified), self.method.as_json())}
