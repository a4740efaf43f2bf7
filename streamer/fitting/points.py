"""Provide right factors of all matrices for a weight, from a spool, from other factors, or from the adapter itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamer.linalg.low_rank import LowRank
from streamer.methods import RegMean, Shrink
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.streaming.lazy import BLOCK_BYTES
from streamer.streaming.spool import Spool, Spooled


def factors_of(plan: Plan, target: Target) -> LowRank:
    """Read the factors of a delta and check that they are finite."""
    delta = plan.finite_delta(target)
    assert isinstance(delta, LowRank)
    return delta


def through(plan: Plan, target: Target, Q: Tensor) -> Tensor:
    """Compute ``Wᵀ Q`` (n, r) of a target's weight W and Q (m, r), in float64."""
    weight = plan.weights[target.tensor]
    out = Q.new_zeros(target.module.shape[1], Q.shape[1])
    for i, j, rows in weight.blocks(max(1, BLOCK_BYTES // (8 * weight.matrix[1]))):
        values = rows.to(Q.device).double()
        if target.transposed:
            out[i:j] = values @ Q
        else:
            out.addmm_(values.T, Q[i:j])
    return out


@dataclass(frozen=True)
class Point:
    """Right factors for a weight μ: 0 is the unchanged adapter, infinity is no delta; `corrected` marks results of a correcting pass."""

    weight: float
    factors: Mapping[str, Tensor]
    corrected: bool = False

    @property
    def name(self) -> str:
        """Return the name for the journal and messages; a point without deltas has the name of the shrink to 0."""
        if self.weight == math.inf:
            return Shrink(0.0).label
        return f"{RegMean.name} mu {self.weight!r}{' corrected' if self.corrected else ''}"

    def towards(self, other: Point, t: float) -> Point:
        """Interpolate Δ' linearly; the weight is interpolated too, by its logarithm if both logarithms are finite."""
        if t >= 1 and other.weight == math.inf:
            return other
        if self.weight > 0 and other.weight < math.inf:
            weight = math.exp((1 - t) * math.log(self.weight) + t * math.log(other.weight))
        else:
            weight = t * other.weight if other.weight < math.inf else self.weight / (1 - t)
        a, b = self.factors, other.factors
        return Point(weight, Factors(a, lambda tensor: torch.lerp(a[tensor], b[tensor], t)), other.corrected)


@dataclass(frozen=True)
class Factors(Mapping[str, Tensor]):
    """Right factors by `Target.tensor`, each read or computed on demand."""

    names: Collection[str]
    read: Callable[[str], Tensor]

    def __getitem__(self, tensor: str) -> Tensor:
        return self.read(tensor)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the factors themselves: another process lacks the source from which they are read."""
        return dict, (dict(self),)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def spooled(spool: Spool, places: Mapping[str, Sequence[Spooled]], number: int) -> Factors:
    """Read the factors with an index from a spool that has several for each matrix."""
    return Factors(places, lambda tensor: spool.read(places[tensor][number])[0])


def replaced(made: Factors, rest: Mapping[str, Tensor]) -> Factors:
    """Use new factors as they are made, and `rest` for all other matrices."""
    return Factors(rest, lambda tensor: (made if tensor in made.names else rest)[tensor])


def scaled(plan: Plan, by: float) -> Factors:
    """Scale the factors of the unchanged adapter."""
    targets = {target.tensor: target for target in plan.targets}
    return Factors(targets, lambda tensor: factors_of(plan, targets[tensor]).R.to(torch.float32) * by)
