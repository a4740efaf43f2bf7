"""Describe the work of a detection, independent of who does it: a list of matrices, with everything that determines the findings."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass

from streamer.detection.matrix_finding import MatrixFinding
from streamer.detection.options import DetectionOptions
from streamer.plan.batch import AdapterBatch, Assignment, SharedGroup

Begin = Callable[[Assignment], None]
"""Called before each matrix."""

Found = Generator[tuple[Assignment, MatrixFinding], None, None]
"""Findings as they are made; closing the generator stops the work."""


@dataclass(frozen=True)
class Work:
    """Matrices in which to detect.

    Attributes
    ----------
    groups
        The matrices; there may be fewer than in the batch.
    threads
        Torch's threads for each plan, on which the last bits of findings depend.
    resident
        Bytes in memory between two steps; see `resident_bytes`.
    """

    batch: AdapterBatch
    groups: Sequence[SharedGroup]
    options: DetectionOptions
    threads: Sequence[int]
    resident: int

    def cost(self, assignments: Iterable[Assignment]) -> int:
        """Estimate the units of work for some matrices."""
        return sum(self.options.cost(one.target.module.shape) for one in assignments)
