"""Write mitigated deltas as a LoRA adapter of a chosen rank."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamer.adapters.adapter import PREFIX, saved_names
from streamer.adapters.adapter_config import (
    WEIGHTS_NAME,
    is_residual,
)
from streamer.adapters.finetuned import FinetunedModel
from streamer.adapters.modules import MethodModule
from streamer.errors import UnsupportedError, UsageError
from streamer.linalg.operators import Delta, Dense, LowRank
from streamer.linalg.svd import energies, energies_bytes, krylov_triplets, least_rank
from streamer.output.factors import OneFileWriter, server_advice, server_rank
from streamer.output.job import Job
from streamer.output.model_writer import AddDelta
from streamer.output.record import MitigatedMatrix
from streamer.plan.architectures import Architecture, architecture_for
from streamer.plan.names import NameIndex
from streamer.plan.plan import AdapterBatch, MemoryEstimate, Plan, check_budget, resident_bytes
from streamer.plan.targets import Target
from streamer.storage.atomic_file import Piece, plan_shard
from streamer.storage.header import TensorInfo
from streamer.units import listed
from streamer.weights.base import StoredTensor, as_bytes, equal

OF_MAMBA = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
"""Model types in which PEFT 0.21 refuses LoRA for modules whose weights are passed to kernels without calling the module."""

REFUSED_IN_MAMBA = frozenset({"conv1d", "out_proj"})
"""Last names of those modules."""

EXPERTS_OF_QWEN2, EXPERTS_OF_MIXTRAL = (
    ("gate", "gate_proj", "up_proj", "down_proj"),
    ("gate", "w1", "w2", "w3"),
)

TAKEN_FOR_EXPERTS = dict.fromkeys(("minimax", "minimax_m2"), EXPERTS_OF_MIXTRAL) | dict.fromkeys(
    (
        "afmoe",
        "beam",
        "cohere2_moe",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "dots1",
        "ernie4_5_moe",
        "exaone_moe",
        "flex_olmo",
        "glm4_moe",
        "glm4_moe_lite",
        "glm4v_moe",
        "glm_moe_dsa",
        "hunyuan_v1_moe",
        "longcat_flash",
        "mellum",
        "olmoe",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_omni_moe",
        "qwen3_omni_moe_text",
        "qwen3_omni_moe_thinker",
        "sarvam_mla",
        "solar_open",
    ),
    EXPERTS_OF_QWEN2,
)
"""Model type → last names of modules that PEFT 0.21 treats as experts anywhere, and so skips in layers without experts."""


@dataclass(frozen=True)
class LoraLayout:
    """Tensors of a LoRA adapter other than factors, and the names of its modules.

    Attributes
    ----------
    names
        Modules with factors → their names in a loaded model.
    carried
        Tensor's name in the adapter → its contents.
    config
        Config entries for these tensors.
    heads
        Embedding's module → modules that are tied to it and get the same delta, and whether each is an embedding.
    embeddings
        Modules that are embeddings in the model's class.
    whole
        Modules saved with their mitigated weight instead of factors, because PEFT has no LoRA for them.
    """

    names: Mapping[str, str]
    carried: Mapping[str, StoredTensor]
    config: Mapping[str, Any]
    heads: Mapping[str, Mapping[str, bool]]
    embeddings: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()


def _tied_modules(
    names: NameIndex, architecture: Architecture | None
) -> dict[str, tuple[str, list[str]]]:
    """Map each module whose weight others share, by its name on disk → its run-time name and the others'."""
    tied = {}
    for tie in names.ties(architecture):
        if tie.stored.endswith(".weight") and not {*tie.others} & names.loaded.keys():
            module = next(
                name.removesuffix(".weight")
                for name in tie.on_disk
                if tie.on_disk[name] == tie.stored
            )
            others = [
                m
                for name in tie.on_disk
                if (m := name.removesuffix(".weight")) not in (module, name)
            ]
            tied[tie.stored.removesuffix(".weight")] = module, others
    return tied


def is_refused(module: str, model_type: str | None) -> bool:
    """Test whether PEFT refuses LoRA for a module, or treats it as an expert's."""
    last = module.rpartition(".")[2]
    in_mamba = model_type in OF_MAMBA and last in REFUSED_IN_MAMBA
    return in_mamba or last in TAKEN_FOR_EXPERTS.get(model_type or "", ())


def has_no_lora(
    name: str, stored: tuple[int, ...], architecture: Architecture | None, model_type: str | None
) -> bool:
    """Test whether PEFT has no LoRA for a module of a loaded model, or one whose forward pass differs from the merged model's.

    Models look up positions by offsets or masks, but PEFT's LoRA of an embedding needs ids. They use the weight of a step size's projection
    (``dt_proj``), and the weight or stride of a convolution over a sequence, without calling the module. A convolution of one channel may
    be one of many groups.
    """
    if name.rpartition(".")[2] == "dt_proj" or is_refused(name, model_type):
        return True
    if len(stored) > 2:
        return len(stored) == 3 or stored[1] == 1
    if architecture is None:
        return False
    of_tokens = (
        name == architecture.input_embedding
        or architecture.vocabulary_keys(f"{name}.weight") is not None
    )
    positions = architecture.is_embedding(name) and not of_tokens
    return positions or architecture.is_matrix(f"{name}.weight")


Shapes = dict[str, tuple[tuple[int, ...], str]]
"""For the name of each tensor of factors: its shape, and the factor."""

SMALL = 1024
"""Largest number of rows or columns for which a dense delta is truncated by LAPACK's SVD; above, the Krylov solver is used."""


class LoraWriter(OneFileWriter):
    """Writer of the mitigated deltas as a LoRA adapter of scale 1, in float32; carried tensors keep their bytes.

    Parameters
    ----------
    rank
        The rank of all modules; or, as a float in (0, 1], the share of each delta's energy that its rank must keep.
    """

    def __init__(self, job: Job, path: Path, rank: int | float) -> None:
        plan = job.plan
        if reason := refusal(job):
            raise UnsupportedError(
                f"{plan.adapter.path}: {reason}; --to-lora cannot write it: use `streamer merge`"
            )
        self._plan, self._layout = plan, _layout(plan)
        written = [target for target in plan.targets if target.module.name in self._layout.names]
        in_factors = [target for target in written if target.module.name not in self._layout.whole]
        self._least = rank if isinstance(rank, int) else 1
        self._ranks = {t.module.name: self._least for t in in_factors}
        if isinstance(rank, float):
            self._ranks = _least_ranks(job, in_factors, rank)
            if job.for_server:
                common = server_rank(plan.adapter.path, max(self._ranks.values()))
                self._ranks = dict.fromkeys(self._ranks, common)
        self._targets: dict[str, Target] = {}
        entries: list[tuple[str, str, tuple[int, ...]]] = []
        for target in written:
            if target.module.name in self._layout.whole:
                info = plan.base.info(target.tensor)
                made = [
                    (
                        f"{PREFIX}{self._layout.names[target.module.name]}.weight",
                        info.dtype,
                        info.shape,
                    )
                ]
            else:
                made = [(name, "F32", shape) for name, (shape, _) in self._tensors(target).items()]
            entries += made
            self._targets |= dict.fromkeys((name for name, *_ in made), target)
        entries += [
            (name, stored.info.dtype, stored.info.shape)
            for name, stored in self._layout.carried.items()
        ]
        shard = plan_shard(WEIGHTS_NAME, entries, {"format": "pt"} | job.stamp("mitigate", written))
        values = self._config(written)
        config = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        # A model's other files do not belong to an adapter.
        source = None if plan.adapter.describes_model else plan.adapter.directory
        super().__init__(job, path, shard, config.encode(), source, rank, written)
        self.advice += server_advice(values, entries, job.for_server)
        if heads := self._layout.heads:  # factors of tied modules are stored twice
            tied = listed(
                [repr(m) for name in heads for m in (self._layout.names[name], *heads[name])]
            )
            but = "but its merge_and_unload adds the delta of each to their one weight; use the adapter unmerged, or `streamer merge`"
            self.notes.append(
                f"{tied} are tied, and each has the delta: PEFT's model answers correctly, {but}"
            )

    def estimates(self, resident: int) -> Iterator[MemoryEstimate]:
        """Estimate the peak memory for each matrix."""
        plan = self._plan
        for target in self.written or ():
            whole = target.module.name in self._layout.whole
            size = self.job.mitigation_bytes(target, projected=not whole)
            if not (target.module.low_rank or whole):
                rank, itemsize = (
                    self._ranks[target.module.name],
                    plan.weights[target.tensor].compute.itemsize,
                )
                size += truncation_bytes(target.module.shape, rank, itemsize)
            yield MemoryEstimate(target.tensor, target.module.shape, resident + size)

    def tensor_bytes(
        self, info: TensorInfo, job: Job, metrics: list[MitigatedMatrix]
    ) -> Iterable[Piece]:
        """Yield the bytes of a tensor; the metrics include the relative norm of the part beyond the rank."""
        if stored := self._layout.carried.get(info.name):
            return stored.file.chunks(stored.info)
        target = self._targets[info.name]
        if target.module.name in self._layout.whole:
            delta, after = job.mitigated(target)
            metrics.append(job.metrics(target, delta, after))
            return AddDelta(self._plan.weights[target.tensor], target).pieces(
                lambda _: (delta, after)
            )
        if info.name not in self._ready:
            self._ready |= self._factors(job, target, metrics)
        factor = self._ready.pop(info.name)
        assert factor is not None
        return [Piece(as_bytes(factor))]

    def _factors(
        self, job: Job, target: Target, metrics: list[MitigatedMatrix]
    ) -> dict[str, Tensor]:
        delta, after = job.mitigated(target)
        nearest = truncated(after, self._ranks[target.module.name], target.tensor)
        B, A = nearest.L.float(), nearest.R.T.float()
        written = LowRank(B.double(), A.double().T)
        norm = after.norm()
        error = (
            after.distance(written) / norm if norm else 0.0
        )  # of the written factors, including rounding
        metrics.append(job.metrics(target, delta, written, error))
        factors = {"A": A, "B": B, "Aᵀ": A.T, "Bᵀ": B.T}
        return {
            name: factors[f].reshape(shape).contiguous()
            for name, (shape, f) in self._tensors(target).items()
        }

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
            of_head = _embedding(head, shape, rank, factors)
            tensors |= of_head if is_embedding else _linear(head, shape[::-1], rank, (), others)
        return tensors

    def _config(self, written: Sequence[Target]) -> dict[str, Any]:
        """Make a plain LoRA config: the modules and the carried tensors, and nothing about the original adapter's training."""
        names, heads, adapter = self._layout.names, self._layout.heads, self._plan.adapter
        # A head's bias that is only saved along with a vocabulary that has grown is not trained.
        trained = adapter.describes_model or adapter.config.get("bias", "none") != "none"
        ranks = {
            path: r
            for name, r in self._ranks.items()
            for path in (names[name], *heads.get(name, ()))
        }
        largest = max(ranks.values(), default=self._least)
        others = {path: r for path, r in ranks.items() if r != largest}
        bias = (
            "all"
            if trained and any(name.endswith(".bias") for name in self._layout.carried)
            else "none"
        )
        return {
            **self._layout.config,
            "peft_type": "LORA",
            "fan_in_fan_out": any(t.transposed and not t.is_embedding for t in written),
            "r": largest,
            "lora_alpha": largest,
            **({"rank_pattern": others, "alpha_pattern": others} if others else {}),
            "target_modules": [*ranks],
            "bias": bias,
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
        what = "a share of the energy needs the findings before anything is written"
        raise UsageError(
            f"to_lora: {what}; run `streamer detect`, and pass them with --findings, or pass a rank"
        )
    resident = resident_bytes(AdapterBatch(job.plan.base, (job.plan,)))
    estimates = []
    for target in targets:
        size = resident + job.mitigation_bytes(target)
        if not target.module.low_rank:
            size += energies_bytes(target.module.shape)
        estimates.append(MemoryEstimate(target.tensor, target.module.shape, size))
    check_budget(estimates, job.detection.max_memory)
    return {
        target.module.name: least_rank(energies(job.mitigated(target)[1]), share)
        for target in targets
    }


def _linear(
    stem: str, shape: tuple[int, int], rank: int, kernel: tuple[int, ...], factors: tuple[str, str]
) -> Shapes:
    (m, n), (a, b) = shape, factors
    inner = (n // math.prod(kernel), *kernel)
    return {
        f"{stem}.lora_A.weight": ((rank, *inner), a),
        f"{stem}.lora_B.weight": ((m, rank, *(1 for _ in kernel)), b),
    }


def _embedding(stem: str, shape: tuple[int, int], rank: int, factors: tuple[str, str]) -> Shapes:
    (m, n), (a, b) = shape, factors
    return {f"{stem}.lora_embedding_A": ((rank, n), a), f"{stem}.lora_embedding_B": ((m, rank), b)}


def _is_unchanged(plan: Plan, target: Target) -> bool:
    """Test whether a fine-tuned model's matrix has the same bytes as the base's."""
    (piece,), tuned = target.slices, plan.adapter.stored_sum(target.module)
    base = StoredTensor(*plan.base.locate(piece.weight))
    return tuned is not None and equal(
        tuned, base if piece.index is None else base.slice(piece.index)
    )


def _built_on_loading(plan: Plan) -> dict[str, str]:
    """Map each module of a fine-tuned model whose weight loading converts, such as a fused one → the resulting tensor.

    ``model.layers.0.mlp.experts.3.up_proj`` → ``model.layers.0.mlp.experts.gate_up_proj``, the stack of all experts.
    """
    if not isinstance(plan.adapter, FinetunedModel):
        return {}
    loaded = plan.names.among(plan.adapter.tensors).loaded.values()
    return {
        made.tensor.removesuffix(".weight"): made.name for made in loaded if made.by is not None
    }


def _layout(plan: Plan) -> LoraLayout:
    """Lay out the adapter; an original adapter keeps its carried tensors under the same names.

    Changes of a fine-tuned model outside matrices get the form of a LoRA adapter.
    PEFT identifies modules by their names in a loaded model. A bias stays with its module if that has factors; any other change becomes a
    saved module with all of its tensors; an embedding and its lm_head stay tied. Unchanged tensors are omitted. Examples:

    ``language_model.model.norm.weight``    → saved as ``base_model.model.model.language_model.norm.weight``
    ``….q_proj.bias``, its weight changed   → ``….q_proj.base_layer.bias``
    ``lm_head.bias``, its weight tied       → ``lm_head.base_layer.bias``, with factors of the embedding and of ``lm_head``
    ``model.embed_tokens.weight``, tied     → factors of ``embed_tokens`` and, transposed, of ``lm_head``
    ``….0.mlp.up_proj.weight`` of DeepSeek  → ``….0.mlp.up_proj.weight`` of a layer without experts, whole
    ``….mixer.conv1d.weight`` of Mamba      → ``….mixer.conv1d.weight``, the mitigated one whole

    Raises
    ------
    UnsupportedError
        If a change has no place in a LoRA adapter.
    """
    tuned, base = plan.adapter, plan.base
    if not isinstance(tuned, FinetunedModel):
        kept = (
            "base_model_name_or_path",
            "modules_to_save",
            "peft_version",
            "revision",
            "task_type",
            "trainable_token_indices",
        )
        original = {key: tuned.config.values[key] for key in kept if key in tuned.config.values}
        saved_as = saved_names(dict.fromkeys(c.source for c in tuned.carried))
        stored = {name: tuned.tensors[own] for name, own in saved_as.items()}
        return LoraLayout(
            {t.module.name: t.module.name for t in plan.targets}, stored, original, {}
        )
    # Changed tensors without a module of their own in a loaded model are refused.
    built = _built_on_loading(plan)
    index = plan.names.among(tuned.tensors)
    targets = [t for t in plan.targets if not t.pieces and t.module.name not in built]
    trained = {t.module.name for t in targets if not _is_unchanged(plan, t)}
    matched = {t.module.name: t.tensor for t in targets}
    architecture = architecture_for(tuned.model_config, plan.config.architecture)
    now = index.at_run_time
    tensors, sources, kind = tuned.tensors, plan.edits.sources, tuned.model_config.model_type
    bases = {
        s.info.name: StoredTensor(*base.locate(n))
        for n, s in sources.items()
        if n in base.weight_map
    }
    same = {
        c.source
        for c in tuned.carried
        if c.source in bases and equal(tensors[c.source], bases[c.source])
    }
    changed = {c.source: c for c in tuned.carried if c.source not in same}
    tied = _tied_modules(index, architecture)
    owners = {
        other: module
        for module, (_, others) in tied.items()
        if module in matched
        for other in others
    }
    biases = {
        s: now[s].rpartition(".")[0]
        for s, c in changed.items()
        if c.parameter == "bias" and s in now
    }
    biased = {c.module for c in changed.values() if c.parameter == "bias"}
    biased |= {owners[head] for head in biases.values() if head in owners}
    paths = {m: now.get(f"{m}.weight", f"{m}.weight").removesuffix(".weight") for m in matched}
    shapes = {m: base.info(tensor).shape for m, tensor in matched.items()}
    adaptable = [m for m in matched if not has_no_lora(paths[m], shapes[m], architecture, kind)]
    named = {m for m in matched if m in trained or m in biased}
    if not named & {*adaptable}:  # PEFT cannot open an adapter without factors
        named |= {*adaptable[:1]}
    names = {m: paths[m] for m in matched if m in named}
    whole = names.keys() - {*adaptable}
    inner = {
        module.rpartition(".")[0]
        for module in (*owners, *(name.rpartition(".")[0] for name in tuned.tensors))
    }
    saved = {names[m] for m in whole}
    for c in changed.values():
        if (c.module in matched and c.parameter == "bias") or biases.get(c.source) in owners:
            continue
        placed = c.module and c.module not in matched and c.source in now
        if not placed or any(f"{i}.".startswith(f"{c.module}.") for i in inner):
            why = "which is no weight or bias of a layer, and so has no place in a LoRA adapter; use `streamer merge`"
            raise UnsupportedError(f"{tuned.path}: {c.source!r} has changed, {why}")
        saved.add(now[c.source].rpartition(".")[0])
    carried = {}
    for c in tuned.carried:
        name = now.get(c.source, c.source)
        module, _, parameter = name.rpartition(".")
        # By PEFT's rule, an entry of modules_to_save names all modules whose path ends in it.
        if any(module.endswith(s) for s in saved):
            saved.add(module)
            carried[PREFIX + name] = tensors[c.source]
        elif c.source in changed:
            carried[f"{PREFIX}{module}.base_layer.{parameter}"] = tensors[c.source]
    heads: dict[str, dict[str, bool]] = {}
    pairs = 0
    for module, (mine, others) in tied.items():
        if module in names and architecture is not None:
            heads[module] = {other: architecture.is_embedding(other) for other in others}
        elif mine in saved:  # its size differs from the base's
            saved |= {*others}
            carried |= {f"{PREFIX}{other}.weight": tensors[f"{module}.weight"] for other in others}
        else:
            continue
        pairs += len(others) == 1
    config: dict[str, Any] = {"modules_to_save": sorted(saved)} if saved else {}
    # If more than two are tied, PEFT treats all except the first as linear layers.
    if pairs:
        config["ensure_weight_tying"] = True
    looked_up = {
        m
        for m, name in names.items()
        if architecture is not None and architecture.is_embedding(name)
    }
    return LoraLayout(names, carried, config, heads, frozenset(looked_up), frozenset(whole))


def truncated(delta: Delta, rank: int, name: str = "") -> LowRank:
    """Compute the nearest matrix of that rank, its singular values split evenly between the factors; `name` seeds the Krylov solver."""
    return delta.nearest(rank, partial(_leading_triplets, seed=zlib.crc32(name.encode())))


def _leading_triplets(delta: Dense, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the leading singular triplets of a dense delta in float64: by LAPACK if it is small, else by the Krylov solver."""
    matrix = delta.dense()
    m, n = matrix.shape
    if not matrix.any():
        return (
            matrix.new_zeros(m, 0).double(),
            matrix.new_zeros(0).double(),
            matrix.new_zeros(0, n).double(),
        )
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
    if adapter.wrapped or any(
        t.pieces and not _is_unchanged(job.plan, t) for t in job.plan.targets
    ):
        return "is on experts' parameters, which a plain config does not name"
    built = _built_on_loading(job.plan)
    for target in job.plan.targets:
        if (name := target.module.name) in built and not _is_unchanged(job.plan, target):
            what = f"changes {name!r}, which loading turns into {built[name]!r}"
            return f"{what}: PEFT has no LoRA for it under this name"
        one_channel = (
            isinstance(target.module, MethodModule)
            and target.module.shape[1] == math.prod(target.kernel) > 1
        )
        if one_channel and not adapter.describes_model:
            return f"changes {name!r}, a convolution with one channel per group; PEFT's LoRA needs their number, which no file states"
    architecture = None if not adapter.describes_model else architecture_for(job.plan.config)
    if (
        architecture is not None
        and architecture.input_embedding is None
        and any(t.tied for t in architecture.ties)
    ):
        return f"is a {architecture.name}, which ties weights and has no input embedding: PEFT opens no adapter for it"
    if job.plan.mirrors:
        return "holds the delta of a tied embedding twice (ensure_weight_tying)"
    written = (t.module.name for t in job.plan.targets if not adapter.describes_model)
    if refused := [m for m in written if is_refused(m, job.plan.config.model_type)]:
        return f"changes {refused[0]!r}, which PEFT refuses LoRA for in models of type {job.plan.config.model_type!r}"
    if any(c.role == "lora_bias" for c in adapter.carried):
        return "has biases beside its factors (lora_bias), which have no place in another scale"
    return ""
