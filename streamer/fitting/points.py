"""Right factors of all matrices for a weight, and where they come from: a spool, other factors, the adapter itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamer.linalg.low_rank import LowRank
from streamer.methods import RegMean, Shrink
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.streaming.lazy import BLOCK_BYTES
from streamer.streaming.spool import Spool, Spooled


def factors_of(plan: Plan, target: Target) -> LowRank:
    """Read the factors of a delta, checked."""
    delta = plan.finite_delta(target)
    assert isinstance(delta, LowRank)
    return delta


def through(plan: Plan, target: Target, Q: Tensor) -> Tensor:
    """Compute ``Wᵀ Q`` (n, r) of a target's weight W and Q (m, r), in float64."""
    weight = plan.weights[target.tensor]
    out = Q.new_zeros(target.module.shape[1], Q.shape[1])
    for i, j, rows in weight.blocks(max(1, BLOCK_BYTES // (8 * weight.matrix[1]))):
        if target.transposed:
            out[i:j] = rows.double() @ Q
        else:
            out.addmm_(rows.double().T, Q[i:j])
    return out


@dataclass(frozen=True)
class Point:
    """Right factors for a weight μ: 0 is the adapter as it is, infinity nothing; `corrected` ones by the second kind of pass."""

    weight: float
    factors: Mapping[str, Tensor]
    corrected: bool = False

    @property
    def name(self) -> str:
        """Name it, for the journal and for messages; what lacks all deltas is the shrink that does."""
        if self.weight == math.inf:
            return Shrink(0.0).label
        return f"{RegMean.name} mu {self.weight!r}{' corrected' if self.corrected else ''}"

    def towards(self, other: Point, t: float) -> Point:
        """Interpolate Δ' linearly; the weight stands between the two, by its logarithm if that is finite."""
        if t >= 1 and other.weight == math.inf:
            return other
        if self.weight > 0 and other.weight < math.inf:
            weight = math.exp((1 - t) * math.log(self.weight) + t * math.log(other.weight))
        else:
            weight = t * other.weight if other.weight < math.inf else self.weight / (1 - t)
        return Point(weight, Mixed(self.factors, other.factors, t), other.corrected)


@dataclass(frozen=True)
class Mixed(Mapping[str, Tensor]):
    """``(1 − t) a + t b`` of each matrix, made when it is asked for."""

    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    t: float

    def __getitem__(self, tensor: str) -> Tensor:
        return torch.lerp(self.a[tensor], self.b[tensor], self.t)

    def __iter__(self) -> Iterator[str]:
        return iter(self.a)

    def __len__(self) -> int:
        return len(self.a)


@dataclass(frozen=True)
class SpooledFactors(Mapping[str, Tensor]):
    """Factors for one weight, of which each matrix' are in a spool."""

    spool: Spool
    places: Mapping[str, Sequence[Spooled]]
    number: int

    def __getitem__(self, tensor: str) -> Tensor:
        return self.spool.read(self.places[tensor][self.number])[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class Replaced(Mapping[str, Tensor]):
    """Factors of which some have been made anew."""

    made: SpooledFactors
    rest: Mapping[str, Tensor]

    def __getitem__(self, tensor: str) -> Tensor:
        return (self.made if tensor in self.made.places else self.rest)[tensor]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rest)

    def __len__(self) -> int:
        return len(self.rest)


@dataclass(frozen=True)
class ScaledFactors(Mapping[str, Tensor]):
    """Right factors of the adapter as it is, times a number."""

    plan: Plan
    targets: Mapping[str, Target]
    by: float

    def __getitem__(self, tensor: str) -> Tensor:
        return factors_of(self.plan, self.targets[tensor]).R.to(torch.float32) * self.by

    def __iter__(self) -> Iterator[str]:
        return iter(self.targets)

    def __len__(self) -> int:
        return len(self.targets)
