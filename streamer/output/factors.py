"""Write mitigated deltas as an adapter: the original with new factors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from streamer.adapters.adapter import saved_names
from streamer.adapters.adapter_config import (
    CONFIG_NAME,
    LAYOUT_DETAILS,
    LAYOUT_KEY,
)
from streamer.errors import UnsupportedError
from streamer.linalg.operators import LowRank
from streamer.output.form import Form
from streamer.output.layout import Layout, Memory
from streamer.output.mitigation import Mitigation
from streamer.output.recipes import CopyBytes, New, OneOf, Recipe
from streamer.output.record import MitigatedMatrix
from streamer.plan.plan import MemoryEstimate, Plan
from streamer.plan.side_files import TOKENIZER_CONFIG, other_files, skipped_files
from streamer.plan.targets import Target
from streamer.storage.atomic_file import ShardPlan, plan_shard
from streamer.storage.checkpoint import INDEX_NAME, SINGLE_NAME
from streamer.storage.header import TensorInfo
from streamer.storage.transaction import RECORD_NAME
from streamer.units import counted
from streamer.weights.base import FLOATS, StoredTensor, encode


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
    if ignored:
        who = "vLLM and other"
        keys = ignored
    else:
        who = "SGLang, llama.cpp and other"
        keys = ["use_rslora"]
    if not ignored and not config.get("use_rslora"):
        return []
    return [
        f"{who} servers ignore {' and '.join(keys)} and would scale deltas wrongly; for them, add --for-server"
    ]


HASHES = ("modelspec.hash_sha256", "sshs_legacy_hash", "sshs_model_hash")
"""Metadata in which trainers state hashes of the original factors."""


def factor_names(plan: Plan, target: Target) -> list[str]:
    """Return the names of the adapter's tensors that a mitigation of the target would change."""
    mirror = plan.mirrors.get(target.module.name)
    return [*target.module.tensor_names, *(mirror.tensor_names if mirror else ())]


def targets_by_tensor(plan: Plan) -> dict[str, list[Target]]:
    """List for each tensor of the adapter the targets whose factors it holds: one, or all experts of a layer."""
    by_tensor: dict[str, list[Target]] = {}
    for target in plan.targets:
        for name in factor_names(plan, target):
            by_tensor.setdefault(name, []).append(target)
    return by_tensor


def mitigated_factors(
    targets: Sequence[Target], mitigation: Mitigation
) -> tuple[New, list[MitigatedMatrix]]:
    """Make the tensors with the factors of these targets, one module or all experts of a layer, and the metrics of each target."""
    plan = mitigation.plan
    made = [_factors(mitigation, target) for target in targets]
    metrics = [row for _, row in made]
    names = [name for target in targets for name in factor_names(plan, target)]
    module = targets[0].module.factors
    is_changed = any(new for new, _ in made)
    if module is None or module.expert is None or not (module.grouped or is_changed):
        return {**dict.fromkeys(names), **made[0][0]}, metrics
    a, b = (plan.adapter.tensors[name].whole() for name in module.tensor_names)
    whole = {module.a: a.clone(), module.b: module.regrouped(b).clone()}
    for target, (new, _) in zip(targets, made, strict=True):
        expert = target.module.factors
        assert expert is not None
        slices = replace(expert, grouped=False).expert_slices
        for name, rows in zip(expert.tensor_names, slices, strict=True):
            if name in new:
                whole[name][rows] = new[name]
    return {**whole}, metrics


def _factors(mitigation: Mitigation, target: Target) -> tuple[dict[str, Tensor], MitigatedMatrix]:
    """Make the tensors of one target that change, and its metrics."""
    made = mitigation.of(target)
    if made.after is made.delta:
        return {}, made.metrics()
    plan = mitigation.plan
    module = target.module.factors
    assert isinstance(made.after, LowRank)
    assert module is not None
    B, A, error = back_project(made.after, module.rank, module.scaling)
    if module.delta_transposed:
        B, A = A.T, B.T
    # The left factor of Δ is B, or of a transposed delta the transpose of A.
    left = {module.a if module.delta_transposed else module.b}
    values = {module.a: A, module.b: B}
    mirror = plan.mirrors.get(target.module.name)
    if mirror is not None:
        of_a, of_b = mirror.tensor_names
        values |= {of_a: B.T, of_b: A.T}
        left.add(of_b if module.delta_transposed else of_a)
    kept = left if mitigation.method.keeps_left else ()
    stored = plan.adapter.file.header.by_name
    new = {
        name: encode(value, FLOATS[stored[name].dtype], name)
        for name, value in values.items()
        if name not in kept
    }
    written = module.product(new.get(module.a, A).double(), new.get(module.b, B).double())
    return new, made.metrics(written, error)


def _served_shape(info: TensorInfo, targets: Sequence[Target], rank: int) -> tuple[int, ...]:
    """Return the shape for servers of a tensor of factors: one side has the rank, times the number of experts that the tensor holds."""
    module = targets[0].module.factors
    assert module is not None
    shape = [*info.shape]
    shape[int(info.name == module.b)] = rank * (module.expert[1] if module.expert else 1)
    return tuple(shape)


def _served(
    targets: Sequence[Target], rank: int, mitigation: Mitigation
) -> tuple[New, list[MitigatedMatrix]]:
    """Make factors for servers: each module's scale goes into ``lora_B``, and zeros extend all factors to one rank.

    The metrics include what rounding the scaled lora_B loses.
    """
    factors, metrics = mitigated_factors(targets, mitigation)
    stored = mitigation.plan.adapter.tensors
    values = {name: stored[name].whole() if new is None else new for name, new in factors.items()}
    out = {
        name: value.new_zeros(_served_shape(stored[name].info, targets, rank))
        for name, value in values.items()
    }
    for target, row in zip(targets, metrics, strict=True):
        assert target.module.factors is not None
        module = replace(target.module.factors, grouped=False)  # columns are in PEFT's order by now
        wide = replace(module, rank=rank)
        a, b = module.expert_slices
        wide_a, wide_b = wide.expert_slices
        A = values[module.a][a]
        B = values[module.b][b]
        scaled = B.double() * module.scaling
        written = encode(scaled, B.dtype, module.b)
        out[module.a][wide_a][: module.rank] = A
        out[module.b][wide_b][:, : module.rank] = written
        lost = LowRank((written.double() - scaled).flatten(1), A.double().flatten(1).T).norm()
        row["dropped"] = math.hypot(row["dropped"], lost / (row["delta_norm_after"] or 1.0))
    return {**out}, metrics


def refuse_dense(plan: Plan, remedy: str) -> None:
    """Refuse deltas without factors: DoRA's, and those of PEFT's methods other than LoRA."""
    if dense := [t.module.name for t in plan.targets if t.module.factors is None]:
        what = f"the mitigated delta of {dense[0]!r} (and {len(dense) - 1} more) has no form in this kind of adapter"
        raise UnsupportedError(f"{plan.adapter.path}: {what}; {remedy}")


def one_file_layout(
    mitigation: Mitigation,
    shard: ShardPlan,
    recipes: Mapping[str, Recipe],
    memory: Memory,
    config: bytes | None,
    source: Path | None,
) -> Layout:
    """Lay out an adapter of one tensor file, with a config if there is one, and the other files of the adapter in `source`, if given."""
    plan = mitigation.plan
    copies = [(name, path) for name, path in other_files(source) if name != CONFIG_NAME]
    skipped = [] if source is None else skipped_files(source)
    dense = (target for target in plan.targets if not target.module.low_rank)
    return Layout(
        command="mitigate",
        shards={shard.name: shard},
        recipes=recipes,
        memory=memory,
        finals={} if config is None else {CONFIG_NAME: config},
        copies=copies,
        left_out=[name for name in skipped if name not in (shard.name, RECORD_NAME)],
        conflicting_names=("adapter_model.bin", SINGLE_NAME, INDEX_NAME),
        base_bytes=sum(plan.weights[target.tensor].nbytes for target in dense),
        tokenizer="adapter" if TOKENIZER_CONFIG in dict(copies) else None,
        warnings=mitigation.warnings,
    )


def adapter_layout(mitigation: Mitigation, form: Form) -> Layout:
    """Lay out the original adapter's tensors, order, dtypes and config, with new factors of mitigated modules, under PEFT's names."""
    plan = mitigation.plan
    adapter = plan.adapter
    _refuse_kinds(mitigation, form)
    rank = None
    if form.for_server:
        rank = server_rank(adapter.path, max(target.module.rank for target in plan.targets))
    header = adapter.file.header
    kind = None if plan.config.pipeline else adapter.config.peft_type
    names = {info.name: info.name for info in header.tensors}
    by_tensor = targets_by_tensor(plan)
    made: New = {}
    recipes: dict[str, Recipe] = {}
    entries: list[tuple[str, str, tuple[int, ...]]] = []
    for name, own in (saved_names(names) if kind == "LORA" else names).items():
        stored = StoredTensor(adapter.file, header.by_name[own])
        shape = stored.info.shape
        targets = by_tensor.get(own, [])
        recipes[name] = CopyBytes(stored)
        if targets:
            recipes[name] = OneOf(own, partial(mitigated_factors, targets), made, stored)
        if targets and rank is not None:
            recipes[name] = OneOf(own, partial(_served, targets, rank), made, stored)
            shape = _served_shape(stored.info, targets, rank)
        entries.append((name, stored.info.dtype, shape))
    metadata = {key: text for key, text in header.metadata.items() if key not in HASHES}
    stamp = mitigation.stamp("mitigate")
    shard = plan_shard(adapter.file.path.name, entries, {**metadata, **stamp})
    values = _config(plan, kind, rank)
    config = next((path.read_bytes() for path in adapter.config_paths), None)
    if config is not None and values != adapter.config.values:
        config = json.dumps(values, indent=2, ensure_ascii=False).encode() + b"\n"
    layout = one_file_layout(mitigation, shard, recipes, _memory, config, adapter.directory)
    return replace(layout, advice=server_advice(values, entries, form.for_server))


def _refuse_kinds(mitigation: Mitigation, form: Form) -> None:
    """Refuse adapters that cannot be written back in their own kind, or not for servers."""
    plan = mitigation.plan
    adapter = plan.adapter
    if adapter.describes_model:
        do = "`streamer merge` writes the mitigated model, and --to-lora RANK its difference to the base as a LoRA adapter"
        raise UnsupportedError(
            f"{adapter.path}: is a model, and no adapter that could be written back; {do}"
        )
    if mitigation.method.mitigation_lambda != 1:
        lora = "" if plan.config.pipeline else ", and --to-lora RANK as a LoRA adapter"
        refuse_dense(plan, f"`streamer merge` writes it into the base{lora}")
    if not form.for_server:
        return
    refuse_dense(plan, "--to-lora RANK writes it as a LoRA adapter")
    is_lora = not plan.config.pipeline and adapter.config.peft_type == "LORA"
    if not is_lora or plan.mirrors or any(c.role == "lora_bias" for c in adapter.carried):
        what = "for_server: is of a pipeline, of another kind than LoRA, has biases beside its factors, or holds a tied delta twice"
        raise UnsupportedError(f"{adapter.path}: {what}; use `streamer merge`")


def _config(plan: Plan, kind: str | None, rank: int | None) -> dict[str, Any]:
    """Make the values of the config: factors are written in PEFT's order of columns, and PEFT needs the type."""
    original = plan.adapter.config.values
    values = {
        key: value for key, value in original.items() if key not in (LAYOUT_KEY, LAYOUT_DETAILS)
    }
    values["peft_type"] = kind
    if rank is not None:
        values |= {"r": rank, "lora_alpha": rank, "use_rslora": False}
        values |= {key: {} for key in PATTERNS}
    return values


def _memory(mitigation: Mitigation, resident: int) -> Iterator[MemoryEstimate]:
    """Estimate the peak memory for each matrix; for experts, whose factors share a tensor, including all factors, old and new."""
    plan = mitigation.plan
    for target in plan.targets:
        size = mitigation.memory(target, projected=True)
        if target.module.factors is not None and target.module.factors.expert is not None:
            names = factor_names(plan, target)
            size += 2 * sum(plan.adapter.tensors[name].info.nbytes for name in names)
        yield MemoryEstimate(target.tensor, target.module.shape, resident + size)
