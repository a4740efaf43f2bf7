"""A mitigated adapter in the form of the one that was read: its factors anew, everything else as it stands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from streamer.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME
from streamer.errors import UnsupportedError
from streamer.linalg.operators import LowRank
from streamer.output.job import Job, output_plan, plan_card
from streamer.output.memory import mitigation_bytes
from streamer.output.metrics import matrix_figures
from streamer.output.mitigation import back_project
from streamer.output.records import MitigatedMatrix
from streamer.plan.memory import MemoryEstimate, resident_bytes
from streamer.plan.side_files import other_files, skipped_files
from streamer.plan.targets import Target
from streamer.plan.tokenizer import own_tokenizer
from streamer.storage.atomic import Buffer
from streamer.storage.checkpoint import INDEX_NAME, SINGLE_NAME
from streamer.storage.header import TensorInfo
from streamer.storage.output_plan import RECORD_NAME
from streamer.storage.shard_writer import ShardPlan, Source, like
from streamer.weights.dtypes import ENCODINGS, as_bytes, encode


class AdapterSink:
    """Writes a mitigated adapter: the same tensors, names, order, dtypes and config; factors of mitigated modules replaced."""

    command = "mitigate"

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
        self.job = job
        self.shards: Mapping[str, ShardPlan] = {
            WEIGHTS_NAME: like(WEIGHTS_NAME, plan.adapter.file.header, job.stamp(self.command))
        }
        self.edited: Mapping[str, bytes] = {}
        self.copies = [(name, p) for name, p in other_files(plan.adapter.path) if name != CONFIG_NAME]
        self.finals: Mapping[str, bytes] = {CONFIG_NAME: (plan.adapter.path / CONFIG_NAME).read_bytes()}
        self.skipped_files = [n for n in skipped_files(plan.adapter.path) if n not in (WEIGHTS_NAME, RECORD_NAME)]
        self.to_lora: int | None = None
        self.warnings = job.warnings
        self.notes: list[str] = []
        self.advice: list[str] = []
        self.tokenizer: Literal["adapter", "base"] | None = own_tokenizer(self.copies)
        self.card, self.copies = plan_card(self)
        self.output = output_plan(self, path, conflicting_names=("adapter_model.bin", SINGLE_NAME, INDEX_NAME))
        self._of: dict[str, list[Target]] = {}
        for target in plan.targets:
            for name in self._tensors(target):
                self._of.setdefault(name, []).append(target)
        self._ready: dict[str, Tensor] = {}

    def needs(self) -> Iterator[MemoryEstimate]:
        """Memory for each matrix; of experts, whose factors stand in one tensor, for all of them and the new ones."""
        plan = self.job.plan
        resident = resident_bytes(plan)
        for target in plan.targets:
            size = mitigation_bytes(plan, target, self.job.intruders(target), projected=True)
            if target.module.factors is not None and target.module.factors.expert is not None:
                size += 2 * sum(plan.adapter.tensors[name].info.nbytes for name in self._tensors(target))
            yield MemoryEstimate(target.tensor, target.module.shape, resident + size)

    def source(self, name: str, figures: list[MitigatedMatrix]) -> Source:
        """Bytes of each tensor of the adapter's file; appends each matrix's figures. What is no factor keeps its bytes."""
        file = self.job.plan.adapter.file

        def pour(info: TensorInfo) -> Iterable[Buffer]:
            targets = self._of.get(info.name)
            if targets is None:
                return file.chunks(info)
            if info.name not in self._ready:
                self._ready |= self._all_factors(targets, figures)
            new = self._ready.pop(info.name)
            return file.chunks(info) if new.numel() == 0 else [as_bytes(new)]

        return pour

    def _tensors(self, target: Target) -> list[str]:
        """Names of the tensors that a mitigation of the target would change."""
        mirror = self.job.plan.mirrors.get(target.module.name)
        return [*target.module.tensor_names, *(mirror.tensor_names if mirror else ())]

    def _all_factors(self, targets: list[Target], figures: list[MitigatedMatrix]) -> dict[str, Tensor]:
        """The tensors that hold the factors of these targets: of one module, or of all experts of a layer; empty ones stay as they are."""
        new = [(target.module.factors, self._factors(target, figures)) for target in targets]
        module, factors = new[0]
        if module is None or module.expert is None or not any(t.numel() for _, f in new for t in f.values()):
            return factors
        whole = {name: self.job.plan.adapter.tensors[name].whole().clone() for name in module.tensor_names}
        for expert, factors in new:
            assert expert is not None
            for name, part in zip(expert.tensor_names, expert.expert_slices, strict=True):
                if factors[name].numel():
                    whole[name][part] = factors[name]
        return whole

    def _factors(self, target: Target, figures: list[MitigatedMatrix]) -> dict[str, Tensor]:
        module = target.module.factors
        delta, after, found = self.job.mitigated(target)
        if after is delta:
            figures.append(matrix_figures(target, delta, after, found, self.job.options.scale, 0.0))
            return {name: torch.empty(0) for name in self._tensors(target)}
        assert isinstance(after, LowRank)
        assert module is not None
        B, A, dropped = back_project(after, module.rank, module.scaling)
        if module.delta_transposed:
            A, B = B.T, A.T
        out = {}
        for name, factor in zip(self._tensors(target), (A, B, B.T, A.T), strict=False):
            encoding = ENCODINGS[self.job.plan.adapter.file.header.by_name[name].dtype]
            out[name] = encode(factor, encoding, factor, name)
        written = module.product(out[module.a].double(), out[module.b].double())
        figures.append(matrix_figures(target, delta, written, found, self.job.options.scale, dropped))
        return out
