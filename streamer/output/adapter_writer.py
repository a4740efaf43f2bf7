"""Write a mitigated adapter: new factors, PEFT's names, all other values unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from streamer.adapters.target_parameters import without_layout
from streamer.adapters.tensor_names import saved_names
from streamer.errors import UnsupportedError
from streamer.linalg.low_rank import LowRank
from streamer.output.back_projection import back_project
from streamer.output.job import Job
from streamer.output.metrics import matrix_metrics
from streamer.output.output_spec import Writer, adapter_spec
from streamer.output.records import MitigatedMatrix
from streamer.plan.memory_estimate import MemoryEstimate
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.storage.buffers import Piece
from streamer.storage.header import TensorInfo
from streamer.storage.shard_writer import plan_shard
from streamer.weights.dtypes import ENCODINGS, as_bytes, encode

HASHES = ("modelspec.hash_sha256", "sshs_legacy_hash", "sshs_model_hash")
"""Metadata in which trainers state hashes of the original factors."""


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


def refuse_dense(plan: Plan, remedy: str) -> None:
    """Refuse deltas without factors: DoRA's, and those of PEFT's methods other than LoRA."""
    if dense := [t.module.name for t in plan.targets if t.module.factors is None]:
        raise UnsupportedError(
            f"{plan.adapter.path}: the mitigated delta of {dense[0]!r} (and {len(dense) - 1} more) has no form in this kind of "
            f"adapter; {remedy}"
        )


class AdapterWriter(Writer):
    """Writer of the original adapter's tensors, order, dtypes and config, with new factors of mitigated modules, under PEFT's names."""

    def __init__(self, job: Job, path: Path) -> None:
        plan = job.plan
        if plan.adapter.describes_model:
            raise UnsupportedError(
                f"{plan.adapter.path}: is a model, and no adapter that could be written back; `streamer merge` writes the mitigated model, "
                "and --to-lora RANK its difference to the base as a LoRA adapter"
            )
        if job.method.mitigation_lambda != 1:
            lora = "" if plan.config.pipeline else ", and --to-lora RANK as a LoRA adapter"
            refuse_dense(plan, f"`streamer merge` writes it into the base{lora}")
        header, values = plan.adapter.file.header, plan.adapter.config.values
        kind = None if plan.config.pipeline else plan.adapter.config.peft_type
        names = {t.name: t.name for t in header.tensors}
        names = saved_names(names) if kind == "LORA" else names
        self._read = {name: header.by_name[own] for name, own in names.items()}
        entries = [(name, t.dtype, t.shape) for name, t in self._read.items()]
        metadata = {key: text for key, text in header.metadata.items() if key not in HASHES}
        shard = plan_shard(plan.adapter.file.path.name, entries, {**metadata, **job.stamp("mitigate")})
        config = next((config.read_bytes() for config in plan.adapter.config_paths), None)
        plain = {**without_layout(values), "peft_type": kind}
        if config is not None and plain != values:  # factors are written in PEFT's order, and PEFT needs the type
            config = json.dumps(plain, indent=2, ensure_ascii=False).encode() + b"\n"
        self.spec = adapter_spec(job, path, shard, config, plan.adapter.directory)
        self._factors = MitigatedFactors(job)
        self._ready: dict[str, Tensor] = {}

    def estimates(self, resident: int) -> Iterator[MemoryEstimate]:
        """Estimate the peak memory for each matrix; for experts, whose factors share a tensor, including all factors, old and new."""
        job, plan = self.spec.job, self.spec.job.plan
        for target in plan.targets:
            size = job.mitigation_bytes(target, projected=True)
            if target.module.factors is not None and target.module.factors.expert is not None:
                size += 2 * sum(plan.adapter.tensors[name].info.nbytes for name in self._factors.names(target))
            yield MemoryEstimate(target.tensor, target.module.shape, resident + size)

    def tensor_bytes(self, info: TensorInfo, job: Job, metrics: list[MitigatedMatrix]) -> Iterable[Piece]:
        """Yield the bytes of a tensor; tensors that are not factors, or do not change, keep the file's bytes."""
        file, info = job.plan.adapter.file, self._read[info.name]
        targets = self._factors.targets.get(info.name)
        if targets is None:
            return file.chunks(info)
        if info.name not in self._ready:
            self._ready |= MitigatedFactors(job).tensors(targets, metrics)
        new = self._ready.pop(info.name)
        return file.chunks(info) if new.numel() == 0 else [Piece(as_bytes(new))]
