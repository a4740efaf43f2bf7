"""Say what is to be detected, whoever does it: a list of matrices, with all that decides what is found in them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass

from streamer.detection.matrix_finding import MatrixFinding
from streamer.detection.options import DetectionOptions
from streamer.plan.batch import Assignment, Batch, SharedGroup

Begin = Callable[[Assignment], None]
"""Called before a matrix is begun."""

Found = Generator[tuple[Assignment, MatrixFinding], None, None]
"""Findings as they are made; closing it stops whoever makes them."""


@dataclass(frozen=True)
class Work:
    """Matrices to detect in.

    Attributes
    ----------
    groups
        The matrices; they may be fewer than those of the batch.
    threads
        Torch's threads for each plan, on which the last bits of findings depend.
    resident
        Bytes that stay in memory between two steps; see `resident_bytes`.
    """

    batch: Batch
    groups: Sequence[SharedGroup]
    options: DetectionOptions
    threads: Sequence[int]
    resident: int

    def cost(self, assignments: Iterable[Assignment]) -> int:
        """Estimate the units of work of some matrices."""
        return sum(self.options.cost(one.target.module.shape) for one in assignments)
