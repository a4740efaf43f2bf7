"""Write a mitigated adapter in the form of the one that was read: its factors anew, everything else as it stands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from streamer.adapters.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from streamer.errors import UnsupportedError
from streamer.linalg.low_rank import LowRank
from streamer.output.job import Job
from streamer.output.memory import mitigation_bytes
from streamer.output.metrics import matrix_metrics
from streamer.output.mitigation import back_project
from streamer.output.output_spec import Writer, adapter_spec
from streamer.output.records import MitigatedMatrix
from streamer.plan.memory import MemoryEstimate
from streamer.plan.targets import Target
from streamer.storage.atomic_file import Buffer
from streamer.storage.header import TensorInfo
from streamer.storage.shard_writer import like
from streamer.weights.dtypes import ENCODINGS, as_bytes, encode


class AdapterWriter(Writer):
    """Writes the tensors, names, order, dtypes and config of the adapter that was read, and new factors of mitigated modules."""

    def __init__(self, job: Job, path: Path) -> None:
        plan = job.plan
        if plan.adapter.describes_model:
            raise UnsupportedError(
                f"{plan.adapter.path}: is a model, and no adapter that could be written back; `streamer merge` writes the mitigated model, "
                "and --to-lora RANK its difference to the base as a LoRA adapter"
            )
        dense = [t.module.name for t in plan.targets if t.module.factors is None]
        if dense and job.options.mitigation_lambda != 1:
            raise UnsupportedError(
                f"{plan.adapter.path}: the mitigated delta of {dense[0]!r} (and {len(dense) - 1} more) has no form in this kind of "
                "adapter; `streamer merge` writes it into the base, and --to-lora RANK as a LoRA adapter"
            )
        shard = like(WEIGHTS_NAME, plan.adapter.file.header, job.stamp("mitigate"))
        config = (plan.adapter.path / CONFIG_NAME).read_bytes()
        self.spec = adapter_spec(job, path, shard, config, plan.adapter.path)
        self._targets: dict[str, list[Target]] = {}
        for target in plan.targets:
            for name in self._tensors(target):
                self._targets.setdefault(name, []).append(target)
        self._ready: dict[str, Tensor] = {}

    def estimates(self, resident: int) -> Iterator[MemoryEstimate]:
        """Estimate the peak memory for each matrix; of experts, whose factors stand in one tensor, for all of them and the new ones."""
        plan = self.spec.job.plan
        for target in plan.targets:
            size = mitigation_bytes(plan, target, self.spec.job.intruders(target), projected=True)
            if target.module.factors is not None and target.module.factors.expert is not None:
                size += 2 * sum(plan.adapter.tensors[name].info.nbytes for name in self._tensors(target))
            yield MemoryEstimate(target.tensor, target.module.shape, resident + size)

    def tensor_bytes(self, info: TensorInfo, job: Job, metrics: list[MitigatedMatrix]) -> Iterable[Buffer]:
        """Give the bytes of a tensor; those of what is no factor, or does not change, are the file's own."""
        file = job.plan.adapter.file
        targets = self._targets.get(info.name)
        if targets is None:
            return file.chunks(info)
        if info.name not in self._ready:
            self._ready |= self._all_factors(job, targets, metrics)
        new = self._ready.pop(info.name)
        return file.chunks(info) if new.numel() == 0 else [as_bytes(new)]

    def _tensors(self, target: Target) -> list[str]:
        """Name the tensors that a mitigation of the target would change."""
        mirror = self.spec.job.plan.mirrors.get(target.module.name)
        return [*target.module.tensor_names, *(mirror.tensor_names if mirror else ())]

    def _all_factors(self, job: Job, targets: list[Target], metrics: list[MitigatedMatrix]) -> dict[str, Tensor]:
        """Make the tensors that hold the factors of these targets: of one module, or of all experts of a layer; empty ones stay."""
        new = [(target.module.factors, self._factors(job, target, metrics)) for target in targets]
        module, factors = new[0]
        if module is None or module.expert is None or not any(t.numel() for _, f in new for t in f.values()):
            return factors
        whole = {name: job.plan.adapter.tensors[name].whole().clone() for name in module.tensor_names}
        for expert, factors in new:
            assert expert is not None
            for name, rows in zip(expert.tensor_names, expert.expert_slices, strict=True):
                if factors[name].numel():
                    whole[name][rows] = factors[name]
        return whole

    def _factors(self, job: Job, target: Target, metrics: list[MitigatedMatrix]) -> dict[str, Tensor]:
        module = target.module.factors
        delta, after, found = job.mitigated(target)
        if after is delta:
            metrics.append(matrix_metrics(target, delta, after, found, job.options))
            return {name: torch.empty(0) for name in self._tensors(target)}
        assert isinstance(after, LowRank)
        assert module is not None
        B, A, error = back_project(after, module.rank, module.scaling)
        if module.delta_transposed:
            A, B = B.T, A.T
        out = {}
        for name, factor in zip(self._tensors(target), (A, B, B.T, A.T), strict=False):
            encoding = ENCODINGS[job.plan.adapter.file.header.by_name[name].dtype]
            out[name] = encode(factor, encoding, factor, name)
        written = module.product(out[module.a].double(), out[module.b].double())
        metrics.append(matrix_metrics(target, delta, written, found, job.options, error))
        return out
