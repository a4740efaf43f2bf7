"""A mitigated delta of any kind as a LoRA adapter of a chosen rank: the nearest of that rank, and how far it is off."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from streamer.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME
from streamer.adapters.config_rules import is_residual
from streamer.adapters.finetuned import FinetunedModel
from streamer.adapters.tensor_names import normalize
from streamer.errors import UnsupportedError, UsageError
from streamer.linalg.deltas import Delta, norm
from streamer.linalg.operators import Dense, LowRank
from streamer.linalg.svd import krylov_triplets
from streamer.output.job import Job, output_plan, plan_card
from streamer.output.lora_layout import PREFIX, LoraLayout, lora_layout
from streamer.output.memory import mitigation_bytes
from streamer.output.metrics import matrix_figures
from streamer.output.records import MitigatedMatrix
from streamer.plan.memory import MemoryEstimate, resident_bytes
from streamer.plan.plan import Plan
from streamer.plan.side_files import other_files, skipped_files
from streamer.plan.targets import Target
from streamer.plan.tokenizer import own_tokenizer
from streamer.plan.transformers_renames import renames_for
from streamer.storage.atomic import Buffer
from streamer.storage.checkpoint import INDEX_NAME, SINGLE_NAME
from streamer.storage.header import TensorInfo
from streamer.storage.output_plan import RECORD_NAME
from streamer.storage.shard_writer import ShardPlan, Source, plan_shard
from streamer.weights.dtypes import as_bytes

SMALL = 1024
"""Up to this many rows or columns a dense delta is truncated by LAPACK's SVD, and above by the Krylov solver."""


class LoraSink:
    """Writes the mitigated deltas as a LoRA adapter of rank `rank` and scale 1, in float32; what is carried along keeps its bytes."""

    command = "mitigate"

    def __init__(self, job: Job, path: Path, rank: int) -> None:
        plan = job.plan
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise UsageError(f"to_lora: expected a rank from 1, found {rank!r}")
        if reason := refusal(job):
            raise UnsupportedError(f"{plan.adapter.path}: {reason}; --to-lora cannot write it: use `streamer merge`")
        self.job, self.rank = job, rank
        self._beside = _beside_factors(plan)
        self._of: dict[str, Target] = {}
        entries: list[tuple[str, str, Iterable[int]]] = []
        for target in plan.targets:
            for name, shape in self._tensors(target).items():
                self._of[name] = target
                entries.append((name, "F32", shape))
        self._carried = self._beside.carried
        entries += [(name, part.info.dtype, part.info.shape) for name, part in self._carried.items()]
        self.shards: Mapping[str, ShardPlan] = {
            WEIGHTS_NAME: plan_shard(WEIGHTS_NAME, entries, {"format": "pt"} | job.stamp(self.command))
        }
        self.edited: Mapping[str, bytes] = {}
        # A model's other files are not an adapter's.
        beside = None if plan.adapter.describes_model else plan.adapter.path
        self.copies = [] if beside is None else [(name, p) for name, p in other_files(beside) if name != CONFIG_NAME]
        config = json.dumps(self._config(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        self.finals: Mapping[str, bytes] = {CONFIG_NAME: config.encode()}
        own = (WEIGHTS_NAME, RECORD_NAME)
        self.skipped_files = [] if beside is None else [name for name in skipped_files(beside) if name not in own]
        self.to_lora: int | None = rank
        self.warnings = job.warnings
        self.notes: list[str] = []
        self.advice: list[str] = []
        self.tokenizer: Literal["adapter", "base"] | None = own_tokenizer(self.copies)
        self.card, self.copies = plan_card(self)
        self.output = output_plan(
            self, path, conflicting_names=("adapter_model.bin", SINGLE_NAME, INDEX_NAME), to_lora=rank
        )
        self._ready: dict[str, Tensor] = {}

    def needs(self) -> Iterator[MemoryEstimate]:
        """Memory for each matrix."""
        plan = self.job.plan
        resident = resident_bytes(plan)
        for target in plan.targets:
            size = mitigation_bytes(plan, target, self.job.intruders(target), projected=True)
            if not target.module.low_rank:
                size += truncation_bytes(target.module.shape, self.rank, plan.weights[target.tensor].compute.itemsize)
            yield MemoryEstimate(target.tensor, target.module.shape, resident + size)

    def source(self, name: str, figures: list[MitigatedMatrix]) -> Source:
        """Bytes of each tensor; appends each matrix's figures, `dropped` being the relative norm of what the rank leaves out."""

        def pour(info: TensorInfo) -> Iterable[Buffer]:
            if info.name in self._carried:
                part = self._carried[info.name]
                return part.file.chunks(part.info)
            if info.name not in self._ready:
                self._ready |= self._factors(self._of[info.name], figures)
            return [as_bytes(self._ready.pop(info.name))]

        return pour

    def _factors(self, target: Target, figures: list[MitigatedMatrix]) -> dict[str, Tensor]:
        delta, after, found = self.job.mitigated(target)
        nearest = truncated(after, self.rank, target.tensor)
        B, A = nearest.L.float(), nearest.R.T.float()
        written = LowRank(B.double(), A.double().T)
        figures.append(matrix_figures(target, delta, written, found, self.job.options.scale, _left_out(after, written)))
        shapes = self._tensors(target)
        return {
            name: factor.reshape(shapes[name]).contiguous()
            for name, factor in zip(shapes, (A, B, B.T, A.T), strict=False)
        }

    def _tensors(self, target: Target) -> dict[str, tuple[int, ...]]:
        """Names and shapes of A and B as PEFT stores them; and of an lm_head's that is tied to the target."""
        (m, n), kernel, rank = target.module.shape, target.kernel, self.rank
        module = self._beside.names.get(target.module.name, target.module.name)
        stem = f"{PREFIX}{module}"
        if target.is_embedding:
            tensors: dict[str, tuple[int, ...]] = {
                f"{stem}.lora_embedding_A": (rank, n),
                f"{stem}.lora_embedding_B": (m, rank),
            }
            head = self._beside.heads.get(target.module.name)
            return tensors | _linear(f"{PREFIX}{head}", (n, m), rank, ()) if head else tensors
        return _linear(stem, (m, n), rank, kernel)

    def _config(self) -> dict[str, Any]:
        """A plain LoRA config: where it goes, what is carried along, and nothing of how the old adapter was trained."""
        plan, names = self.job.plan, self._beside.names
        return {
            **self._beside.config,
            "peft_type": "LORA",
            "fan_in_fan_out": any(t.transposed and not t.is_embedding for t in plan.targets),
            "r": self.rank,
            "lora_alpha": self.rank,
            "target_modules": [
                *(names.get(t.module.name, t.module.name) for t in plan.targets),
                *self._beside.heads.values(),
            ],
            "bias": "all" if any(name.endswith(".bias") for name in self._carried) else "none",
            "init_lora_weights": True,
            "inference_mode": True,
        }


def _linear(stem: str, shape: tuple[int, int], rank: int, kernel: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    m, n = shape
    inner = (n // math.prod(kernel), *kernel)
    return {f"{stem}.lora_A.weight": (rank, *inner), f"{stem}.lora_B.weight": (m, rank, *(1 for _ in kernel))}


def _beside_factors(plan: Plan) -> LoraLayout:
    """What else stands in the adapter: of one that is read, what it carries, under the same names."""
    adapter = plan.adapter
    if isinstance(adapter, FinetunedModel):
        matched = {t.module.name: t.tensor for t in plan.targets}
        return lora_layout(adapter, plan.base, matched, plan.edits, renames_for(plan.config))
    kept = ("base_model_name_or_path", "modules_to_save", "peft_version", "revision", "task_type",
            "trainable_token_indices")  # fmt: skip
    config = {key: adapter.config.values[key] for key in kept if key in adapter.config.values}
    carried = {PREFIX + normalize(c.source): adapter.tensors[c.source] for c in adapter.carried}
    return LoraLayout({}, carried, config, {})


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


def refusal(job: Job) -> str:
    """Why a plain LoRA adapter cannot say what an adapter does; empty where it can."""
    adapter = job.plan.adapter
    if is_residual(adapter.config):
        return "is relative to a residual base, which a plain config does not say"
    if adapter.wrapped:
        return "is on experts' parameters, which a plain config does not name"
    if job.plan.mirrors:
        return "holds the delta of a tied embedding twice (ensure_weight_tying)"
    if any(c.role == "lora_bias" for c in adapter.carried):
        return "has biases beside its factors (lora_bias), which have no place in another scale"
    return ""
