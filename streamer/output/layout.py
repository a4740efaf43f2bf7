"""Describe outputs: what is in each, where it goes, and the mitigation that makes it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, cast

from streamer import __version__
from streamer.detection.detect import detection_estimates, findings_bytes
from streamer.detection.findings import Findings
from streamer.output.form import Form
from streamer.output.mitigation import Mitigation
from streamer.output.recipes import Recipe
from streamer.output.record import (
    CARD_NAME,
    MOST_FACTS,
    OUTPUT_SCHEMA,
    Card,
    MitigatedMatrix,
    Record,
    totals,
)
from streamer.plan.plan import MemoryEstimate, Plan
from streamer.plan.side_files import is_module, read_beside, stale_weights
from streamer.plan.targets import Target
from streamer.storage.atomic_file import ShardPlan
from streamer.storage.transaction import OutputPlan, journal_of

OWN_FINDINGS = ".streamer.findings.safetensors"
"""Findings that a run makes for itself, in its output directory."""

Command = Literal["merge", "mitigate"]

Memory = Callable[[Mitigation, int], Iterator[MemoryEstimate]]
"""Estimates the peak memory for each matrix of an output, including the given bytes, which are already in use."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Files and tensors of an output of one kind.

    Attributes
    ----------
    shards
        Its safetensors files by name, in the order of writing.
    recipes
        For each tensor, how it is made.
    memory
        Estimates the memory of a run.
    texts
        Small files with new contents that are written before the shards, by name.
    finals
        Small files that are written last, by name; if there are none, the last shard makes the output loadable.
    copies
        Names and paths of the files to copy.
    left_out
        Names of files that are not copied.
    conflicting_names
        Names of files that a loader might prefer to ours; see `OutputPlan`.
    components
        Folders of a pipeline with new weights: with ``variant=``, diffusers would load old weights that an output holds beside them.
    base_bytes
        Number of bytes of the base's tensors that are read.
    tokenizer
        Source of its tokenizer, if it has one.
    warnings, notes, advice
        Lines that are printed and recorded; they contain no paths, so that outputs are reproducible.
    model_tensors
        Number of tensors of a merged model, which need memory in its plan.
    pipeline
        See `Card`.
    written
        The matrices in the output, if not all.
    """

    command: Command
    shards: Mapping[str, ShardPlan]
    recipes: Mapping[str, Recipe]
    memory: Memory
    copies: Sequence[tuple[str, Path]]
    left_out: Sequence[str]
    conflicting_names: Sequence[str]
    base_bytes: int
    texts: Mapping[str, bytes] = field(default_factory=dict)
    finals: Mapping[str, bytes] = field(default_factory=dict)
    components: Collection[str] = ()
    tokenizer: Literal["adapter", "base"] | None = None
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    advice: Sequence[str] = ()
    model_tensors: int = 0
    pipeline: str = ""
    written: Sequence[Target] | None = None


@dataclass(frozen=True)
class Output:
    """One output: a layout in a form, in a directory, and the mitigation that makes it."""

    path: Path
    layout: Layout
    form: Form
    mitigation: Mitigation

    def judged_by(self, findings: Findings) -> Output:
        """Return the output with its findings, once they are made."""
        return replace(self, mitigation=replace(self.mitigation, findings=findings))

    def within(self, max_memory: int | None) -> Output:
        """Return the output, to be made within so many bytes."""
        detection = replace(self.mitigation.detection, max_memory=max_memory)
        return replace(self, mitigation=replace(self.mitigation, detection=detection))

    @property
    def plan(self) -> Plan:
        """Return what the adapter changes in the base."""
        return self.mitigation.plan

    @cached_property
    def _original_card(self) -> bytes:
        return b"".join(path.read_bytes() for name, path in self.layout.copies if name == CARD_NAME)

    @cached_property
    def card(self) -> Card | None:
        """Return the card that is written with the last facts; None if an input's card is copied, if it has one."""
        if not self.form.card:
            return None
        return Card(
            self._original_card,
            self.layout.pipeline,
            self.plan.adapter.describes_model,
            self.plan.config.pipeline,
        )

    @cached_property
    def copies(self) -> dict[str, Path]:
        """Return the files to copy by name; a card that is written is not."""
        copies = dict(self.layout.copies)
        if self.card is not None:
            copies.pop(CARD_NAME, None)
        return copies

    @property
    def _options_file(self) -> str:
        """Return the name of the file of the coefficients or the map, which does not determine the output; empty if there is none."""
        file = self.mitigation.method.file
        return "" if file is None else Path(file.name).name

    def record(self, matrices: list[MitigatedMatrix], nbytes: int = 0) -> Record:
        """Return the output's record, without its files, which have `nbytes` bytes."""
        layout = self.layout
        plan = self.plan
        base, adapter = plan.sources
        method = self.mitigation.method.as_json()
        certified = sum(m["certified"] is True for m in matrices)
        record: Record = {
            "schema": OUTPUT_SCHEMA,
            "command": layout.command,
            "version": __version__,
            "base": base,
            "adapter": adapter,
            "detection": self.mitigation.detection_record(certified),
            "method": method["method"],
            "scale": method["scale"],
            "lambda": method["lambda"],
            "coefficients": method.get("coefficients"),
            "to_lora": self.form.to_lora,
            "dequantize": self.form.dequantize,
            "totals": totals(matrices, nbytes),
            "warnings": [*plan.notes, *layout.warnings],
            "notes": [*layout.notes],
            "advice": [*layout.advice],
            "left_out": [*layout.left_out],
            "carried": plan.edits.listed(plan.base, plan.adapter.describes_model),
            "tokenizer": layout.tokenizer,
            "matrices": matrices,
        }
        if_any = {"map": method.get("map"), "file": self._options_file}
        some = {key: value for key, value in if_any.items() if value}
        return cast(Record, {**record, **some, **self.form.measured, **self.form.changes()})

    @cached_property
    def items(self) -> dict[str, int]:
        """Count for each file what progress counts: a shard's tensors, or the file."""
        tensors = {name: len(shard.header.tensors) for name, shard in self.layout.shards.items()}
        return {name: tensors.get(name, 1) for name, _ in self.on_disk.files}

    @cached_property
    def on_disk(self) -> OutputPlan:
        """Plan the files in the order of writing, with the commit point last, and the digest that identifies this output."""
        layout = self.layout
        copies = [(name, path.stat().st_size) for name, path in self.copies.items()]
        texts = [(name, len(data)) for name, data in layout.texts.items()]
        shards = [(name, shard.nbytes) for name, shard in layout.shards.items()]
        finals = [(name, len(data)) for name, data in layout.finals.items()]
        *files, commit = *copies, *texts, *shards, *finals
        if self.card is not None:
            files.append((CARD_NAME, len(self.card.original) + MOST_FACTS))
        files.append(commit)
        # A run resumed under other names of its inputs, through links, would otherwise write both names.
        names = [*(source["name"] for source in self.plan.sources), self._options_file]
        return OutputPlan(
            self.path,
            tuple(files),
            self._digest([*copies, *texts, *finals]),
            {**self.plan.stamps(), " and ".join(names): ()},
            self.plan.inputs,
            self._conflicting_names({name for name, _ in files}),
            self._temporary(sum(size for _, size in files)),
            frozenset({CARD_NAME}),
            self.mitigation.bits,
            __version__,
        )

    def _digest(self, small_files: Sequence[tuple[str, int]]) -> str:
        """Compute what identifies the output; the version of streamer and the names of the inputs do not count."""
        shards = self.layout.shards
        named = "\n".join(t.name for shard in shards.values() for t in shard.header.tensors)
        # What sentence-transformers trained beside the adapter cannot be told apart by size alone.
        modules = {
            name: hashlib.sha256(path.read_bytes()).hexdigest()
            for name, path in self.copies.items()
            if is_module(name)
        }
        return self.plan.digest(
            schema=OUTPUT_SCHEMA,
            command=self.layout.command,
            files=small_files,
            data=[(name, shard.header.data_bytes) for name, shard in shards.items()],
            named=hashlib.sha256(named.encode()).hexdigest(),
            modules=modules,
            original_card=hashlib.sha256(self._original_card).hexdigest(),
            **self.mitigation.decisions(),
            **self.form.decisions(),
        )

    def _conflicting_names(self, names: Collection[str]) -> tuple[str, ...]:
        layout = self.layout
        present = (
            f"{component}/{path.name}"
            for component in layout.components
            for path in (self.path / component).glob("[!.]*")
        )
        conflicting = [*layout.conflicting_names, *stale_weights(present, layout.components)]
        ours = {*layout.finals, *layout.shards, *self.copies}
        others = (name for name in conflicting if name not in ours)
        return (*others, *read_beside(self.path, names))

    def _temporary(self, nbytes: int) -> tuple[tuple[str, int], ...]:
        """List the temporary files of a run whose output has `nbytes` bytes, with their largest sizes."""
        if not self.mitigation.detects:
            return ()
        # Its own findings stay to the end; their journal is removed before any large file is written.
        size = findings_bytes(self.plan, self.mitigation.detection)
        journal = journal_of(Path(OWN_FINDINGS)).name
        return ((OWN_FINDINGS, size), (journal, max(0, size - nbytes)))

    def needs(self, resident: int) -> Iterator[MemoryEstimate]:
        """Estimate the peak memory for each matrix in all steps of the run, which may detect first."""
        needs = self.layout.memory(self.mitigation, resident)
        if not self.mitigation.detects:
            return needs
        detecting = detection_estimates([self.plan], self.mitigation.detection, resident)
        return itertools.chain(detecting, needs)

    def shard(self, name: str) -> ShardPlan:
        """Plan a file of the output with complete metadata, which needs the findings."""
        stamp = self.mitigation.stamp(self.layout.command, self.layout.written)
        ((key, value),) = stamp.items()
        return self.layout.shards[name].with_metadata(key, value)
