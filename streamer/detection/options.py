"""Define the options of detection, and the JSON types and the stamp that state them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Annotated, Any, TypedDict, cast

from streamer import __version__
from streamer.detection.solvers import SOLVERS, cost
from streamer.errors import UsageError
from streamer.json_types import Count, Keywords
from streamer.plan.side_files import NameSource, in_short

# fmt: off
PerDirection = Annotated[tuple[float, ...], "For each judged direction, by falling singular value:"]
RANKS = "0-based ranks of singular directions of base + delta, 0 for the largest (tables count from 1):"

class DecidingOptions(TypedDict):
    """Options that decide which directions are intruders."""
    top_k: Annotated[float, Keywords(exclusiveMinimum=0), "Leading directions to judge: a number (integer), or a share of the short side."]
    threshold_epsilon: Annotated[float, Keywords(exclusiveMinimum=0, maximum=1), "Intruders are less similar to the base than this."]
    solver: Annotated[str, Keywords(enum=["auto", "certified", "dense"]), "The solver that was requested."]

class OptionsRecord(DecidingOptions):
    """Options that decided the findings; see `DetectionOptions`."""
    max_memory: Annotated[Count | None, "Limit on anonymous memory in bytes, or null."]
# fmt: on


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
        if isinstance(k, bool) or not (
            (isinstance(k, int) and k >= 1) or (isinstance(k, float) and 0 < k <= 1)
        ):
            raise UsageError(
                f"top_k: expected a count from 1, or a share in (0, 1] with a decimal point, found {k!r}"
            )
        epsilon = self.threshold_epsilon
        if isinstance(epsilon, bool) or not isinstance(epsilon, Real) or not 0 < epsilon <= 1:
            raise UsageError(f"threshold_epsilon: expected a number in (0, 1], found {epsilon!r}")
        if self.solver not in ("auto", *SOLVERS):
            raise UsageError(
                f"solver: expected one of auto, {', '.join(SOLVERS)}, found {self.solver!r}"
            )
        memory = self.max_memory
        if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int)):
            raise UsageError(f"max_memory: expected a whole number of bytes, found {memory!r}")

    def directions(self, shape: tuple[int, int]) -> int:
        """Return the number of directions to judge in a matrix of this shape: at least one, at most min(m, n)."""
        p = min(shape)
        k = self.top_k if isinstance(self.top_k, int) else max(1, round(self.top_k * p))
        return min(k, p)

    def cost(self, shape: tuple[int, int]) -> int:
        """Estimate the units of work for detection in a matrix of this shape; see `detection.solvers.cost`."""
        return cost(shape, self.directions(shape), self.solver)

    def as_dict(self) -> OptionsRecord:
        """Return the options as JSON values."""
        return cast(OptionsRecord, asdict(self))


STAMP = "streamer"
"""Metadata key of the stamp."""


class DetectionRecord(DecidingOptions):
    """How an output's intruders were found."""

    certified: Annotated[Count, "Matrices with certified decisions only."]
    matrices: Annotated[Count, "Number of matrices."]


def detection_record(options: DetectionOptions, certified: int, matrices: int) -> DetectionRecord:
    """Record how an output's intruders were found."""
    decided = DecidingOptions(
        top_k=options.top_k, threshold_epsilon=options.threshold_epsilon, solver=options.solver
    )
    return {**decided, "certified": certified, "matrices": matrices}


def stamp(
    command: str,
    base: NameSource,
    adapter: NameSource,
    detection: DetectionRecord | None = None,
    mitigation: Mapping[str, Any] | None = None,
) -> str:
    """Make a file's stamp as JSON."""
    inputs = {"base": in_short(base), "adapter": in_short(adapter)}
    tree = {
        "version": __version__,
        "command": command,
        **inputs,
        **(mitigation or {}),
        "detection": detection,
    }
    return json.dumps(tree, ensure_ascii=False)
