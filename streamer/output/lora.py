"""Write mitigated deltas as a LoRA adapter of a chosen rank."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from streamer.adapters.adapter import PREFIX, Carried, saved_names
from streamer.adapters.adapter_config import (
    WEIGHTS_NAME,
    is_residual,
)
from streamer.adapters.finetuned import FinetunedModel
from streamer.adapters.modules import MethodModule
from streamer.errors import UnsupportedError, UsageError
from streamer.linalg.operators import Delta, Dense, LowRank
from streamer.linalg.svd import energies, energies_bytes, krylov_triplets, least_rank
from streamer.output.factors import one_file_layout, server_advice, server_rank
from streamer.output.form import Form
from streamer.output.layout import Layout
from streamer.output.mitigation import Mitigation
from streamer.output.recipes import AddDelta, CopyBytes, New, OneOf, Recipe
from streamer.output.record import MitigatedMatrix
from streamer.plan.architectures import Architecture, architecture_for
from streamer.plan.names import NameIndex
from streamer.plan.plan import AdapterBatch, MemoryEstimate, Plan, check_budget, resident_bytes
from streamer.plan.targets import Target
from streamer.storage.atomic_file import plan_shard
from streamer.units import listed
from streamer.weights.base import StoredTensor, equal

OF_MAMBA = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
"""Model types in which PEFT 0.21 refuses LoRA for modules whose weights are passed to kernels without calling the module."""

REFUSED_IN_MAMBA = frozenset({"conv1d", "out_proj"})
"""Last names of those modules."""

EXPERTS_OF_QWEN2 = ("gate", "gate_proj", "up_proj", "down_proj")
EXPERTS_OF_MIXTRAL = ("gate", "w1", "w2", "w3")

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
class LoraModules:
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


PLAIN_KEYS = (
    "base_model_name_or_path",
    "modules_to_save",
    "peft_version",
    "revision",
    "task_type",
    "trainable_token_indices",
)
"""Keys of an original adapter's config that also hold for its mitigated deltas as LoRA."""

FactorShapes = dict[str, tuple[tuple[int, ...], str]]
"""For the name of each tensor of factors: its shape, and the factor."""

LAPACK_SIDE = 1024
"""Largest number of rows or columns for which a dense delta is truncated by LAPACK's SVD; above, the Krylov solver is used."""


def _new_factors(
    target: Target, rank: int, shapes: FactorShapes, mitigation: Mitigation
) -> tuple[New, list[MitigatedMatrix]]:
    """Make the tensors of the factors of a mitigated delta; the metrics include the relative norm of the part beyond the rank."""
    mitigated = mitigation.of(target)
    nearest = truncated(mitigated.after, rank, target.tensor)
    B = nearest.L.float()
    A = nearest.R.T.float()
    written = LowRank(B.double(), A.double().T)
    norm = mitigated.after.norm()
    # Of the written factors, including rounding.
    error = mitigated.after.distance(written) / norm if norm else 0.0
    factors = {"A": A, "B": B, "Aᵀ": A.T, "Bᵀ": B.T}
    new: New = {
        name: factors[factor].reshape(shape).contiguous()
        for name, (shape, factor) in shapes.items()
    }
    return new, [mitigated.metrics(written, error)]


def lora_layout(mitigation: Mitigation, form: Form) -> Layout:
    """Lay out the mitigated deltas as a LoRA adapter of scale 1, in float32; carried tensors keep their bytes.

    `form.to_lora` is the rank of all modules; or, as a float in (0, 1], the share of each delta's energy that its rank must keep.
    """
    plan = mitigation.plan
    adapter = plan.adapter
    if reason := refusal(plan):
        raise UnsupportedError(
            f"{adapter.path}: {reason}; --to-lora cannot write it: use `streamer merge`"
        )
    modules = _modules(plan)
    written = [target for target in plan.targets if target.module.name in modules.names]
    ranks = _ranks(mitigation, form, [t for t in written if t.module.name not in modules.whole])
    recipes: dict[str, Recipe] = {}
    entries: list[tuple[str, str, tuple[int, ...]]] = []
    for target in written:
        module = target.module.name
        if module in modules.whole:
            info = plan.base.info(target.tensor)
            name = f"{PREFIX}{modules.names[module]}.weight"
            entries.append((name, info.dtype, info.shape))
            recipes[name] = AddDelta(plan.weights[target.tensor], target, merges=False)
            continue
        shapes = _shapes(modules, target, ranks[module])
        make_all = partial(_new_factors, target, ranks[module], shapes)
        made: New = {}
        for name, (shape, _) in shapes.items():
            entries.append((name, "F32", shape))
            recipes[name] = OneOf(name, make_all, made)
    for name, stored in modules.carried.items():
        entries.append((name, stored.info.dtype, stored.info.shape))
        recipes[name] = CopyBytes(stored)
    stamp = mitigation.stamp("mitigate", written)
    shard = plan_shard(WEIGHTS_NAME, entries, {"format": "pt"} | stamp)
    values = _config(plan, modules, written, ranks, form)
    config = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    layout = one_file_layout(
        mitigation,
        shard,
        recipes,
        partial(_memory, written, ranks),
        config.encode(),
        # A model's other files do not belong to an adapter.
        None if adapter.describes_model else adapter.directory,
    )
    return replace(
        layout,
        written=written,
        notes=_notes(modules),
        advice=server_advice(values, entries, form.for_server),
    )


def _notes(modules: LoraModules) -> list[str]:
    """Note that factors of tied modules are stored twice."""
    if not modules.heads:
        return []
    tied = listed(
        repr(name) for m, heads in modules.heads.items() for name in (modules.names[m], *heads)
    )
    but = "but its merge_and_unload adds the delta of each to their one weight; use the adapter unmerged, or `streamer merge`"
    return [f"{tied} are tied, and each has the delta: PEFT's model answers correctly, {but}"]


def _memory(
    written: Sequence[Target], ranks: Mapping[str, int], mitigation: Mitigation, resident: int
) -> Iterator[MemoryEstimate]:
    """Estimate the peak memory for each matrix; those without a rank are written whole."""
    for target in written:
        rank = ranks.get(target.module.name)
        size = mitigation.memory(target, projected=rank is not None)
        if rank is not None and not target.module.low_rank:
            itemsize = mitigation.plan.weights[target.tensor].compute.itemsize
            size += truncation_bytes(target.module.shape, rank, itemsize)
        yield MemoryEstimate(target.tensor, target.module.shape, resident + size)


def _shapes(modules: LoraModules, target: Target, rank: int) -> FactorShapes:
    """Return PEFT's names for A and B of the target, and of modules tied to it, with the shape and the factor of each."""
    name = target.module.name
    shape = target.module.shape
    stem = f"{PREFIX}{modules.names[name]}"
    if not target.is_embedding and name not in modules.embeddings:
        return _linear(stem, shape, rank, target.kernel, ("A", "B"))
    # An embedding's factors belong to its transpose.
    factors = ("A", "B")
    others = ("Bᵀ", "Aᵀ")
    if not target.transposed:
        shape, factors, others = shape[::-1], others, factors
    tensors = _embedding(stem, shape, rank, factors)
    for tied, is_embedding in modules.heads.get(name, {}).items():
        head = f"{PREFIX}{tied}"
        of_head = _embedding(head, shape, rank, factors)
        tensors |= of_head if is_embedding else _linear(head, shape[::-1], rank, (), others)
    return tensors


def _config(
    plan: Plan,
    modules: LoraModules,
    written: Sequence[Target],
    ranks: Mapping[str, int],
    form: Form,
) -> dict[str, Any]:
    """Make a plain LoRA config: the modules and the carried tensors, and nothing about the original adapter's training."""
    adapter = plan.adapter
    # A head's bias that is only saved along with a vocabulary that has grown is not trained.
    is_trained = adapter.describes_model or adapter.config.get("bias", "none") != "none"
    has_bias = any(name.endswith(".bias") for name in modules.carried)
    by_path = {
        path: rank
        for name, rank in ranks.items()
        for path in (modules.names[name], *modules.heads.get(name, ()))
    }
    least = form.to_lora if isinstance(form.to_lora, int) else 1
    largest = max(by_path.values(), default=least)
    others = {path: rank for path, rank in by_path.items() if rank != largest}
    return {
        **modules.config,
        "peft_type": "LORA",
        "fan_in_fan_out": any(t.transposed and not t.is_embedding for t in written),
        "r": largest,
        "lora_alpha": largest,
        **({"rank_pattern": others, "alpha_pattern": others} if others else {}),
        "target_modules": [*by_path],
        "bias": "all" if is_trained and has_bias else "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _ranks(mitigation: Mitigation, form: Form, targets: Sequence[Target]) -> dict[str, int]:
    """Choose the rank of each module."""
    rank = form.to_lora
    assert rank is not None
    if isinstance(rank, int):
        return {target.module.name: rank for target in targets}
    ranks = _least_ranks(mitigation, targets, rank)
    if not form.for_server:
        return ranks
    return dict.fromkeys(ranks, server_rank(mitigation.plan.adapter.path, max(ranks.values())))


def _least_ranks(mitigation: Mitigation, targets: Sequence[Target], share: float) -> dict[str, int]:
    """Find for each module the least rank that keeps this share of the energy of its mitigated delta.

    Raises
    ------
    UsageError
        If the mitigated deltas need findings that do not exist yet: the tensors' shapes must be known before anything is written.
    """
    if mitigation.detects:
        what = "a share of the energy needs the findings before anything is written"
        raise UsageError(
            f"to_lora: {what}; run `streamer detect`, and pass them with --findings, or pass a rank"
        )
    resident = resident_bytes(AdapterBatch(mitigation.plan.base, (mitigation.plan,)))
    estimates = []
    for target in targets:
        size = resident + mitigation.memory(target)
        if not target.module.low_rank:
            size += energies_bytes(target.module.shape)
        estimates.append(MemoryEstimate(target.tensor, target.module.shape, size))
    check_budget(estimates, mitigation.detection.max_memory)
    return {
        target.module.name: least_rank(energies(mitigation.of(target).after), share)
        for target in targets
    }


def _linear(
    stem: str, shape: tuple[int, int], rank: int, kernel: tuple[int, ...], factors: tuple[str, str]
) -> FactorShapes:
    m, n = shape
    a, b = factors
    inner = (n // math.prod(kernel), *kernel)
    return {
        f"{stem}.lora_A.weight": ((rank, *inner), a),
        f"{stem}.lora_B.weight": ((m, rank, *(1 for _ in kernel)), b),
    }


def _embedding(
    stem: str, shape: tuple[int, int], rank: int, factors: tuple[str, str]
) -> FactorShapes:
    m, n = shape
    a, b = factors
    return {f"{stem}.lora_embedding_A": ((rank, n), a), f"{stem}.lora_embedding_B": ((m, rank), b)}


def _is_unchanged(plan: Plan, target: Target) -> bool:
    """Test whether a fine-tuned model's matrix has the same bytes as the base's."""
    (piece,) = target.slices
    tuned = plan.adapter.stored_sum(target.module)
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


def _modules(plan: Plan) -> LoraModules:
    """Lay out the adapter; an original adapter keeps its carried tensors under the same names."""
    adapter = plan.adapter
    if isinstance(adapter, FinetunedModel):
        return _TunedModules(plan, adapter).laid_out()
    values = adapter.config.values
    saved_as = saved_names(dict.fromkeys(c.source for c in adapter.carried))
    return LoraModules(
        names={target.module.name: target.module.name for target in plan.targets},
        carried={name: adapter.tensors[own] for name, own in saved_as.items()},
        config={key: values[key] for key in PLAIN_KEYS if key in values},
        heads={},
    )


@dataclass(frozen=True)
class _TunedModules:
    """Changes of a fine-tuned model, laid out as a LoRA adapter.

    PEFT identifies modules by their names in a loaded model. A bias stays with its module if that has factors; any other change becomes a
    saved module with all of its tensors; an embedding and its lm_head stay tied. Unchanged tensors are omitted. Examples:

    ``language_model.model.norm.weight``    → saved as ``base_model.model.model.language_model.norm.weight``
    ``….q_proj.bias``, its weight changed   → ``….q_proj.base_layer.bias``
    ``lm_head.bias``, its weight tied       → ``lm_head.base_layer.bias``, with factors of the embedding and of ``lm_head``
    ``model.embed_tokens.weight``, tied     → factors of ``embed_tokens`` and, transposed, of ``lm_head``
    ``….0.mlp.up_proj.weight`` of DeepSeek  → ``….0.mlp.up_proj.weight`` of a layer without experts, whole
    ``….mixer.conv1d.weight`` of Mamba      → ``….mixer.conv1d.weight``, the mitigated one whole
    """

    plan: Plan
    tuned: FinetunedModel

    def laid_out(self) -> LoraModules:
        """Lay out the adapter.

        Raises
        ------
        UnsupportedError
            If a change has no place in a LoRA adapter.
        """
        names = self._named()
        whole = names.keys() - {*self.adaptable}
        saved = {names[module] for module in whole} | self._saved_changes()
        carried: dict[str, StoredTensor] = {}
        for c in self.tuned.carried:
            name = self.now.get(c.source, c.source)
            module, _, parameter = name.rpartition(".")
            # By PEFT's rule, an entry of modules_to_save names all modules whose path ends in it.
            if any(module.endswith(other) for other in saved):
                saved.add(module)
                carried[PREFIX + name] = self.tuned.tensors[c.source]
            elif c.source in self.changed:
                bias = f"{PREFIX}{module}.base_layer.{parameter}"
                carried[bias] = self.tuned.tensors[c.source]
        heads: dict[str, dict[str, bool]] = {}
        has_pair = False
        for module, (mine, others) in self.tied.items():
            if module in names:
                heads[module] = {other: self._is_embedding(other) for other in others}
            elif mine in saved:  # its size differs from the base's
                saved |= {*others}
                tensor = self.tuned.tensors[f"{module}.weight"]
                carried |= {f"{PREFIX}{other}.weight": tensor for other in others}
            else:
                continue
            has_pair = has_pair or len(others) == 1
        config: dict[str, Any] = {"modules_to_save": sorted(saved)} if saved else {}
        # If more than two are tied, PEFT treats all except the first as linear layers.
        if has_pair:
            config["ensure_weight_tying"] = True
        embeddings = frozenset(m for m, name in names.items() if self._is_embedding(name))
        return LoraModules(names, carried, config, heads, embeddings, frozenset(whole))

    @cached_property
    def architecture(self) -> Architecture | None:
        """Return the model's architecture, if it is known."""
        return architecture_for(self.tuned.model_config, self.plan.config.architecture)

    def _is_embedding(self, module: str) -> bool:
        return self.architecture is not None and self.architecture.is_embedding(module)

    @cached_property
    def index(self) -> NameIndex:
        """Return the names of the model's tensors."""
        return self.plan.names.among(self.tuned.tensors)

    @property
    def now(self) -> Mapping[str, str]:
        """Map names on disk to names in a loaded model."""
        return self.index.at_run_time

    @cached_property
    def tied(self) -> dict[str, tuple[str, list[str]]]:
        """Return the modules whose weights others share; see `_tied_modules`."""
        return _tied_modules(self.index, self.architecture)

    @cached_property
    def targets(self) -> dict[str, Target]:
        """Return the matrices by module, but those that loading converts: their changes have no module of their own."""
        built = _built_on_loading(self.plan)
        targets = (target for target in self.plan.targets if not target.pieces)
        return {t.module.name: t for t in targets if t.module.name not in built}

    @cached_property
    def paths(self) -> dict[str, str]:
        """Map the modules of these matrices to their names in a loaded model."""
        weights = {module: f"{module}.weight" for module in self.targets}
        return {
            module: self.now.get(weight, weight).removesuffix(".weight")
            for module, weight in weights.items()
        }

    @cached_property
    def adaptable(self) -> list[str]:
        """List the modules that can have factors."""
        kind = self.tuned.model_config.model_type
        shapes = {m: self.plan.base.info(t.tensor).shape for m, t in self.targets.items()}
        return [
            module
            for module, path in self.paths.items()
            if not has_no_lora(path, shapes[module], self.architecture, kind)
        ]

    @cached_property
    def changed(self) -> dict[str, Carried]:
        """Return the tensors other than matrices that differ from the base's."""
        plan = self.plan
        bases = {
            source.info.name: StoredTensor(*plan.base.locate(name))
            for name, source in plan.edits.sources.items()
            if name in plan.base.weight_map
        }
        tensors = self.tuned.tensors
        return {
            c.source: c
            for c in self.tuned.carried
            if c.source not in bases or not equal(tensors[c.source], bases[c.source])
        }

    @cached_property
    def owners(self) -> dict[str, str]:
        """Map modules that are tied to a matrix's module to it."""
        return {
            other: module
            for module, (_, others) in self.tied.items()
            if module in self.targets
            for other in others
        }

    @cached_property
    def biases(self) -> dict[str, str]:
        """Map the changed biases to their modules in a loaded model."""
        return {
            source: self.now[source].rpartition(".")[0]
            for source, c in self.changed.items()
            if c.parameter == "bias" and source in self.now
        }

    def _named(self) -> dict[str, str]:
        """Choose the modules with factors, or with a weight or a bias that is saved; map them to their names in a loaded model."""
        named = {m for m, target in self.targets.items() if not _is_unchanged(self.plan, target)}
        named |= {c.module for c in self.changed.values() if c.parameter == "bias"}
        named |= {self.owners[head] for head in self.biases.values() if head in self.owners}
        if not named & {*self.adaptable}:  # PEFT cannot open an adapter without factors
            named |= {*self.adaptable[:1]}
        return {module: path for module, path in self.paths.items() if module in named}

    def _saved_changes(self) -> set[str]:
        """Find the modules that are saved because of other changes than those of matrices and their biases."""
        parents = (name.rpartition(".")[0] for name in self.tuned.tensors)
        inner = {module.rpartition(".")[0] for module in (*self.owners, *parents)}
        saved = set()
        for c in self.changed.values():
            is_bias = c.module in self.targets and c.parameter == "bias"
            if is_bias or self.biases.get(c.source) in self.owners:
                continue
            is_placed = c.module and c.module not in self.targets and c.source in self.now
            if not is_placed or any(f"{i}.".startswith(f"{c.module}.") for i in inner):
                why = "which is no weight or bias of a layer, and so has no place in a LoRA adapter; use `streamer merge`"
                raise UnsupportedError(f"{self.tuned.path}: {c.source!r} has changed, {why}")
            saved.add(self.now[c.source].rpartition(".")[0])
        return saved


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
    like = matrix.new_empty(0)
    columns = 4 * (rank + 16)
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
    return min(shape) <= max(LAPACK_SIDE, 4 * rank)


def refusal(plan: Plan) -> str:
    """Explain why a plain LoRA adapter cannot represent an adapter; empty if it can."""
    adapter = plan.adapter
    if plan.config.pipeline:
        return "belongs to a diffusers pipeline, which PEFT's names do not cover"
    if is_residual(adapter.config):
        return "is relative to a residual base, which a plain config does not say"
    if adapter.wrapped or any(t.pieces and not _is_unchanged(plan, t) for t in plan.targets):
        return "is on experts' parameters, which a plain config does not name"
    built = _built_on_loading(plan)
    for target in plan.targets:
        if (name := target.module.name) in built and not _is_unchanged(plan, target):
            what = f"changes {name!r}, which loading turns into {built[name]!r}"
            return f"{what}: PEFT has no LoRA for it under this name"
        one_channel = (
            isinstance(target.module, MethodModule)
            and target.module.shape[1] == math.prod(target.kernel) > 1
        )
        if one_channel and not adapter.describes_model:
            return f"changes {name!r}, a convolution with one channel per group; PEFT's LoRA needs their number, which no file states"
    architecture = None if not adapter.describes_model else architecture_for(plan.config)
    if (
        architecture is not None
        and architecture.input_embedding is None
        and any(t.tied for t in architecture.ties)
    ):
        return f"is a {architecture.name}, which ties weights and has no input embedding: PEFT opens no adapter for it"
    if plan.mirrors:
        return "holds the delta of a tied embedding twice (ensure_weight_tying)"
    written = (t.module.name for t in plan.targets if not adapter.describes_model)
    if refused := [m for m in written if is_refused(m, plan.config.model_type)]:
        return f"changes {refused[0]!r}, which PEFT refuses LoRA for in models of type {plan.config.model_type!r}"
    if any(c.role == "lora_bias" for c in adapter.carried):
        return "has biases beside its factors (lora_bias), which have no place in another scale"
    return ""
