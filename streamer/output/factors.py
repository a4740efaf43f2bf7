"""Write mitigated deltas as an adapter: the original with new factors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from streamer.adapters.adapter import saved_names
from streamer.adapters.adapter_config import (
    CONFIG_NAME,
    LAYOUT_DETAILS,
    LAYOUT_KEY,
)
from streamer.errors import UnsupportedError
from streamer.linalg.operators import LowRank
from streamer.output.job import Job, Writer
from streamer.output.record import MitigatedMatrix
from streamer.plan.plan import MemoryEstimate, Plan
from streamer.plan.side_files import TOKENIZER_CONFIG, other_files, skipped_files
from streamer.plan.targets import Target
from streamer.storage.atomic_file import Piece, ShardPlan, plan_shard
from streamer.storage.checkpoint import INDEX_NAME, SINGLE_NAME
from streamer.storage.header import TensorInfo
from streamer.storage.transaction import RECORD_NAME
from streamer.units import counted
from streamer.weights.base import FLOATS, as_bytes, encode


def back_project(delta: LowRank, rank: int, scaling: float) -> tuple[Tensor, Tensor, float]:
    """Compute adapter factors with ``scaling · B @ A ≈ Δ'``, and the relative Frobenius norm that is lost.

    Parameters
    ----------
    delta
        Δ' = L Rᵀ, (m, n).
    rank
        The adapter's rank r. If Δ' has at most r columns, its factors are kept and nothing is lost; otherwise Δ' is
        truncated to the nearest matrix of rank r, and ``√Σ`` goes into both B and A.
    scaling
        LoRA's s, not zero.

    Returns
    -------
    B, A, dropped
        (m, r), (r, n), and ``‖Δ' − s·B·A‖_F / ‖Δ'‖_F``.
    """
    delta = delta.precise()
    if delta.rank <= rank:
        return delta.L / scaling, delta.R.T, 0.0
    root, dropped = delta.scaled(1 / scaling).truncated(rank)
    return root.L, root.R.T, dropped


SERVER_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's ``max_lora_rank``."""

PATTERNS = ("rank_pattern", "alpha_pattern")


def server_rank(path: Path, rank: int) -> int:
    """Return the least of `SERVER_RANKS` from `rank` on; refuse a larger one."""
    if rank > SERVER_RANKS[-1]:
        what = f"for_server: servers take ranks up to {SERVER_RANKS[-1]}, found {rank}"
        raise UnsupportedError(
            f"{path}: {what}; give a smaller one (--to-lora RANK), or use `streamer merge`"
        )
    return next(served for served in SERVER_RANKS if served >= rank)


def server_advice(
    config: Mapping[str, Any], entries: Iterable[tuple[str, Any, Any]], for_server: bool
) -> list[str]:
    """Advise against serving an adapter: servers scale all modules by one α/r, and apply factors alone."""
    beside = [name for name, *_ in entries if for_server and ".lora_" not in name]
    if beside:
        kept = f"the output keeps {counted(len(beside), 'tensor')} beside the factors (first: {beside[0]!r})"
        remedy = "put them into the base, or use `streamer merge`"
        return [f"{kept}, which vLLM and other servers refuse or ignore: {remedy}"]
    ignored = [key for key in PATTERNS if config.get(key)]
    who, keys = (
        ("vLLM and other", ignored) if ignored else ("SGLang, llama.cpp and other", ["use_rslora"])
    )
    if not ignored and not config.get("use_rslora"):
        return []
    return [
        f"{who} servers ignore {' and '.join(keys)} and would scale deltas wrongly; for them, add --for-server"
    ]


HASHES = ("modelspec.hash_sha256", "sshs_legacy_hash", "sshs_model_hash")
"""Metadata in which trainers state hashes of the original factors."""


@dataclass(frozen=True)
class MitigatedFactors:
    """New values of the tensors that hold factors, for a mitigation of an adapter whose deltas all have factors."""

    job: Job

    @cached_property
    def targets(self) -> dict[str, list[Target]]:
        """List for each tensor of the adapter the targets whose factors it holds: one, or all experts of a layer."""
        by_tensor: dict[str, list[Target]] = {}
        for target in self.job.plan.targets:
            for name in self.names(target):
                by_tensor.setdefault(name, []).append(target)
        return by_tensor

    def names(self, target: Target) -> list[str]:
        """Return the names of the tensors that a mitigation of the target would change."""
        mirror = self.job.plan.mirrors.get(target.module.name)
        return [*target.module.tensor_names, *(mirror.tensor_names if mirror else ())]

    def of(
        self, targets: Sequence[Target]
    ) -> tuple[dict[str, Tensor | None], list[MitigatedMatrix]]:
        """Make the tensors with the factors of these targets, one module or all experts of a layer, and the metrics of each target.

        A tensor that does not change is None.
        """
        made = [self._of(target) for target in targets]
        metrics = [row for _, row in made]
        names = [name for target in targets for name in self.names(target)]
        module = targets[0].module.factors
        changed = any(new for new, _ in made)
        if module is None or module.expert is None or not (module.grouped or changed):
            return {**dict.fromkeys(names), **made[0][0]}, metrics
        a, b = (self.job.plan.adapter.tensors[name].whole() for name in module.tensor_names)
        whole = {module.a: a.clone(), module.b: module.regrouped(b).clone()}
        for target, (new, _) in zip(targets, made, strict=True):
            expert = target.module.factors
            assert expert is not None
            slices = replace(expert, grouped=False).expert_slices
            for name, rows in zip(expert.tensor_names, slices, strict=True):
                if name in new:
                    whole[name][rows] = new[name]
        return {**whole}, metrics

    def _of(self, target: Target) -> tuple[dict[str, Tensor], MitigatedMatrix]:
        """Make the tensors of one target that change, and its metrics."""
        job = self.job
        module = target.module.factors
        delta, after = job.mitigated(target)
        if after is delta:
            return {}, job.metrics(target, delta, after)
        assert isinstance(after, LowRank)
        assert module is not None
        B, A, error = back_project(after, module.rank, module.scaling)
        if module.delta_transposed:
            B, A = A.T, B.T
        # The left factor of Δ is B, or of a transposed delta the transpose of A.
        left = {module.a if module.delta_transposed else module.b}
        values = {module.a: A, module.b: B}
        if (mirror := job.plan.mirrors.get(target.module.name)) is not None:
            of_a, of_b = mirror.tensor_names
            values |= {of_a: B.T, of_b: A.T}
            left.add(of_b if module.delta_transposed else of_a)
        kept = left if job.method.keeps_left else ()
        stored = job.plan.adapter.file.header.by_name
        new = {
            name: encode(value, FLOATS[stored[name].dtype], name)
            for name, value in values.items()
            if name not in kept
        }
        written = module.product(new.get(module.a, A).double(), new.get(module.b, B).double())
        return new, job.metrics(target, delta, written, error)


def refuse_dense(plan: Plan, remedy: str) -> None:
    """Refuse deltas without factors: DoRA's, and those of PEFT's methods other than LoRA."""
    if dense := [t.module.name for t in plan.targets if t.module.factors is None]:
        what = f"the mitigated delta of {dense[0]!r} (and {len(dense) - 1} more) has no form in this kind of adapter"
        raise UnsupportedError(f"{plan.adapter.path}: {what}; {remedy}")


class OneFileWriter(Writer):
    """Writer of an adapter of one tensor file and a config, if it has one, with the other files of the adapter in `source`, if given."""

    def __init__(
        self,
        job: Job,
        path: Path,
        shard: ShardPlan,
        config: bytes | None,
        source: Path | None,
        to_lora: int | float | None = None,
        written: Sequence[Target] | None = None,
    ) -> None:
        copies = [(name, p) for name, p in other_files(source) if name != CONFIG_NAME]
        own = (shard.name, RECORD_NAME)
        tokenizer: Literal["adapter"] | None = (
            "adapter" if TOKENIZER_CONFIG in dict(copies) else None
        )
        skipped = (
            [] if source is None else [name for name in skipped_files(source) if name not in own]
        )
        base_bytes = sum(
            job.plan.weights[t.tensor].nbytes for t in job.plan.targets if not t.module.low_rank
        )
        super().__init__(
            job,
            path,
            "mitigate",
            {shard.name: shard},
            {} if config is None else {CONFIG_NAME: config},
            copies,
            skipped,
            ("adapter_model.bin", SINGLE_NAME, INDEX_NAME),
            base_bytes,
            tokenizer=tokenizer,
            warnings=job.warnings,
            to_lora=to_lora,
            written=written,
        )
        self._ready: dict[str, Tensor | None] = {}


class AdapterWriter(OneFileWriter):
    """Writer of the original adapter's tensors, order, dtypes and config, with new factors of mitigated modules, under PEFT's names.

    For servers, each module's scale goes into ``lora_B``, and zeros extend all factors to one rank.
    """

    def __init__(self, job: Job, path: Path) -> None:
        plan = job.plan
        if plan.adapter.describes_model:
            do = "`streamer merge` writes the mitigated model, and --to-lora RANK its difference to the base as a LoRA adapter"
            raise UnsupportedError(
                f"{plan.adapter.path}: is a model, and no adapter that could be written back; {do}"
            )
        if job.method.mitigation_lambda != 1:
            lora = "" if plan.config.pipeline else ", and --to-lora RANK as a LoRA adapter"
            refuse_dense(plan, f"`streamer merge` writes it into the base{lora}")
        header, values = plan.adapter.file.header, plan.adapter.config.values
        kind = None if plan.config.pipeline else plan.adapter.config.peft_type
        names = {t.name: t.name for t in header.tensors}
        names = saved_names(names) if kind == "LORA" else names
        self._read = {name: header.by_name[own] for name, own in names.items()}
        self._factors, self._rank = MitigatedFactors(job), 0
        if job.for_server:
            refuse_dense(plan, "--to-lora RANK writes it as a LoRA adapter")
            if (
                kind != "LORA"
                or plan.mirrors
                or any(c.role == "lora_bias" for c in plan.adapter.carried)
            ):
                what = "for_server: is of a pipeline, of another kind than LoRA, has biases beside its factors, or holds a tied delta twice"
                raise UnsupportedError(f"{plan.adapter.path}: {what}; use `streamer merge`")
            self._rank = server_rank(plan.adapter.path, max(t.module.rank for t in plan.targets))
        entries = [(name, t.dtype, self._shape(t)) for name, t in self._read.items()]
        metadata = {key: text for key, text in header.metadata.items() if key not in HASHES}
        shard = plan_shard(
            plan.adapter.file.path.name, entries, {**metadata, **job.stamp("mitigate")}
        )
        config = next((config.read_bytes() for config in plan.adapter.config_paths), None)
        # Factors are written in PEFT's order of columns, and PEFT needs the type.
        plain = {k: v for k, v in values.items() if k not in (LAYOUT_KEY, LAYOUT_DETAILS)} | {
            "peft_type": kind
        }
        if job.for_server:
            plain |= {
                "r": self._rank,
                "lora_alpha": self._rank,
                "use_rslora": False,
                **{key: {} for key in PATTERNS},
            }
        if config is not None and plain != values:
            config = json.dumps(plain, indent=2, ensure_ascii=False).encode() + b"\n"
        super().__init__(job, path, shard, config, plan.adapter.directory)
        self.advice += server_advice(plain, entries, job.for_server)

    def _shape(self, info: TensorInfo) -> tuple[int, ...]:
        """Return the written shape of a tensor: of factors, one side has the rank, times the number of experts that the tensor holds."""
        targets = self._factors.targets.get(info.name, ())
        if not (targets and self._rank):
            return info.shape
        module = targets[0].module.factors
        assert module is not None
        shape, side = [*info.shape], int(info.name == module.b)
        shape[side] = self._rank * (module.expert[1] if module.expert else 1)
        return tuple(shape)

    def estimates(self, resident: int) -> Iterator[MemoryEstimate]:
        """Estimate the peak memory for each matrix; for experts, whose factors share a tensor, including all factors, old and new."""
        job, plan = self.job, self.job.plan
        for target in plan.targets:
            size = job.mitigation_bytes(target, projected=True)
            if target.module.factors is not None and target.module.factors.expert is not None:
                size += 2 * sum(
                    plan.adapter.tensors[name].info.nbytes for name in self._factors.names(target)
                )
            yield MemoryEstimate(target.tensor, target.module.shape, resident + size)

    def tensor_bytes(
        self, info: TensorInfo, job: Job, metrics: list[MitigatedMatrix]
    ) -> Iterable[Piece]:
        """Yield the bytes of a tensor; tensors that are not factors, or do not change, keep the file's bytes."""
        file, info = job.plan.adapter.file, self._read[info.name]
        targets = self._factors.targets.get(info.name, ())
        if targets and info.name not in self._ready:
            factors, rows = MitigatedFactors(job).of(targets)
            self._ready |= self._served(factors, targets, rows) if self._rank else factors
            metrics += rows
        new = self._ready.pop(info.name, None)
        return file.chunks(info) if new is None else [Piece(as_bytes(new))]

    def _served(
        self,
        factors: Mapping[str, Tensor | None],
        targets: Sequence[Target],
        metrics: Sequence[MitigatedMatrix],
    ) -> dict[str, Tensor | None]:
        """Scale and extend factors, and add what rounding the scaled lora_B loses to the metrics of their targets."""
        tensors = self.job.plan.adapter.tensors
        values = {
            name: tensors[name].whole() if new is None else new for name, new in factors.items()
        }
        out = {name: t.new_zeros(self._shape(tensors[name].info)) for name, t in values.items()}
        for target, row in zip(targets, metrics, strict=True):
            assert target.module.factors is not None
            module = replace(
                target.module.factors, grouped=False
            )  # columns are in PEFT's order by now
            wide = replace(module, rank=self._rank)
            (a, b), (wide_a, wide_b) = module.expert_slices, wide.expert_slices
            A, B = values[module.a][a], values[module.b][b]
            scaled = B.double() * module.scaling
            written = encode(scaled, B.dtype, module.b)
            out[module.a][wide_a][: module.rank] = A
            out[module.b][wide_b][:, : module.rank] = written
            lost = LowRank((written.double() - scaled).flatten(1), A.double().flatten(1).T).norm()
            row["dropped"] = math.hypot(row["dropped"], lost / (row["delta_norm_after"] or 1.0))
        return {**out}
