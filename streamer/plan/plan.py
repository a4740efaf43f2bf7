"""Plan runs from headers alone: open, match and check a base and its adapters before anything is written, and estimate the memory needed.

The estimate is an upper bound of anonymous memory: the interpreter and torch, the tables of all tensors, and the largest step, as one step
runs at a time. Mapped files do not count: the system drops their pages when it needs memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    pattern_of,
)
from streamer.plan.base import Found, OpenBase
from streamer.plan.carried_tensors import (
    TensorEdits,
    check_announced,
    match_carried,
    merged_architecture,
)
from streamer.plan.name_matching import TensorSlice, joined, match_names
from streamer.plan.names import NameIndex
from streamer.plan.pipelines import match_pipeline, of_pipeline
from streamer.plan.targets import (
    Target,
    match_experts,
    match_targets,
    refuse_misfits,
    tensor_roles,
)
from streamer.storage.checkpoint import Checkpoint, IOMode
from streamer.storage.files import AdapterIdentity, BaseIdentity, Stamp, file_stamp, storage_errors
from streamer.storage.remote_source import AHEAD_BYTES
from streamer.weights.base import StoredTensor
from streamer.weights.logical import WeightView
from streamer.weights.model_config import MODEL_CONFIG, ModelConfig


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
    names
        The names of the base's tensors.
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
    names: NameIndex
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
        name = self.config.architecture
        return self.base.identity if name is None else {"architecture": name, **self.base.identity}

    @cached_property
    def adapter_identity(self) -> AdapterIdentity:
        """Return `DeltaSource.identity`."""
        return self.adapter.identity()

    @cached_property
    def sources(self) -> tuple[side_files.BaseSource, side_files.AdapterSource]:
        """Return names and identities of base and adapter as an output states them, without paths."""
        stated = self.adapter.config.base_model
        return (
            side_files.base_source(self.base.path, self.config, stated, self.base_identity),
            side_files.adapter_source(self.adapter.path, self.adapter_identity),
        )

    def stamps(self) -> dict[str, Sequence[int]]:
        """Return the stamps of every input file by path."""
        others = {os.path.realpath(path): stamp for path, stamp in self.extra_stamps.items()}
        return self.detection_stamps() | others

    def detection_stamps(self) -> dict[str, Sequence[int]]:
        """Return the stamps of the input files that detection reads, by real path, so the spelling of inputs does not matter."""
        stamps: dict[str, Sequence[int]] = {**self.base.stamps()}
        stamps |= {str(file.path): file.stamp for file in self.adapter.files}
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
    base = OpenBase.at(base_path, io, architecture)
    checkpoint = base.checkpoint
    inputs = (checkpoint.path, *paths)
    plans = []
    for path, adapter in zip(paths, opened, strict=True):
        unread: tuple[str, ...] = ()
        source: DeltaSource
        if adapter is None:
            roles = tensor_roles(path, checkpoint, base.config, base.orientation, base.names)
            source = open_finetuned(path, checkpoint, roles, io)
        else:
            source = adapter
            unread = side_files.unread_weights(adapter.directory, adapter.file.path.name)
        plan = match_plan(base, source)
        # The small files that outputs copy or that are read whole.
        copied = side_files.other_files(source.directory)
        if checkpoint.directory is not None:
            copied += side_files.other_files(checkpoint.directory, source.path)
        small = [*source.config_paths, *(file for _, file in copied)]
        stamps = {str(file): _stamp(file) for file in small}
        announced = (*plan.announced, *unread)
        plans.append(replace(plan, extra_stamps=stamps, inputs=inputs, announced=announced))
    return AdapterBatch(checkpoint, tuple(plans))


def match_plan(base: OpenBase, adapter: DeltaSource) -> Plan:
    """Match an adapter with a base; the plan has no side files.

    Raises
    ------
    InputError
        If they do not belong together or are not supported.
    """
    copies: dict[str, str] = {}
    if isinstance(adapter, FinetunedModel):
        adapter, copies = tied.without_copies(base, adapter)
    found = _find(base, adapter)
    edits, announced = _all_edits(base, adapter, found, copies)
    weights, targets = _place(base, adapter, found, edits)
    return Plan(
        base.checkpoint,
        weights,
        adapter,
        targets,
        edits,
        found.mirrors,
        base.config,
        base.names,
        found.architecture,
        announced,
    )


def _find(base: OpenBase, adapter: DeltaSource) -> Found:
    """Find the tensor of every module and parameter."""
    stored = base.checkpoint.weight_map
    architecture = merged_architecture(base.config, adapter)
    ties = () if adapter.describes_model else base.names.ties(architecture)
    aliases = {
        name: StoredTensor(*base.checkpoint.locate(tie.stored))
        for tie in ties
        for name in tie.others
        if name not in stored
    }
    weights = base.weights.replaced(aliases)
    if of_pipeline(base.checkpoint, base.config, adapter):
        matches = match_pipeline(base.checkpoint, adapter, weights)
    else:
        matches = match_names(adapter.modules, base.names.among(weights), adapter.parameters)
        if architecture is None:
            ask = "; if it is tied to one there, name the model's class with --architecture"
            for name, match in matches.items():
                if not match.tensor and "*" not in pattern_of(name):
                    matches[name] = match._replace(why=match.why + ask)
    modules = {name: match for name, match in matches.items() if name in adapter.modules}
    matched = {name: match.tensor for name, match in modules.items() if match.tensor}
    mirrors = tied.mirrored(ties, adapter, matched)
    for module in mirrors.values():
        del modules[module.name]
    return Found(architecture, ties, aliases, matches, matched, mirrors, modules)


def _all_edits(
    base: OpenBase, adapter: DeltaSource, found: Found, copies: Mapping[str, str]
) -> tuple[TensorEdits, tuple[str, ...]]:
    """Collect the edits of the base other than deltas, with notes on what the adapter announces and lacks.

    Parameters
    ----------
    copies
        The base's copies of tied tensors that a fine-tuned model omits, with the reason.
    """
    # Report unmatched modules before unmatched carried tensors: the cause is usually the same.
    if adapter.carried:
        unmatched = [f"{n!r} {match.why}" for n, match in found.deltas.items() if not match.tensor]
        refuse_misfits(unmatched, len(found.deltas), adapter, base.weights)
    vocabulary = tied.vocabulary_tensors(base, found)
    edits = match_carried(base, adapter, found, vocabulary)
    announced: tuple[str, ...] = ()
    if adapter.describes_model:
        edits = replace(edits, dropped=copies)
        _refuse_incomplete(base, adapter, found, edits)
    else:
        announced = check_announced(base, adapter, found, edits)
        edits = tied.with_ties(base, adapter, found, edits)
    if edits.vocabularies:
        edits = tied.without_stale_values(base.checkpoint, found.architecture, vocabulary, edits)
    return edits, announced


def _place(
    base: OpenBase, adapter: DeltaSource, found: Found, edits: TensorEdits
) -> tuple[WeightView, tuple[Target, ...]]:
    """Fit every module and expert to its matrix; matrices that combine several tensors join the weights."""
    weights = base.weights.replaced({**found.aliases, **edits.sources})
    fused = (match for match in found.deltas.values() if match.pieces)
    weights = weights.extended({m.tensor: partial(joined, m.tensor, m.pieces) for m in fused})
    names = base.names.among(weights)
    targets = match_targets(weights, adapter, base.orientation, found.deltas, names)
    classes = base.orientation.architectures
    experts = match_experts(weights, adapter, base.config, classes, found.matches, names)
    weights = weights.extended({t.tensor: partial(joined, t.tensor, t.pieces) for t in experts})
    return weights, tuple(sorted([*targets, *experts], key=file_order(weights)))


def _refuse_incomplete(
    base: OpenBase, tuned: DeltaSource, found: Found, edits: TensorEdits
) -> None:
    """Refuse a fine-tuned model that lacks tensors of its base, or whose base is quantized."""
    path = base.checkpoint.path
    if base.weights.quantized_names:
        raise UnsupportedError(
            f"{path}: is quantized; a fine-tuned model must be compared with the 16-bit base from which it was trained"
        )
    present = {*(match.tensor for match in found.matches.values()), *edits.sources, *edits.dropped}
    # Loading does not need these.
    spare = () if found.architecture is None else found.architecture.may_be_missing
    names = base.checkpoint.weight_map
    lacking = (name for name in names if name not in present)
    missing = [name for name in lacking if not any(re.search(s, name) for s in spare)]
    if missing:
        raise MismatchError(
            f"{tuned.path}: lacks {len(missing)} of the base's {len(names)} tensors, {missing[0]!r} first; "
            f"check that it was trained from {path} and that both have the same class, with or without a head"
        )


def file_order(weights: WeightView) -> Callable[[Target], tuple[int, int]]:
    """Return the key that sorts targets by the base's file order: the weight's position, and the matrix's index in it."""
    return lambda target: (weights.file_index(target.slices[0].weight), target.slices[0].index or 0)


def _stamp(path: Path) -> Stamp:
    with storage_errors(path, "read"):
        return file_stamp(os.stat(path))


def make_base_plan(base_path: str | Path, io: IOMode, architecture: str | None) -> Plan:
    """Open a base alone; the plan has no targets. See `make_plan`."""
    base = OpenBase.at(base_path, io, architecture)
    path = base.checkpoint.path / MODEL_CONFIG
    stamps = {str(path): file_stamp(path.stat())} if path.exists() else {}
    plan = match_plan(base, NoAdapter.at(base.checkpoint.path))
    return replace(plan, inputs=(base.checkpoint.path,), extra_stamps=stamps)


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
            for target in plan.targets:
                assignment = Assignment(i, target)
                if wanted(assignment):
                    stored = plan.weights[target.tensor].tensors.values()
                    where = tuple((str(s.file.path), s.info.start, s.info.end) for s in stored)
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

    Whether a step may run is decided here; how much room or share it gets, in `Work.limits` and `Workers.budget`.
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
        shape = "x".join(map(str, most.shape))
        step = f"tensor {most.tensor!r} ({shape})" if shape else most.tensor
        raise too_little_memory(max_memory, step, most.nbytes)


def too_little_memory(max_memory: int, step: str, needed: int, advice: str = "") -> UsageError:
    """Make the error for a budget that is too small for a step; it names the smallest sufficient one."""
    enough = f"{-(-needed >> 20)}M{advice}"
    return UsageError(
        f"max_memory: {max_memory >> 20}M is not enough for {step}; it needs {enough}"
    )


def resident_bytes(batch: AdapterBatch, output_tensors: int = 0) -> int:
    """Estimate the memory used between any two steps, including the tables of all adapters.

    Parameters
    ----------
    output_tensors
        Number of tensors to write, over all merged models.
    """
    plans = batch.plans
    tensors = len(batch.base.weight_map) + sum(len(plan.adapter.tensors) for plan in plans)
    models = [tuple(batch.base.files.values()), *(plan.adapter.files for plan in plans)]
    remote = sum(any(file.remote for file in files) for files in models)
    return (
        PROCESS_BYTES
        + AHEAD_BYTES * remote
        + TENSOR_BYTES * tensors
        + ADAPTER_BYTES * len(plans)
        + OUTPUT_BYTES * output_tensors
        + MATRIX_BYTES * batch.matrix_count
    )


def factor_bytes(plan: Plan, target: Target, itemsize: int) -> int:
    """Return the memory of a module's tensors: stored bytes if not mapped, plus copies that a step keeps in the computing dtype."""
    tensors = [plan.adapter.tensors[name] for name in target.module.tensor_names]
    resident = sum(stored.info.nbytes for stored in tensors if stored.file.io == "pread")
    return resident + target.module.copied_bytes(itemsize)
