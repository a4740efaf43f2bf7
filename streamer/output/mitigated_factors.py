"""Make new factors for an adapter's modules, with its names, shapes and dtypes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from streamer.linalg.low_rank import LowRank
from streamer.output.back_projection import back_project
from streamer.output.job import Job
from streamer.output.metrics import matrix_metrics
from streamer.output.records import MitigatedMatrix
from streamer.plan.targets import Target
from streamer.weights.dtypes import ENCODINGS, encode


@dataclass(frozen=True)
class MitigatedFactors:
    """New values of the tensors that hold factors, for a mitigation of an adapter whose deltas all have factors."""

    job: Job

    @cached_property
    def targets(self) -> dict[str, list[Target]]:
        """List for each tensor of the adapter the targets whose factors it holds: one, or all experts of a layer."""
        found: dict[str, list[Target]] = {}
        for target in self.job.plan.targets:
            for name in self.names(target):
                found.setdefault(name, []).append(target)
        return found

    def names(self, target: Target) -> list[str]:
        """Return the names of the tensors that a mitigation of the target would change."""
        mirror = self.job.plan.mirrors.get(target.module.name)
        return [*target.module.tensor_names, *(mirror.tensor_names if mirror else ())]

    def tensors(self, targets: list[Target], metrics: list[MitigatedMatrix]) -> dict[str, Tensor]:
        """Make the tensors with the factors of these targets, one module or all experts of a layer; an empty tensor means no change.

        Parameters
        ----------
        metrics
            The metrics of each matrix are appended to it.
        """
        new = [(target.module.factors, self._factors(target, metrics)) for target in targets]
        module, factors = new[0]
        if module is None or module.expert is None:
            return factors
        if not (module.grouped or any(t.numel() for _, f in new for t in f.values())):
            return factors
        a, b = (self.job.plan.adapter.tensors[name].whole() for name in module.tensor_names)
        whole = {module.a: a.clone(), module.b: module.regrouped(b).clone()}
        for expert, factors in new:
            assert expert is not None
            for name, rows in zip(expert.tensor_names, replace(expert, grouped=False).expert_slices, strict=True):
                if factors[name].numel():
                    whole[name][rows] = factors[name]
        return whole

    def _factors(self, target: Target, metrics: list[MitigatedMatrix]) -> dict[str, Tensor]:
        job, module = self.job, target.module.factors
        delta, after, found = job.mitigated(target)
        if after is delta:
            metrics.append(matrix_metrics(target, delta, after, found, job.method))
            return {name: torch.empty(0) for name in self.names(target)}
        assert isinstance(after, LowRank)
        assert module is not None
        B, A, error = back_project(after, module.rank, module.scaling)
        if module.delta_transposed:
            A, B = B.T, A.T
        lefts = (0, 3) if module.delta_transposed else (1, 2)  # indices of the names that hold the left factor of Δ
        out = {}
        for number, (name, factor) in enumerate(zip(self.names(target), (A, B, B.T, A.T), strict=False)):
            stored = job.plan.adapter.file.header.by_name[name]
            kept = job.method.keeps_left and number in lefts
            out[name] = torch.empty(0) if kept else encode(factor, ENCODINGS[stored.dtype], factor, name)
        a, b = (out[name] if out[name].numel() else factor for name, factor in ((module.a, A), (module.b, B)))
        written = module.product(a.double(), b.double())
        metrics.append(matrix_metrics(target, delta, written, found, job.method, error))
        return out
