"""Plan runs from headers alone: open, match and check a base and its adapters before anything is written, and estimate the memory needed.

The estimate is an upper bound of anonymous memory: the interpreter and torch, the tables of all tensors, and the largest step, as one step
runs at a time. Mapped files do not count: the system drops their pages when it needs memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streamer.adapters.adapter import DeltaSource, NoAdapter, open_adapter
from streamer.adapters.adapter_config import NOTHING_STATED, Stated
from streamer.adapters.finetuned import FinetunedModel, is_model, open_finetuned
from streamer.adapters.modules import Module
from streamer.errors import (
    InputChangedError,
    MismatchError,
    NumericError,
    OutputError,
    UnsupportedError,
    UsageError,
)
from streamer.linalg.operators import Delta, all_finite
from streamer.linalg.torch_state import CPU
from streamer.plan import side_files
from streamer.plan import tied_embeddings as tied
from streamer.plan.architectures import (
    Architecture,
    architecture_for,
    pattern_of,
    with_architecture,
)
from streamer.plan.carried_tensors import (
    TensorEdits,
    check_announced,
    match_carried,
    merged_architecture,
)
from streamer.plan.name_matching import Renames, TensorSlice, joined, match_modules, renames_for
from streamer.plan.targets import (
    Orientation,
    Target,
    match_experts,
    match_targets,
    refuse_misfits,
    tensor_roles,
)
from streamer.storage.checkpoint import Checkpoint, IOMode, open_checkpoint
from streamer.storage.files import AdapterIdentity, BaseIdentity, Stamp, file_stamp, storage_errors
from streamer.storage.remote_source import AHEAD_BYTES
from streamer.weights.base import StoredTensor
from streamer.weights.logical import WeightView, open_weights
from streamer.weights.model_config import MODEL_CONFIG, ModelConfig, read_model_config


@dataclass(frozen=True)
class Plan:
    """A base, an adapter, and the tensor that each module changes.

    Attributes
    ----------
    weights
        The logical weights to which deltas are added, by name: the base's, or the adapter's replacements.
    targets
        Targets in the base's file order.
    edits
        Edits of the base by the adapter's other tensors.
    mirrors
        Modules that repeat another module's factors, by the other's name (see `tied_embeddings.mirrored`).
    config
        The base's ``config.json``.
    architecture
        Facts about the merged model's class; None if not known.
    announced
        Notes on tensors that the adapter's config announces and its file lacks, and on weights beside it.
    extra_stamps
        Stamps of the small files that are copied or read whole, by path.
    inputs
        Directories and files that outputs must not touch, for all plans of the batch.
    """

    base: Checkpoint
    weights: WeightView
    adapter: DeltaSource
    targets: tuple[Target, ...]
    edits: TensorEdits
    mirrors: Mapping[str, Module]
    config: ModelConfig
    architecture: Architecture | None
    announced: tuple[str, ...] = ()
    extra_stamps: Mapping[str, Stamp] = field(default_factory=dict)
    inputs: tuple[Path, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Return notes on the inputs, printed as warnings and stored in the record; they contain no paths, so outputs are reproducible."""
        stated = side_files.other_base(self.adapter.config.base_model, self.base.path, self.config)
        return *stated, *self.announced, *self.adapter.notes

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return all warnings."""
        return *self.base.warnings, *self.notes

    @cached_property
    def by_weight(self) -> dict[str, list[tuple[Target, TensorSlice]]]:
        """Return the targets of each weight, each with its slice of the weight."""
        out: dict[str, list[tuple[Target, TensorSlice]]] = {}
        for target in self.targets:
            for part in target.slices:
                out.setdefault(part.weight, []).append((target, part))
        return out

    def delta(
        self,
        target: Target,
        W0: Tensor | None = None,
        *,
        double: bool = False,
        tensors: Mapping[str, StoredTensor] | None = None,
    ) -> Delta:
        """Compute the delta of a matrix, (out, in); if it is not of low rank, dense and from the stored W0; see `Module.delta`.

        Parameters
        ----------
        tensors
            The module's tensors, if already read.
        """
        if W0 is None and not target.module.low_rank:
            weight = self.weights[target.tensor]
            W0 = weight.whole(CPU).reshape(weight.matrix)
        W0 = W0.T if W0 is not None and target.transposed else W0
        return target.module.delta(tensors or self.adapter.tensors, W0, double=double)

    def finite_delta(self, target: Target) -> Delta:
        """Compute the delta of a matrix; see `delta`.

        Raises
        ------
        NumericError
            If the delta, or one of its factors, holds NaN or Inf.
        """
        delta = self.delta(target)
        for what, tensor in delta.named_tensors():
            if not all_finite(tensor):
                raise NumericError(
                    f"{self.adapter.file.path}: {what} of module {target.module.name!r} holds NaN or Inf; check the adapter"
                )
        return delta

    @cached_property
    def base_identity(self) -> BaseIdentity:
        """Return `Checkpoint.identity`, plus the base's class if the user named it."""
        identity, name = self.base.identity, self.config.architecture
        return identity if name is None else {"architecture": name, **identity}

    @cached_property
    def adapter_identity(self) -> AdapterIdentity:
        """Return `DeltaSource.identity`."""
        return self.adapter.identity()

    @cached_property
    def sources(self) -> tuple[side_files.BaseSource, side_files.AdapterSource]:
        """Return names and identities of base and adapter as an output states them, without paths."""
        base, adapter = self.base, self.adapter
        of_base = side_files.base_source(
            base.path, self.config, adapter.config.base_model, self.base_identity
        )
        return of_base, side_files.adapter_source(adapter.path, self.adapter_identity)

    def stamps(self) -> dict[str, Sequence[int]]:
        """Return the stamps of every input file by path."""
        return self.detection_stamps() | {
            os.path.realpath(p): stamp for p, stamp in self.extra_stamps.items()
        }

    def detection_stamps(self) -> dict[str, Sequence[int]]:
        """Return the stamps of the input files that detection reads, by real path, so the spelling of inputs does not matter."""
        stamps = {
            **self.base.stamps(),
            **{str(file.path): file.stamp for file in self.adapter.files},
        }
        stamps |= {str(path): self.extra_stamps[str(path)] for path in self.adapter.config_paths}
        return {os.path.realpath(path): stamp for path, stamp in stamps.items()}

    def refuse_overwriting(self, paths: Iterable[Path]) -> None:
        """Raise `OutputError` if any of the paths is an input file, under any name or link."""
        inputs = {tuple(stamp[:2]): name for name, stamp in self.stamps().items()}
        for path in paths:
            if path.exists() and (same := inputs.get(file_stamp(path.stat())[:2])):
                raise OutputError(f"{path}: is the input {same}; choose another output")

    def check_unchanged(self) -> None:
        """Raise `InputChangedError` if any input changed since the plan was made."""
        self.base.check_unchanged()
        for file in self.adapter.files:
            file.check_unchanged()
        for path, stamp in self.extra_stamps.items():
            if not os.path.exists(path) or _stamp(Path(path)) != stamp:
                raise InputChangedError.changed(path)

    def digest(self, **decisions: Any) -> str:
        """Compute a SHA-256 over both identities and the given decisions, which together determine an output."""
        tree = {"base": self.base_identity, "adapter": self.adapter_identity, **decisions}
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def make_plan(
    base_path: str | Path,
    adapter: str | Path,
    io: IOMode = "mmap",
    stated: Stated = NOTHING_STATED,
    architecture: str | None = None,
) -> Plan:
    """Open and match a base and an adapter; see `make_batch`."""
    return make_batch(base_path, [adapter], io, stated, architecture).plans[0]


def make_batch(
    base_path: str | Path,
    adapters: Sequence[str | Path],
    io: IOMode = "mmap",
    stated: Stated = NOTHING_STATED,
    architecture: str | None = None,
) -> AdapterBatch:
    """Open a base once and match each adapter, at least one, with it.

    Parameters
    ----------
    architecture
        The base's class, if its config does not state it.

    Raises
    ------
    UsageError
        If `architecture` is not a known class, or not of the type that the base's config states.
    InputError
        If an input is faulty or refused, or the inputs do not belong together. Nothing has been written.
    """
    paths = [Path(adapter) for adapter in adapters]
    # Errors of adapters are reported before errors of the base.
    opened = [None if is_model(path) else open_adapter(path, io, stated) for path in paths]
    checkpoint = open_checkpoint(base_path, io)
    config = with_architecture(read_model_config(checkpoint.directory), architecture)
    weights, inputs = open_weights(checkpoint, config), (checkpoint.path, *paths)
    orientation = Orientation.of(checkpoint, config)
    renames, plans = renames_for(config), []
    for path, adapter in zip(paths, opened, strict=True):
        source = adapter or open_finetuned(
            path, checkpoint, tensor_roles(path, checkpoint, config, orientation), io
        )
        plan = match_plan(checkpoint, weights, config, orientation, source, renames)
        # The small files that outputs copy or that are read whole.
        small = [
            *source.config_paths,
            *(path for _, path in side_files.other_files(source.directory)),
        ]
        if checkpoint.directory is not None:
            small += [path for _, path in side_files.other_files(checkpoint.directory, source.path)]
        stamps = {str(path): _stamp(path) for path in small}
        unread = (
            side_files.unread_weights(adapter.directory, adapter.file.path.name) if adapter else ()
        )
        plans.append(
            replace(plan, extra_stamps=stamps, inputs=inputs, announced=(*plan.announced, *unread))
        )
    return AdapterBatch(checkpoint, tuple(plans))


def match_plan(
    checkpoint: Checkpoint,
    weights: WeightView,
    config: ModelConfig,
    orientation: Orientation,
    adapter: DeltaSource,
    renames: Renames,
) -> Plan:
    """Match an adapter with a base, in files or in memory; the plan has no side files.

    Parameters
    ----------
    renames
        Renames from the base's tensor names to names in a loaded model.

    Raises
    ------
    InputError
        If they do not belong together or are not supported.
    """
    architecture = merged_architecture(config, adapter)
    dropped: dict[str, str] = {}
    if isinstance(adapter, FinetunedModel):
        stated = adapter.model_config if adapter.model_config.values else config
        tuned_class = architecture_for(stated, config.architecture)
        adapter, dropped = tied.without_copies(checkpoint, adapter, tuned_class, renames)
    # For a fine-tuned model, the output takes the model's own config, which states the ties.
    ties = (
        ()
        if adapter.describes_model
        else tied.find_ties(checkpoint.weight_map, architecture, renames)
    )
    absent = {
        name: tie.stored for tie in ties for name in tie.others if name not in checkpoint.weight_map
    }
    aliases = {name: StoredTensor(*checkpoint.locate(stored)) for name, stored in absent.items()}
    parameters = adapter.parameters
    matches = match_modules(
        checkpoint, config, adapter, weights.replaced(aliases), renames, parameters
    )
    if architecture is None and not config.pipeline:
        ask = "; if it is tied to one there, name the model's class with --architecture"
        matches = {
            n: m if m.tensor or "*" in pattern_of(n) else m._replace(why=m.why + ask)
            for n, m in matches.items()
        }
    matched = {
        name: match.tensor
        for name, match in matches.items()
        if match.tensor and name in adapter.modules
    }
    mirrors = tied.mirrored(ties, adapter, matched)
    mirror_names = {module.name for module in mirrors.values()}
    modules = {
        n: match for n, match in matches.items() if n in adapter.modules and n not in mirror_names
    }
    # Report unmatched modules before unmatched carried tensors: the cause is usually the same.
    if adapter.carried:
        unmatched = [f"{name!r} {match.why}" for name, match in modules.items() if not match.tensor]
        refuse_misfits(unmatched, len(modules), adapter, weights)
    vocabulary = tied.vocabulary_tensors(checkpoint, config, architecture, ties, renames)
    # If an adapter changes only stacks of experts, only these show the prefix of its names in the base.
    placed = matched | {
        p: matches[p].tensor for p in parameters if matches[p].rule.startswith("prefix")
    }
    edits = match_carried(checkpoint, adapter, placed, renames, weights, aliases, vocabulary)
    announced: tuple[str, ...] = ()
    if adapter.describes_model:
        edits = replace(edits, dropped=dropped)
        present = {*(match.tensor for match in matches.values()), *edits.sources, *dropped}
        _refuse_incomplete(checkpoint, weights, adapter, architecture, present)
    else:
        names = dict.fromkeys([*checkpoint.weight_map, *aliases])
        biased = [
            name
            for name, tensor in matched.items()
            if f"{tensor.removesuffix('weight')}bias" in weights
        ]
        announced = check_announced(adapter, names, renames, config, architecture, edits, biased)
        if architecture is None:
            tied.refuse_unknown_ties(checkpoint, config, adapter, edits, matched)
        else:
            tied.refuse_numbered_ties(ties, checkpoint.path, adapter, matched)
            deltas, once = frozenset(matched.values()), frozenset(matched[name] for name in mirrors)
            edits = tied.TieEditor(
                checkpoint, adapter, config, architecture, edits, deltas, once
            ).edited(ties)
        if edits.vocabularies:
            edits = tied.without_stale_values(checkpoint, architecture, vocabulary, edits)
    weights = weights.replaced({**aliases, **edits.sources})
    weights = weights.extended(
        {m.tensor: partial(joined, m.tensor, m.pieces) for m in modules.values() if m.pieces}
    )
    targets = match_targets(weights, adapter, orientation, modules, renames)
    experts = match_experts(weights, adapter, config, orientation.architectures, matches, renames)
    weights = weights.extended({t.tensor: partial(joined, t.tensor, t.pieces) for t in experts})
    targets = sorted([*targets, *experts], key=file_order(weights))
    return Plan(
        checkpoint,
        weights,
        adapter,
        tuple(targets),
        edits,
        mirrors,
        config,
        architecture,
        announced,
    )


def _refuse_incomplete(
    checkpoint: Checkpoint,
    weights: WeightView,
    tuned: DeltaSource,
    architecture: Architecture | None,
    present: Collection[str],
) -> None:
    """Refuse a fine-tuned model that lacks tensors of its base, or whose base is quantized; `present` are the base's names that it has."""
    if weights.quantized_names:
        advice = (
            "a fine-tuned model must be compared with the 16-bit base from which it was trained"
        )
        raise UnsupportedError(f"{checkpoint.path}: is quantized; {advice}")
    spare = (
        () if architecture is None else architecture.may_be_missing
    )  # loading does not need these
    missing = [
        n
        for n in checkpoint.weight_map
        if n not in present and not any(re.search(s, n) for s in spare)
    ]
    if missing:
        lacks = f"lacks {len(missing)} of the base's {len(checkpoint.weight_map)} tensors, {missing[0]!r} first"
        advice = f"check that it was trained from {checkpoint.path} and that both have the same class, with or without a head"
        raise MismatchError(f"{tuned.path}: {lacks}; {advice}")


def file_order(weights: WeightView) -> Callable[[Target], tuple[int, int]]:
    """Return the key that sorts targets by the base's file order: the weight's position, and the matrix's index in it."""
    return lambda target: (weights.file_index(target.slices[0].weight), target.slices[0].index or 0)


def _stamp(path: Path) -> Stamp:
    with storage_errors(path, "read"):
        return file_stamp(os.stat(path))


def make_base_plan(base_path: str | Path, io: IOMode, architecture: str | None) -> Plan:
    """Open a base alone; the plan has no targets. See `make_plan`."""
    checkpoint = open_checkpoint(base_path, io)
    path = checkpoint.path / MODEL_CONFIG
    stamps = {str(path): file_stamp(path.stat())} if path.exists() else {}
    config = with_architecture(read_model_config(checkpoint.directory), architecture)
    nothing, orientation = NoAdapter.at(checkpoint.path), Orientation.of(checkpoint, config)
    plan = match_plan(
        checkpoint,
        open_weights(checkpoint, config),
        config,
        orientation,
        nothing,
        renames_for(config),
    )
    return replace(plan, inputs=(checkpoint.path,), extra_stamps=stamps)


class Assignment(NamedTuple):
    """A matrix that one plan of a batch changes: the plan's index and its target."""

    plan: int
    target: Target


SharedGroup = tuple[Assignment, ...]
"""Assignments, at least one, whose matrices are the same bytes of the base and are read once for all."""


@dataclass(frozen=True)
class AdapterBatch:
    """Plans of one or more adapters on one base; each tensor of the base is read once for all of them.

    Attributes
    ----------
    base
        The base, opened once.
    plans
        One plan for each adapter, in the order given.
    """

    base: Checkpoint
    plans: tuple[Plan, ...]

    @property
    def matrix_count(self) -> int:
        """Count the matrices that the adapters change; a matrix that several adapters change counts for each of them."""
        return sum(len(plan.targets) for plan in self.plans)

    @property
    def warnings(self) -> list[str]:
        """Collect the warnings of all plans."""
        return [warning for plan in self.plans for warning in plan.warnings]

    def matrices(self, wanted: Callable[[Assignment], bool] = lambda _: True) -> list[SharedGroup]:
        """List the wanted matrices in the base's file order.

        Two adapters on ``q_proj`` form one group of two. An adapter that saves its own ``q_proj``, to which its delta is added, forms a
        group of its own.
        """
        groups: dict[tuple[Any, ...], list[Assignment]] = {}
        for i, plan in enumerate(self.plans):
            order = file_order(plan.weights)
            for assignment in filter(wanted, (Assignment(i, target) for target in plan.targets)):
                target = assignment.target
                tensors = plan.weights[target.tensor].tensors.values()
                where = tuple(
                    (str(stored.file.path), stored.info.start, stored.info.end)
                    for stored in tensors
                )
                groups.setdefault((order(target), target.tensor, where), []).append(assignment)
        return [tuple(groups[key]) for key in sorted(groups, key=lambda key: key[0])]


PROCESS_BYTES = (350 if torch.version.cuda or torch.version.hip else 200) << 20
"""Anonymous memory of a process that has only imported torch and read an adapter.

Measured: 150 MB with torch for the CPU, 150 MB more with torch for CUDA, and up to 50 MB for modules that are imported later; a test
measures the installed build. The running process is not measured: a Python program may hold data of its own, which the budget excludes.
"""

TENSOR_BYTES = 1500
"""Memory of a tensor's entries in the plan. Measured: 15,360 modules of three tensors each (base, lora_A, lora_B) took 4.2 kB each."""

ADAPTER_BYTES = 100_000
"""Memory of an adapter's plan in addition to its tensors' entries. Measured with configs alone: 12 kB."""

OUTPUT_BYTES = 1000
"""Memory of a merged model's tensor in the plan and header. Measured: 24 models of 6,000 tensors took 0.7 kB each."""

MATRIX_BYTES = 20_000
"""Memory of a matrix's findings and figures while they are computed and written. Measured with 3,840 matrices: 16 kB each."""


@dataclass(frozen=True)
class MemoryEstimate:
    """A step, named by its tensor or, without a shape, described in words; and the peak memory of the process during that step."""

    tensor: str
    shape: tuple[int, ...]
    nbytes: int


def fits(nbytes: int, max_memory: int | None) -> bool:
    """Test whether a step may use so many bytes.

    Whether a step may run is decided here; how much room or share it gets, in `runs.Work.limits` and `Workers.budget`.
    """
    return max_memory is None or nbytes <= max_memory


def check_budget(needs: Iterable[MemoryEstimate], max_memory: int | None) -> None:
    """Refuse a budget that is too small for some step.

    Raises
    ------
    UsageError
        Names the step that needs most, and the smallest sufficient budget.
    """
    if max_memory is None:
        return
    most = max(needs, key=lambda need: need.nbytes)
    if not fits(most.nbytes, max_memory):
        step = (
            f"tensor {most.tensor!r} ({'x'.join(map(str, most.shape))})"
            if most.shape
            else most.tensor
        )
        enough = f"{-(-most.nbytes >> 20)}M"
        raise UsageError(
            f"max_memory: {max_memory >> 20}M is not enough for {step}; it needs {enough}"
        )


def resident_bytes(batch: AdapterBatch, output_tensors: int = 0) -> int:
    """Estimate the memory used between any two steps, including the tables of all adapters.

    Parameters
    ----------
    output_tensors
        Number of tensors to write, over all merged models.
    """
    tensors = len(batch.base.weight_map) + sum(len(plan.adapter.tensors) for plan in batch.plans)
    models = [tuple(batch.base.files.values()), *(plan.adapter.files for plan in batch.plans)]
    ahead = AHEAD_BYTES * sum(any(file.remote for file in files) for files in models)
    tables = TENSOR_BYTES * tensors + ADAPTER_BYTES * len(batch.plans)
    return (
        PROCESS_BYTES
        + ahead
        + tables
        + OUTPUT_BYTES * output_tensors
        + MATRIX_BYTES * batch.matrix_count
    )


def factor_bytes(plan: Plan, target: Target, itemsize: int) -> int:
    """Return the memory of a module's tensors: stored bytes if not mapped, plus copies that a step keeps in the computing dtype."""
    tensors = [plan.adapter.tensors[name] for name in target.module.tensor_names]
    resident = sum(stored.info.nbytes for stored in tensors if stored.file.io == "pread")
    return resident + target.module.copied_bytes(itemsize)
