"""A mitigated delta of any kind as a LoRA adapter of a chosen rank: the nearest of that rank, and how far it is off."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamer.adapter import CONFIG_NAME, WEIGHTS_NAME
from streamer.apply import Job, matrix_figures, output_plan
from streamer.budget import Need, mitigation_bytes, resident_bytes
from streamer.encodings import as_bytes
from streamer.errors import UnsupportedError, UsageError
from streamer.kinds import is_residual
from streamer.linalg.deltas import Delta, norm
from streamer.linalg.operators import Dense, LowRank
from streamer.linalg.svd import krylov_triplets
from streamer.plan import left_out, other_files
from streamer.storage.atomic import Buffer
from streamer.storage.checkpoint import INDEX_NAME, SINGLE_NAME
from streamer.storage.header import TensorInfo
from streamer.storage.shards import ShardPlan, Source, plan_shard
from streamer.storage.transaction import RECORD_NAME
from streamer.targets import Target

SMALL = 1024
"""Up to this many rows or columns a dense delta is truncated by LAPACK's SVD, and above by the Krylov solver."""


class LoraSink:
    """Writes the mitigated deltas as a LoRA adapter of rank `rank` and scale 1, in float32; what is carried along keeps its bytes."""

    command = "mitigate"

    def __init__(self, job: Job, path: Path, rank: int) -> None:
        plan = job.plan
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise UsageError(f"to_lora: expected a rank from 1, found {rank!r}")
        _refuse_what_a_plain_adapter_cannot_say(job)
        self.job, self.rank = job, rank
        self._of: dict[str, tuple[Target, str]] = {}
        entries: list[tuple[str, str, Iterable[int]]] = []
        for target in plan.targets:
            for factor, (name, shape) in zip("AB", _tensors(target, rank), strict=True):
                self._of[name] = target, factor
                entries.append((name, "F32", shape))
        prefix = "base_model.model." if plan.adapter.is_model else ""
        self._carried = {prefix + c.source: plan.adapter.parts[c.source] for c in plan.adapter.carried}
        entries += [(name, part.info.dtype, part.info.shape) for name, part in self._carried.items()]
        self.shards: Mapping[str, ShardPlan] = {WEIGHTS_NAME: plan_shard(WEIGHTS_NAME, entries, {"format": "pt"})}
        self.edited: Mapping[str, bytes] = {}
        # A model's other files are not an adapter's.
        beside = None if plan.adapter.is_model else plan.adapter.path
        self.copies = [] if beside is None else [(name, p) for name, p in other_files(beside) if name != CONFIG_NAME]
        config = json.dumps(_config(job, rank), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        self.finals: Mapping[str, bytes] = {CONFIG_NAME: config.encode()}
        own = (WEIGHTS_NAME, RECORD_NAME)
        self.left_out = [] if beside is None else [name for name in left_out(beside) if name not in own]
        self.output = output_plan(self, path, rivals=("adapter_model.bin", SINGLE_NAME, INDEX_NAME), to_lora=rank)
        self._ready: dict[str, Tensor] = {}

    def needs(self) -> Iterator[Need]:
        """Memory for each matrix."""
        plan = self.job.plan
        resident = resident_bytes(plan)
        for target in plan.targets:
            size = mitigation_bytes(plan, target, self.job.intruders(target), projected=True)
            if not target.module.low_rank:
                size += truncation_bytes(target.module.shape, self.rank, plan.weights[target.tensor].compute.itemsize)
            yield Need(target.tensor, target.module.shape, resident + size)

    def source(self, name: str, figures: list[dict[str, Any]]) -> Source:
        """Bytes of each tensor; appends each matrix's figures, `dropped` being the relative norm of what the rank leaves out."""

        def pour(info: TensorInfo) -> Iterable[Buffer]:
            if info.name in self._carried:
                part = self._carried[info.name]
                return part.file.chunks(part.info)
            target, factor = self._of[info.name]
            if factor == "A":
                self._ready = self._factors(target, figures)
            return [as_bytes(self._ready.pop(factor))]

        return pour

    def _factors(self, target: Target, figures: list[dict[str, Any]]) -> dict[str, Tensor]:
        delta, after, found = self.job.mitigated(target)
        nearest = truncated(after, self.rank, target.tensor)
        B, A = nearest.L.float(), nearest.R.T.float()
        written = LowRank(B.double(), A.double().T)
        figures.append(matrix_figures(target, delta, written, found, self.job.options.scale, _left_out(after, written)))
        return {"A": A, "B": B}


def truncated(delta: Delta, rank: int, name: str = "") -> LowRank:
    """The nearest matrix of that rank, its singular values shared evenly between the factors; `name` seeds the Krylov solver."""
    if isinstance(delta, LowRank):
        return delta.to(torch.float64).truncated(rank)[0]
    matrix = delta.dense()
    if not matrix.any():
        return LowRank(*(matrix.new_zeros((length, rank), dtype=torch.float64) for length in matrix.shape))
    if _is_small(matrix.shape, rank):
        U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    else:
        size = float(torch.linalg.vector_norm(matrix))
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        found = krylov_triplets(
            Dense(matrix, 1 / size), rank, generator, matrix.new_empty(0), 4 * (rank + 16), 64
        ).triplets
        U, S, Vh = found.U.double(), found.S.double() * size, found.Vh.double()
    root = S[:rank].sqrt()
    pad = (0, rank - len(root))
    return LowRank(torch.nn.functional.pad(U[:, :rank] * root, pad), torch.nn.functional.pad(Vh[:rank].T * root, pad))


def truncation_bytes(shape: tuple[int, int], rank: int, itemsize: int) -> int:
    """Memory for `truncated` with a dense delta, beside the delta."""
    m, n = shape
    p = min(m, n)
    if _is_small(shape, rank):  # in float64: a copy, LAPACK's own, both factors and the workspace
        return 8 * (2 * m * n + (m + n) * p + 5 * p * p)
    columns = 5 * (rank + 16)
    return (m + n + max(m, n)) * columns * itemsize + 8 * 8 * columns**2 + 2 * 8 * (m + n) * rank


def _is_small(shape: Sequence[int], rank: int) -> bool:
    return min(shape) <= max(SMALL, 4 * rank)


def _left_out(delta: Delta, written: LowRank) -> float:
    """``‖Δ' − B·A‖_F / ‖Δ'‖_F`` of what is written, rounding and all."""
    total = norm(delta)
    if total == 0:
        return 0.0
    if isinstance(delta, LowRank):
        return (delta.to(torch.float64) + written.scaled(-1)).norm() / total
    rows = zip(torch.split(delta.dense(), 256), torch.split(written.L, 256), strict=True)
    squares = (float(torch.linalg.vector_norm(torch.addmm(D.double(), L, written.R.T, alpha=-1))) ** 2 for D, L in rows)
    return math.sqrt(sum(squares)) / total


def _tensors(target: Target, rank: int) -> tuple[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]]:
    """(name, shape) of both factors as PEFT stores them."""
    (m, n), kernel = target.module.shape, target.kernel
    stem = f"base_model.model.{target.module.name}"
    if target.is_embedding:
        return (f"{stem}.lora_embedding_A", (rank, n)), (f"{stem}.lora_embedding_B", (m, rank))
    inner = (n // int(torch.Size(kernel).numel()), *kernel)
    return (f"{stem}.lora_A.weight", (rank, *inner)), (f"{stem}.lora_B.weight", (m, rank, *(1 for _ in kernel)))


def _config(job: Job, rank: int) -> dict[str, Any]:
    """A plain LoRA config: where it goes, what is carried along, and nothing of how the old adapter was trained."""
    old = job.plan.adapter.config
    if job.plan.adapter.is_model:
        old = {"modules_to_save": sorted({c.module for c in job.plan.adapter.carried if c.parameter != "bias"}) or None}
    kept = ("base_model_name_or_path", "modules_to_save", "peft_version", "revision", "task_type",
            "trainable_token_indices")  # fmt: skip
    trained = any(c.parameter == "bias" for c in job.plan.adapter.carried)
    return {key: old[key] for key in kept if key in old} | {
        "peft_type": "LORA",
        "fan_in_fan_out": any(t.transposed and not t.is_embedding for t in job.plan.targets),
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [t.module.name for t in job.plan.targets],
        "bias": "all" if trained else "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _refuse_what_a_plain_adapter_cannot_say(job: Job) -> None:
    adapter = job.plan.adapter
    reason = ""
    if is_residual(adapter.config):
        reason = "is relative to a residual base, which a plain config does not say"
    elif adapter.wrapped:
        reason = "is on experts' parameters, which a plain config does not name"
    elif job.plan.mirrors:
        reason = "holds the delta of a tied embedding twice (ensure_weight_tying)"
    elif any(c.role == "lora_bias" for c in adapter.carried):
        reason = "has biases beside its factors (lora_bias), which have no place in another scale"
    if reason:
        raise UnsupportedError(f"{adapter.path}: {reason}; --to-lora cannot write it: use `streamer merge`")
