"""Write mitigated deltas of any kind as a LoRA adapter of a chosen rank: the nearest of that rank, and its error."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamer.adapters.adapter_config import WEIGHTS_NAME
from streamer.adapters.finetuned import FinetunedModel
from streamer.adapters.modules import MethodModule
from streamer.adapters.rules import is_residual
from streamer.adapters.tensor_names import PREFIX, saved_names
from streamer.errors import UnsupportedError, UsageError
from streamer.linalg.energy import energies, energies_bytes, least_rank
from streamer.linalg.low_rank import LowRank
from streamer.linalg.operators import Delta, Dense
from streamer.linalg.svd import krylov_triplets
from streamer.output.job import Job
from streamer.output.lora_layout import LoraLayout, is_refused, lora_layout
from streamer.output.merged_tensors import AddDelta
from streamer.output.metrics import matrix_metrics
from streamer.output.mitigation_memory import mitigation_bytes
from streamer.output.output_spec import Writer, adapter_spec
from streamer.output.records import MitigatedMatrix
from streamer.plan.architectures import architecture_for
from streamer.plan.batch import AdapterBatch
from streamer.plan.memory_estimate import MemoryEstimate, check_budget, resident_bytes
from streamer.plan.plan import Plan
from streamer.plan.targets import Target
from streamer.plan.transformers_renames import renames_for
from streamer.storage.buffers import Piece
from streamer.storage.header import TensorInfo
from streamer.storage.shard_writer import plan_shard
from streamer.units import listed
from streamer.weights.base import StoredTensor, equal
from streamer.weights.dtypes import as_bytes

Shapes = dict[str, tuple[tuple[int, ...], str]]
"""For the name of each tensor of factors: its shape, and the factor."""

SMALL = 1024
"""Largest number of rows or columns for which a dense delta is truncated by LAPACK's SVD; above, the Krylov solver is used."""


class LoraWriter(Writer):
    """Writer of the mitigated deltas as a LoRA adapter of scale 1, in float32; carried tensors keep their bytes.

    Parameters
    ----------
    rank
        The rank of all modules; or, as a float in (0, 1], the share of each delta's energy that its rank must keep.
    """

    written: list[Target]

    def __init__(self, job: Job, path: Path, rank: int | float) -> None:
        plan = job.plan
        good = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
        if not (good or (isinstance(rank, float) and 0 < rank <= 1)):
            raise UsageError(
                f"to_lora: expected a rank from 1, or a share in (0, 1] with a decimal point, found {rank!r}"
            )
        if reason := refusal(job):
            raise UnsupportedError(f"{plan.adapter.path}: {reason}; --to-lora cannot write it: use `streamer merge`")
        self._plan = plan
        self._layout = _layout(plan)
        self.written = [target for target in plan.targets if target.module.name in self._layout.names]
        in_factors = [target for target in self.written if target.module.name not in self._layout.whole]
        self._least = rank if isinstance(rank, int) else 1
        self._ranks = (
            {t.module.name: rank for t in in_factors} if isinstance(rank, int) else _least_ranks(job, in_factors, rank)
        )
        self._targets: dict[str, Target] = {}
        entries: list[tuple[str, str, Iterable[int]]] = []
        for target in self.written:
            written: list[tuple[str, str, Iterable[int]]]
            if target.module.name in self._layout.whole:
                info = plan.base.info(target.tensor)
                written = [(f"{PREFIX}{self._layout.names[target.module.name]}.weight", info.dtype, info.shape)]
            else:
                written = [(name, "F32", shape) for name, (shape, _) in self._tensors(target).items()]
            entries += written
            self._targets |= dict.fromkeys((name for name, *_ in written), target)
        entries += [(name, stored.info.dtype, stored.info.shape) for name, stored in self._layout.carried.items()]
        shard = plan_shard(WEIGHTS_NAME, entries, {"format": "pt"} | job.stamp("mitigate", self.written))
        config = json.dumps(self._config(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        # A model's other files do not belong to an adapter.
        source = None if plan.adapter.describes_model else plan.adapter.directory
        spec = adapter_spec(job, path, shard, config.encode(), source, rank)
        self.spec = replace(spec, notes=[*spec.notes, *_ties_said(self._layout)])
        self._ready: dict[str, Tensor] = {}

    def estimates(self, resident: int) -> Iterator[MemoryEstimate]:
        """Estimate the peak memory for each matrix."""
        plan = self._plan
        for target in self.written:
            whole = target.module.name in self._layout.whole
            size = mitigation_bytes(plan, target, self.spec.job.intruders(target), projected=not whole)
            if not (target.module.low_rank or whole):
                size += truncation_bytes(
                    target.module.shape, self._ranks[target.module.name], plan.weights[target.tensor].compute.itemsize
                )
            yield MemoryEstimate(target.tensor, target.module.shape, resident + size)

    def tensor_bytes(self, info: TensorInfo, job: Job, metrics: list[MitigatedMatrix]) -> Iterable[Piece]:
        """Yield the bytes of a tensor; the metrics include the relative norm of the part beyond the rank."""
        if stored := self._layout.carried.get(info.name):
            return stored.file.chunks(stored.info)
        target = self._targets[info.name]
        if target.module.name in self._layout.whole:
            delta, after, found = job.mitigated(target)
            metrics.append(matrix_metrics(target, delta, after, found, job.method))
            return AddDelta(self._plan.weights[target.tensor], target).pieces(lambda _: (delta, after))
        if info.name not in self._ready:
            self._ready |= self._factors(job, target, metrics)
        return [Piece(as_bytes(self._ready.pop(info.name)))]

    def _factors(self, job: Job, target: Target, metrics: list[MitigatedMatrix]) -> dict[str, Tensor]:
        delta, after, found = job.mitigated(target)
        nearest = truncated(after, self._ranks[target.module.name], target.tensor)
        B, A = nearest.L.float(), nearest.R.T.float()
        written = LowRank(B.double(), A.double().T)
        norm = after.norm()
        error = after.distance(written) / norm if norm else 0.0  # of the written factors, including rounding
        metrics.append(matrix_metrics(target, delta, written, found, job.method, error))
        factors = {"A": A, "B": B, "Aᵀ": A.T, "Bᵀ": B.T}
        return {name: factors[f].reshape(shape).contiguous() for name, (shape, f) in self._tensors(target).items()}

    def _tensors(self, target: Target) -> Shapes:
        """Return PEFT's names for A and B of the target, and of modules tied to it, with the shape and the factor of each."""
        shape, name = target.module.shape, target.module.name
        rank, stem = self._ranks[name], f"{PREFIX}{self._layout.names[name]}"
        if not target.is_embedding and name not in self._layout.embeddings:
            return _linear(stem, shape, rank, target.kernel, ("A", "B"))
        # An embedding's factors belong to its transpose.
        factors, others = ("A", "B"), ("Bᵀ", "Aᵀ")
        if not target.transposed:
            shape, factors, others = shape[::-1], others, factors
        tensors = _embedding(stem, shape, rank, factors)
        for tied, is_embedding in self._layout.heads.get(name, {}).items():
            head = f"{PREFIX}{tied}"
            tensors |= (
                _embedding(head, shape, rank, factors) if is_embedding else _linear(head, shape[::-1], rank, (), others)
            )
        return tensors

    def _config(self) -> dict[str, Any]:
        """Make a plain LoRA config: the modules and the carried tensors, and nothing about the original adapter's training."""
        names, heads, adapter = self._layout.names, self._layout.heads, self._plan.adapter
        # A head's bias that is only saved along with a vocabulary that has grown is not trained.
        trained = adapter.describes_model or adapter.config.get("bias", "none") != "none"
        ranks = {path: r for name, r in self._ranks.items() for path in (names[name], *heads.get(name, ()))}
        largest = max(ranks.values(), default=self._least)
        others = {path: r for path, r in ranks.items() if r != largest}
        return {
            **self._layout.config,
            "peft_type": "LORA",
            "fan_in_fan_out": any(t.transposed and not t.is_embedding for t in self.written),
            "r": largest,
            "lora_alpha": largest,
            **({"rank_pattern": others, "alpha_pattern": others} if others else {}),
            "target_modules": [*ranks],
            "bias": "all" if trained and any(name.endswith(".bias") for name in self._layout.carried) else "none",
            "init_lora_weights": True,
            "inference_mode": True,
        }


def _least_ranks(job: Job, targets: Sequence[Target], share: float) -> dict[str, int]:
    """Find for each module the least rank that keeps this share of the energy of its mitigated delta.

    Raises
    ------
    UsageError
        If the mitigated deltas need findings that do not exist yet: the tensors' shapes must be known before anything is written.
    """
    if job.detects:
        raise UsageError(
            "to_lora: a share of the energy needs the findings before anything is written; run `streamer detect`, and pass them with "
            "--findings, or pass a rank"
        )
    plan, resident = job.plan, resident_bytes(AdapterBatch(job.plan.base, (job.plan,)))
    sizes = {
        target.tensor: mitigation_bytes(plan, target, job.intruders(target), projected=False)
        + (0 if target.module.low_rank else energies_bytes(target.module.shape))
        for target in targets
    }
    estimates = (MemoryEstimate(t.tensor, t.module.shape, resident + sizes[t.tensor]) for t in targets)
    check_budget(estimates, job.detection.max_memory)
    return {target.module.name: least_rank(energies(job.mitigated(target)[1]), share) for target in targets}


def _linear(stem: str, shape: tuple[int, int], rank: int, kernel: tuple[int, ...], factors: tuple[str, str]) -> Shapes:
    (m, n), (a, b) = shape, factors
    inner = (n // math.prod(kernel), *kernel)
    return {f"{stem}.lora_A.weight": ((rank, *inner), a), f"{stem}.lora_B.weight": ((m, rank, *(1 for _ in kernel)), b)}


def _embedding(stem: str, shape: tuple[int, int], rank: int, factors: tuple[str, str]) -> Shapes:
    (m, n), (a, b) = shape, factors
    return {f"{stem}.lora_embedding_A": ((rank, n), a), f"{stem}.lora_embedding_B": ((m, rank), b)}


def _ties_said(layout: LoraLayout) -> list[str]:
    """Note what PEFT's merge does with tied modules, whose factors an adapter stores twice."""
    if not layout.heads:
        return []
    tied = listed([repr(m) for name, heads in layout.heads.items() for m in (layout.names[name], *heads)])
    return [
        f"{tied} are tied, and each has the delta: PEFT's model answers correctly, but its merge_and_unload adds the delta of each to "
        "their one weight; use the adapter unmerged, or `streamer merge`"
    ]


def _is_unchanged(plan: Plan, target: Target) -> bool:
    """Test whether a fine-tuned model's matrix has the same bytes as the base's."""
    (piece,), tuned = target.slices, plan.adapter.stored_sum(target.module)
    base = StoredTensor(*plan.base.locate(piece.weight))
    return tuned is not None and equal(tuned, base if piece.index is None else base.slice(piece.index))


def _built_on_loading(plan: Plan) -> dict[str, str]:
    """Map each module of a fine-tuned model whose weight loading converts, such as a fused one → the resulting tensor.

    ``model.layers.0.mlp.experts.3.up_proj`` → ``model.layers.0.mlp.experts.gate_up_proj``, the stack of all experts.
    """
    if not isinstance(plan.adapter, FinetunedModel):
        return {}
    loaded = renames_for(plan.config).loaded(plan.adapter.tensors)
    return {made.tensor.removesuffix(".weight"): made.name for made in loaded if made.by is not None}


def _layout(plan: Plan) -> LoraLayout:
    """Lay out the adapter; an original adapter keeps its carried tensors under the same names."""
    adapter = plan.adapter
    if isinstance(adapter, FinetunedModel):
        # Changed tensors without a module of their own in a loaded model are refused.
        built = _built_on_loading(plan)
        targets = [t for t in plan.targets if not t.pieces and t.module.name not in built]
        changed = frozenset(t.module.name for t in targets if not _is_unchanged(plan, t))
        matched = {t.module.name: t.tensor for t in targets}
        architecture = architecture_for(adapter.model_config, plan.config.architecture)
        return lora_layout(adapter, architecture, plan.base, matched, changed, plan.edits, renames_for(plan.config))
    kept = ("base_model_name_or_path", "modules_to_save", "peft_version", "revision", "task_type",
            "trainable_token_indices")  # fmt: skip
    config = {key: adapter.config.values[key] for key in kept if key in adapter.config.values}
    names = saved_names(dict.fromkeys(c.source for c in adapter.carried))
    carried = {name: adapter.tensors[own] for name, own in names.items()}
    return LoraLayout({t.module.name: t.module.name for t in plan.targets}, carried, config, {})


def truncated(delta: Delta, rank: int, name: str = "") -> LowRank:
    """Compute the nearest matrix of that rank, its singular values split evenly between the factors; `name` seeds the Krylov solver."""
    return delta.nearest(rank, partial(_leading_triplets, seed=zlib.crc32(name.encode())))


def _leading_triplets(delta: Dense, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the leading singular triplets of a dense delta in float64: by LAPACK if it is small, else by the Krylov solver."""
    matrix = delta.dense()
    m, n = matrix.shape
    if not matrix.any():
        return matrix.new_zeros(m, 0).double(), matrix.new_zeros(0).double(), matrix.new_zeros(0, n).double()
    if _is_small((m, n), rank):
        U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        return U, S, Vh
    size = float(torch.linalg.vector_norm(matrix))
    generator = torch.Generator().manual_seed(seed)
    like, columns = matrix.new_empty(0), 4 * (rank + 16)
    found = krylov_triplets(Dense(matrix, 1 / size), rank, generator, like, columns, 64).triplets
    return found.U.double(), found.S.double() * size, found.Vh.double()


def truncation_bytes(shape: tuple[int, int], rank: int, itemsize: int) -> int:
    """Estimate the memory of `truncated` for a dense delta, in addition to the delta."""
    m, n = shape
    p = min(m, n)
    if _is_small(shape, rank):  # in float64: a copy, LAPACK's copy, both factors and the workspace
        return 8 * (2 * m * n + (m + n) * p + 5 * p * p)
    columns = 5 * (rank + 16)
    return (m + n + max(m, n)) * columns * itemsize + 8 * 8 * columns**2 + 2 * 8 * (m + n) * rank


def _is_small(shape: Sequence[int], rank: int) -> bool:
    return min(shape) <= max(SMALL, 4 * rank)


def refusal(job: Job) -> str:
    """Explain why a plain LoRA adapter cannot represent an adapter; empty if it can."""
    adapter = job.plan.adapter
    if job.plan.config.pipeline:
        return "belongs to a diffusers pipeline, which PEFT's names do not cover"
    if is_residual(adapter.config):
        return "is relative to a residual base, which a plain config does not say"
    if adapter.wrapped or any(t.pieces and not _is_unchanged(job.plan, t) for t in job.plan.targets):
        return "is on experts' parameters, which a plain config does not name"
    built = _built_on_loading(job.plan)
    for target in job.plan.targets:
        if (name := target.module.name) in built and not _is_unchanged(job.plan, target):
            return (
                f"changes {name!r}, which loading turns into {built[name]!r}: PEFT has no LoRA for it under this name"
            )
        one_channel = isinstance(target.module, MethodModule) and target.module.shape[1] == math.prod(target.kernel) > 1
        if one_channel and not adapter.describes_model:
            return f"changes {name!r}, a convolution with one channel per group; PEFT's LoRA needs their number, which no file states"
    architecture = None if not adapter.describes_model else architecture_for(job.plan.config)
    if architecture is not None and architecture.input_embedding is None and any(t.tied for t in architecture.ties):
        return f"is a {architecture.name}, which ties weights and has no input embedding: PEFT opens no adapter for it"
    if job.plan.mirrors:
        return "holds the delta of a tied embedding twice (ensure_weight_tying)"
    written = (t.module.name for t in job.plan.targets if not adapter.describes_model)
    if refused := [m for m in written if is_refused(m, job.plan.config.model_type)]:
        return f"changes {refused[0]!r}, which PEFT refuses LoRA for in models of type {job.plan.config.model_type!r}"
    if any(c.role == "lora_bias" for c in adapter.carried):
        return "has biases beside its factors (lora_bias), which have no place in another scale"
    return ""
