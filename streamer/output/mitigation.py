"""Apply a method to the deltas of an adapter, one matrix at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from streamer.adapters.adapter_config import mitigated_before
from streamer.detection.findings import Findings
from streamer.detection.intruders import Detection
from streamer.detection.options import (
    STAMP,
    DetectionOptions,
    DetectionRecord,
    detection_record,
    stamp,
)
from streamer.errors import NumericError
from streamer.linalg.operators import Delta, all_finite
from streamer.methods import Method
from streamer.output.record import MitigatedMatrix
from streamer.plan.plan import Plan, factor_bytes
from streamer.plan.targets import Target

THIN = 48
"""Bytes for each row, column and rank of a mitigated delta: its factors in float64, the factors of its inputs, and their thin QRs."""

PROJECTED = 80
"""Bytes if it is also projected onto a rank."""


@dataclass(frozen=True)
class Mitigated:
    """Δ and Δ' of one matrix; Δ' is Δ itself if nothing changes.

    Attributes
    ----------
    intruders
        Ranks of the intruders that are scaled.
    certified
        Whether the decisions on them are certified; None if none were needed.
    """

    target: Target
    delta: Delta
    after: Delta
    intruders: Sequence[int] = ()
    certified: bool | None = None

    def metrics(self, written: Delta | None = None, dropped: float = 0.0) -> MitigatedMatrix:
        """Measure the mitigation.

        Parameters
        ----------
        written
            What is written in place of Δ'; None if it is Δ' itself.
        dropped
            Share of the norm of Δ' that is not written.
        """
        written = self.after if written is None else written
        norm = self.delta.norm()
        return {
            "tensor": self.target.tensor,
            "module": self.target.module.name,
            "transposed": self.target.transposed,
            "intruders": list(self.intruders),
            "certified": self.certified,
            "delta_norm": norm,
            "delta_norm_after": norm if written is self.delta else written.norm(),
            "dropped": dropped,
        }


@dataclass(frozen=True)
class Mitigation:
    """A method with all that it needs to be applied to the matrices of an adapter.

    Attributes
    ----------
    detection
        Options for detection if no findings are given, and the allowed memory of the run.
    device
        Where detection computes.
    findings
        Findings; None if the run makes them first. Used only if the method needs them.
    detect
        Makes the findings of one matrix if they are made together with its tensors, and no file of them.
    """

    plan: Plan
    method: Method
    detection: DetectionOptions
    device: torch.device
    findings: Findings | None = None
    detect: Callable[[Target], Detection] | None = None

    @property
    def detects(self) -> bool:
        """Test whether the findings must be made first."""
        return self.method.needs_detection and self.findings is None

    @property
    def made_before(self) -> list[str]:
        """Say how streamer made the adapter, if it mitigated it; see `mitigated_before`."""
        return mitigated_before(self.plan.adapter.files[0].header.metadata)

    @property
    def warnings(self) -> list[str]:
        """Warn of an adapter whose intruders were already scaled."""
        return [] if self.method.mitigation_lambda == 1 else self.made_before

    def of(self, target: Target) -> Mitigated:
        """Mitigate the delta of one matrix.

        Raises
        ------
        NumericError
            If the delta or the findings hold NaN or Inf.
        """
        delta = self.plan.finite_delta(target)
        if not self.method.needs_detection:
            return Mitigated(target, delta, self.method.mitigated(delta, None, target.tensor))
        detection = self._detection_of(target)
        if not (all_finite(detection.U) and all_finite(detection.Vh)):
            raise NumericError(
                f"findings: those on {target.tensor!r} hold NaN or Inf; run detect again"
            )
        after = self.method.mitigated(delta, detection, target.tensor)
        ranks = detection.intruders
        scaled = ranks if self.method.select == "all" else ranks[:1]
        return Mitigated(target, delta, after, scaled, detection.certified)

    def added_directions(self, target: Target) -> int:
        """Return the largest number of directions that Δ' adds to Δ."""
        if self.detects:
            return self.detection.directions(target.module.shape)
        return len(self._detection_of(target).intruders) if self.method.needs_detection else 0

    def memory(self, target: Target, projected: bool = False) -> int:
        """Estimate the memory for Δ, Δ' and the norms of one matrix, in addition to resident memory.

        Parameters
        ----------
        projected
            Whether Δ' is projected onto the adapter's rank.
        """
        module = target.module
        itemsize = self.plan.weights[target.tensor].compute.itemsize
        m, n = module.shape
        if module.low_rank:
            rank = module.factor_rank + self.added_directions(target)
            size = (PROJECTED if projected else THIN) * (m + n) * rank
        else:
            # Δ, Δ', and one more if Δ is scaled.
            size = max(module.peak_bytes(itemsize), 3 * itemsize * m * n)
        return size + factor_bytes(self.plan, target, itemsize)

    def _detection_of(self, target: Target) -> Detection:
        if self.detect is not None:
            return self.detect(target)
        assert self.findings is not None, "the findings are yet to be made"
        return self.findings.by_tensor[target.tensor].detection

    def decisions(self) -> dict[str, Any]:
        """Return what determines the mitigated deltas besides the inputs, except last bits of given findings."""
        given = self.findings
        detection = self.detection.as_dict() if given is None else given.decisions_digest()
        return {
            "mitigation": self.method.as_dict(),
            "detection": detection if self.method.needs_detection else None,
        }

    @property
    def bits(self) -> str:
        """Return the digest of the last bits of given findings, which depend on the number of threads, if the output's bytes need them."""
        if self.findings is None or not self.method.needs_detection:
            return ""
        return self.findings.digest()

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
        certified = 0
        if self.method.needs_detection and self.findings is None:
            certified = len(targets)
        elif self.method.needs_detection:
            certified = sum(self._detection_of(target).certified for target in targets)
        found = self.detection_record(certified)
        return {STAMP: stamp(command, *self.plan.sources, found, self.method.as_json())}
