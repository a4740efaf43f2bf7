"""Solve for the right factors of matrices at the sites of a sweep, for several weights of the general text at once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamer.errors import NumericError, UnsupportedError
from streamer.linalg.moments import Refit, System, TextInputs, basis, refit, refit_one_hot
from streamer.linalg.operators import LowRank
from streamer.measuring.sequences import GENERAL, TASK
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.streaming.groups import Group
from streamer.streaming.resume import OnDemand
from streamer.streaming.run_time import WeightSource
from streamer.streaming.sites import Site, same_inputs
from streamer.streaming.spool import Spool, Spooled
from streamer.streaming.sweep import SweepModel
from streamer.streaming.variants import ADAPTER_ROW, BASE_ROW

RightFactors = OnDemand[str, Tensor]
"""Right factors by `Target.tensor`."""

SiteInputs = Mapping[Group, Tensor]
"""Inputs of a site, by the groups that stopped there."""

SiteDeltas = Sequence[tuple[Target, LowRank]]
"""Matrices of a site, with their deltas."""


def factors_of(plan: Plan, target: Target) -> LowRank:
    """Read the factors of a delta and check that they are finite."""
    delta = plan.finite_delta(target)
    assert isinstance(delta, LowRank)
    return delta


def unchanged(plan: Plan) -> RightFactors:
    """Read the factors of the unchanged adapter."""
    targets = {target.tensor: target for target in plan.targets}
    return RightFactors(
        targets, lambda tensor: factors_of(plan, targets[tensor]).R.to(torch.float32)
    )


class Stream(NamedTuple):
    """One text through one model: general text through the base, task text through base + adapter, or either through a candidate."""

    text: str
    candidate: int | None = None

    @property
    def variant(self) -> int:
        """Return the number of the variant that runs; the candidates come after the base and the adapter."""
        if self.candidate is None:
            return BASE_ROW if self.text == GENERAL else ADAPTER_ROW
        return ADAPTER_ROW + 1 + self.candidate


def streams_of(candidates: int) -> list[Stream]:
    """List the streams of a fit with so many candidates."""
    return [
        Stream(text, candidate)
        for candidate in (None, *range(candidates))
        for text in (GENERAL, TASK)
    ]


def key_of(name: str, candidate: int) -> str:
    """Name a candidate's right factor of a matrix."""
    return f"{name}/{candidate:03}"


class SiteSystems(NamedTuple):
    """The inputs of a site's matrices, as they came and by stream, and each candidate's system."""

    inputs: Sequence[Tensor]
    streams: Mapping[Stream, Sequence[Tensor]]
    systems: Sequence[System]


@dataclass
class FactorSolver:
    """Fits each site's matrices for every candidate.

    Attributes
    ----------
    model
        The model, whose sweep calls this object at each site.
    tokens
        Number of tokens of each text.
    places
        The places in the spool of right factors, by `key_of`.
    """

    model: SweepModel
    weights: Sequence[float]
    tokens: Mapping[str, int]
    spool: Spool
    places: dict[str, Spooled] = field(default_factory=dict)
    _last: SiteSystems | None = None

    @property
    def fitted(self) -> set[str]:
        """Return the names of the matrices that have been fitted."""
        return {key.rpartition("/")[0] for key in self.places}

    def __call__(self, site: Site, inputs: SiteInputs) -> None:
        """Fit the factors of all matrices at a site; see `SweepModel.run`."""
        pairs = [(target, factors_of(self.model.job.plan, target)) for target in site.matrices]
        for target, delta in pairs:
            if delta.is_zero():
                self._write(target, [delta.R] * len(self.weights))
            elif key_of(target.tensor, 0) in self.places:
                raise UnsupportedError(
                    f"{target.tensor!r}: its module runs in several layers, which repair does not support; use `mitigate --method shrink`"
                )
        if site.size is None:
            self._solve(site, pairs, inputs)
        else:
            self._look_up(site.size, pairs, inputs)

    def _look_up(self, size: int, pairs: SiteDeltas, inputs: SiteInputs) -> None:
        """Fit the factors of embeddings, whose inputs are numbers of rows below `size`."""
        streams = self._by_stream(inputs)
        frequencies = {
            text: torch.bincount(torch.cat(streams[Stream(text)]), minlength=size).double() / tokens
            for text, tokens in self.tokens.items()
        }
        for target, delta in pairs:
            rights = [
                refit_one_hot(delta.R, frequencies[TASK], frequencies[GENERAL], mu)
                for mu in self.weights
            ]
            self._write(target, rights)

    def _solve(self, site: Site, pairs: SiteDeltas, inputs: SiteInputs) -> None:
        """Fit the factors of matrices that multiply these inputs."""
        first, *_ = site.matrices
        systems = self._systems_of(inputs, first.tensor)
        if systems is None:
            return
        # An expert receives other tokens once its router's inputs have changed, or the same in another order: they have no counterparts.
        in_order, *_ = site.order
        expert = not in_order or any(target.module.layer_kind == "expert" for target, _ in pairs)
        paired = not expert and all(
            sum(map(len, x)) == self.tokens[stream.text] for stream, x in systems.streams.items()
        )
        for target, delta in pairs:
            rights = None if delta.is_zero() else self._refit(target, delta, systems, paired)
            if rights is not None:
                self._write(target, rights)

    def check(self) -> None:
        """Check that the inputs of all weights that were used so far could be collected."""
        if unused := sorted(self.model.values.otherwise_used - self.fitted):
            raise UnsupportedError(
                f"{self.model.job.plan.base.path}: the weight {unused[0]!r} is not used by a matrix product or look-up (but by a "
                "convolution, for example), so its inputs cannot be collected; use `mitigate --method shrink`"
            )

    def candidate(self, number: int, rest: Mapping[str, Tensor]) -> RightFactors:
        """Return a candidate's factors as they are fitted, and `rest` for all other matrices."""
        fitted = self.factors()

        def factor(name: str) -> Tensor:
            key = key_of(name, number)
            return fitted[key] if key in self.places else rest[name]

        return RightFactors(rest, factor)

    def factors(self) -> RightFactors:
        """Return all factors found so far, by `key_of`."""
        return RightFactors(self.places, lambda key: self.spool.read(self.places[key])[0])

    def restore(self, factors: Mapping[str, Tensor]) -> None:
        """Take over the factors of an earlier run."""
        for key, right in factors.items():
            self.places[key] = self.spool.write([right])

    def _write(self, target: Target, rights: Sequence[Tensor]) -> None:
        for candidate, right in enumerate(rights):
            key = key_of(target.tensor, candidate)
            self.places[key] = self.spool.write([right.to(torch.float32)])

    def _by_stream(self, inputs: SiteInputs) -> dict[Stream, list[Tensor]]:
        """Collect the inputs of each stream's groups, in their order."""
        by_stream = defaultdict[Any, list[Tensor]](list)
        for group, x in inputs.items():
            if len(x):  # an expert may receive none
                by_stream[group.stream].append(x)
        return by_stream

    def _systems_of(self, inputs: SiteInputs, name: str) -> SiteSystems | None:
        """Divide the inputs by stream, and make each candidate's system; None if a text did not reach the site.

        Matrices that follow each other and share their inputs, such as q, k and v, share the systems.
        """
        tensors = list(inputs.values())
        if self._last is not None and same_inputs(self._last.inputs, tensors):
            return self._last
        self._last = None  # frees its systems before others are made
        streams = self._by_stream(inputs)
        wanted = streams_of(len(self.weights))
        if not all(any(bool(x.any()) for x in streams[stream]) for stream in wanted):
            return None
        if not all(math.isfinite(float(torch.linalg.vector_norm(x))) for x in tensors):
            raise NumericError(
                f"{self.model.job.plan.base.path}: the inputs of {name!r} are NaN or Inf on the texts"
            )
        tokens = (self.tokens[TASK], self.tokens[GENERAL])
        systems = [
            System(streams[Stream(TASK, k)], streams[Stream(GENERAL, k)], tokens, mu)
            for k, mu in enumerate(self.weights)
        ]
        self._last = SiteSystems(tensors, streams, systems)
        return self._last

    def _refit(
        self, target: Target, delta: LowRank, site: SiteSystems, paired: bool
    ) -> list[Tensor] | None:
        """Fit each candidate's right factor to the inputs; None if a system has no solution.

        Parameters
        ----------
        paired
            Whether the inputs of a candidate are those of the same tokens in the unchanged models.
        """
        Q, T = basis(delta.L)
        R = delta.R
        device = self.model.job.device
        P = self._through(target, Q.to(device)) if paired else torch.empty(0)
        refitted = Refit(R, T, (R.double() @ T.T).to(device), P)
        rights = []
        for k, (mu, system) in enumerate(zip(self.weights, site.systems, strict=True)):
            texts = {}
            for text in (GENERAL, TASK):
                current = site.streams[Stream(text, k)]
                reference = site.streams[Stream(text)] if paired else current
                texts[text] = TextInputs(reference, current, self.tokens[text])
            right = refit(refitted, texts[TASK], texts[GENERAL], mu, system)
            if right is None:
                return None
            rights.append(right)
        return rights

    def _through(self, target: Target, Q: Tensor) -> Tensor:
        """Compute ``Wᵀ Q`` (n, k) of a target's weight W and Q (m, k), with products in float32."""
        values = self.model.values
        source = WeightSource(target.slices)
        out = Q.new_zeros(target.module.shape[1], Q.shape[1])
        Q32 = Q.float()
        size = sum(values.weight_of(slice_, ADAPTER_ROW).matrix[0] for slice_ in target.slices)
        for i, j, rows in values.blocks(source, ADAPTER_ROW, 0, size):
            if target.transposed:
                out[i:j] = (rows @ Q32).double()
            else:
                out += (rows.T @ Q32[i:j]).double()
        return out
