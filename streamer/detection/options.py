"""Define the options of detection, which determine the findings, and the options of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING

import torch

from streamer.adapters.adapter_config import NOTHING_STATED, Stated
from streamer.detection.cost import cost
from streamer.detection.findings_records import OptionsRecord
from streamer.detection.solvers import SOLVERS
from streamer.errors import UsageError
from streamer.events import Monitor
from streamer.linalg.allocation import CPU
from streamer.storage.tensor_file import IOMode

if TYPE_CHECKING:
    from streamer.workers.engine import Workers


@dataclass(frozen=True)
class DetectionOptions:
    """Options that determine the findings.

    Attributes
    ----------
    top_k
        Number of leading directions to judge: a count, or a share of min(m, n) as a float in (0, 1].
    threshold_epsilon
        A direction is an intruder if its similarity is below this; in (0, 1].
    solver
        ``auto`` or the name of a solver.
    max_memory
        Bytes of anonymous memory for Python, torch and streamer, or None. If a matrix does not fit in the computing dtype, products use
        it as stored. If there is no memory for the dense solver, directions that bounds cannot settle stay open: `certified` is then
        false, and only proven intruders count as intruders.
    """

    top_k: int | float = 10
    threshold_epsilon: float = 0.5
    solver: str = "auto"
    max_memory: int | None = None

    def __post_init__(self) -> None:
        k = self.top_k
        good = not isinstance(k, bool) and ((isinstance(k, int) and k >= 1) or (isinstance(k, float) and 0 < k <= 1))
        if not good:
            raise UsageError(f"top_k: expected a count from 1, or a share in (0, 1] with a decimal point, found {k!r}")
        epsilon = self.threshold_epsilon
        if isinstance(epsilon, bool) or not isinstance(epsilon, Real) or not 0 < epsilon <= 1:
            raise UsageError(f"threshold_epsilon: expected a number in (0, 1], found {epsilon!r}")
        if self.solver not in ("auto", *SOLVERS):
            raise UsageError(f"solver: expected one of auto, {', '.join(SOLVERS)}, found {self.solver!r}")
        memory = self.max_memory
        if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int)):
            raise UsageError(f"max_memory: expected a whole number of bytes, found {memory!r}")

    def directions(self, shape: tuple[int, int]) -> int:
        """Return the number of directions to judge in a matrix of this shape: at least one, at most min(m, n)."""
        p = min(shape)
        k = self.top_k if isinstance(self.top_k, int) else max(1, round(self.top_k * p))
        return min(k, p)

    def cost(self, shape: tuple[int, int]) -> int:
        """Estimate the units of work for detection in a matrix of this shape; see `detection.cost.cost`."""
        return cost(shape, self.directions(shape), self.solver)

    def as_dict(self) -> OptionsRecord:
        """Return the options as JSON values."""
        return {"top_k": self.top_k, "threshold_epsilon": self.threshold_epsilon, "solver": self.solver,
                "max_memory": self.max_memory}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """How a run computes: nothing of it changes the result, except last bits; the allowed memory does, and is in `DetectionOptions`.

    Most are keywords of `api.detect_intruder_dimensions`, which explains them. Detection computes on `device`; models run on
    `model_device`; `monitor` watches the run, and `workers`, if any, compute instead of this process.
    """

    device: torch.device
    io: IOMode = "mmap"
    stated: Stated = NOTHING_STATED
    architecture: str | None = None
    resume: bool = True
    overwrite: bool = False
    model_device: torch.device = CPU
    monitor: Monitor = field(default_factory=Monitor)
    workers: Workers | None = None
