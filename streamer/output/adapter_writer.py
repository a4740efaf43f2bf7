"""Write a mitigated adapter: new factors, PEFT's names, all other values unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from streamer.adapters.target_parameters import without_layout
from streamer.adapters.tensor_names import saved_names
from streamer.errors import UnsupportedError
from streamer.output.job import Job
from streamer.output.mitigated_factors import MitigatedFactors
from streamer.output.mitigation_memory import mitigation_bytes
from streamer.output.output_spec import Writer, adapter_spec
from streamer.output.records import MitigatedMatrix
from streamer.plan.memory_estimate import MemoryEstimate
from streamer.storage.buffers import Piece
from streamer.storage.header import TensorInfo
from streamer.storage.shard_writer import plan_shard
from streamer.weights.dtypes import as_bytes

HASHES = ("modelspec.hash_sha256", "sshs_legacy_hash", "sshs_model_hash")
"""Metadata in which trainers state hashes of the original factors."""


class AdapterWriter(Writer):
    """Writer of the original adapter's tensors, order, dtypes and config, with new factors of mitigated modules, under PEFT's names."""

    def __init__(self, job: Job, path: Path) -> None:
        plan = job.plan
        if plan.adapter.describes_model:
            raise UnsupportedError(
                f"{plan.adapter.path}: is a model, and no adapter that could be written back; `streamer merge` writes the mitigated model, "
                "and --to-lora RANK its difference to the base as a LoRA adapter"
            )
        # DoRA's delta, and that of PEFT's methods other than LoRA, has no factors.
        dense = [t.module.name for t in plan.targets if t.module.factors is None]
        if dense and job.method.mitigation_lambda != 1:
            raise UnsupportedError(
                f"{plan.adapter.path}: the mitigated delta of {dense[0]!r} (and {len(dense) - 1} more) has no form in this kind of "
                "adapter; `streamer merge` writes it into the base"
                + ("" if plan.config.pipeline else ", and --to-lora RANK as a LoRA adapter")
            )
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
        plan = self.spec.job.plan
        for target in plan.targets:
            size = mitigation_bytes(plan, target, self.spec.job.intruders(target), projected=True)
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
