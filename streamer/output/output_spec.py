"""Describe an output from headers alone, before anything is written: its files, record, card, and its plan on disk."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from streamer import __version__
from streamer.adapters.adapter_config import CONFIG_NAME
from streamer.detection.findings_file import journal_of
from streamer.output.job import Job
from streamer.output.metrics import totals
from streamer.output.model_card import CARD_NAME, MOST_FACTS, Card
from streamer.output.records import SCHEMA, MitigatedMatrix, Record
from streamer.plan.memory_estimate import MemoryEstimate
from streamer.plan.side_files import is_module, other_files, read_beside, skipped_files
from streamer.plan.targets import Target
from streamer.plan.tokenizer import own_tokenizer
from streamer.storage.buffers import Piece
from streamer.storage.checkpoint import INDEX_NAME, SINGLE_NAME
from streamer.storage.header import TensorInfo
from streamer.storage.output_plan import RECORD_NAME, OutputPlan
from streamer.storage.shard_writer import ShardPlan

OWN_FINDINGS = ".streamer.findings.safetensors"
"""Findings that a job makes for itself, in its output directory."""


@dataclass(frozen=True)
class OutputSpec:
    """An output to be written.

    Attributes
    ----------
    path
        Its directory.
    command
        ``merge`` or ``mitigate``.
    shards
        Its safetensors files by name, in the order of writing.
    finals
        Small files that are written last, by name; if there are none, the last shard makes the output loadable.
    copies
        Names and paths of the files to copy; the files in `skipped_files` are not copied.
    conflicting_names
        See `OutputPlan`.
    base_bytes
        Number of bytes of the base's tensors that are read.
    texts
        Small files with new contents that are written before the shards, by name.
    tokenizer
        Source of its tokenizer, if it has one.
    warnings, notes, advice
        Lines that are printed and recorded; they contain no paths, so that outputs are reproducible.
    to_lora
        Rank of a LoRA adapter made from deltas of any kind, or the share of their energy that it keeps.
    card
        Card that is written with the last facts; None if there is none, or if an input's card is copied.
    model_tensors
        Number of tensors of a merged model, which need memory in its plan.
    """

    job: Job
    path: Path
    command: str
    shards: Mapping[str, ShardPlan]
    finals: Mapping[str, bytes]
    copies: list[tuple[str, Path]]
    skipped_files: list[str]
    conflicting_names: tuple[str, ...]
    base_bytes: int
    texts: Mapping[str, bytes] = field(default_factory=dict)
    tokenizer: Literal["adapter", "base"] | None = None
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    to_lora: int | float | None = None
    card: Card | None = None
    model_tensors: int = 0

    def record(self, matrices: list[MitigatedMatrix], nbytes: int = 0) -> Record:
        """Return the output's record, without its files, which have `nbytes` bytes."""
        job = self.job
        base, adapter = job.plan.sources
        options, certified = job.method.as_json(), sum(m["certified"] is True for m in matrices)
        found: Record = {"schema": SCHEMA, "command": self.command, "version": __version__, "base": base, "adapter": adapter,
                "detection": job.detection_record(certified), "method": options["method"], "scale": options["scale"],
                "lambda": options["lambda"], "coefficients": options.get("coefficients"), "to_lora": self.to_lora,
                "dequantize": job.dequantize, "totals": totals(matrices, nbytes),
                "warnings": [*job.plan.notes, *self.warnings], "notes": self.notes, "advice": self.advice, "left_out": self.skipped_files,
                "carried": job.plan.edits.listed(job.plan.base, job.plan.adapter.describes_model), "tokenizer": self.tokenizer,
                "matrices": matrices}  # fmt: skip
        if "map" in options:
            found["map"] = options["map"]
        if self._file:
            found["file"] = self._file
        if job.measured:
            found["measured"] = list(job.measured)
        return found

    @property
    def _file(self) -> str:
        """Return the name of the file of the coefficients or the map, which does not determine the output; empty if there is none."""
        used = self.job.method.file
        return "" if used is None else Path(used.name).name

    def with_card(self, pipeline: str = "") -> OutputSpec:
        """Return the same output with its own card instead of the input's, if it gets one; `pipeline` as in `Card`."""
        job = self.job
        if not job.card:
            return self
        kinds = job.plan.adapter.describes_model, job.plan.config.pipeline
        card = Card(self._original_card(), *job.plan.sources, self.command, pipeline, *kinds)
        return replace(self, card=card, copies=[c for c in self.copies if c[0] != CARD_NAME])

    @cached_property
    def output(self) -> OutputPlan:
        """Plan the files in the order of writing, with the commit point last, and the digest that identifies this output."""
        plan = self.job.plan
        copies = [(name, p.stat().st_size) for name, p in self.copies]
        texts = [(name, len(data)) for name, data in self.texts.items()]
        shards = [(name, shard.nbytes) for name, shard in self.shards.items()]
        finals = [(name, len(data)) for name, data in self.finals.items()]
        *files, commit = *copies, *texts, *shards, *finals
        card = [] if self.card is None else [(CARD_NAME, len(self.card.original) + MOST_FACTS)]
        files = [*files, *card, commit]
        # The version of streamer and the names of the inputs do not count.
        data = [(name, shard.header.data_bytes) for name, shard in self.shards.items()]
        named = "\n".join(t.name for shard in self.shards.values() for t in shard.header.tensors)
        # What sentence-transformers trained beside the adapter cannot be told apart by size alone.
        modules = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in self.copies if is_module(name)}
        converted = {} if self.to_lora is None else {"to_lora": self.to_lora}
        digest = plan.digest(
            command=self.command, files=[*copies, *texts, *finals], data=data,
            named=hashlib.sha256(named.encode()).hexdigest(), modules=modules,
            original_card=hashlib.sha256(self._original_card()).hexdigest(), **self.job.decisions(), **converted,
        )  # fmt: skip
        # A run resumed under other names of its inputs, through links, would otherwise write both names.
        stamps = {**plan.stamps(), " and ".join([*(source["name"] for source in plan.sources), self._file]): ()}
        instead = {CARD_NAME: "pass --no-card"} if self.card is not None and not self.card.original else {}
        read = read_beside(self.path, {name for name, _ in files})
        beside = tuple(name for name in read if name not in self.conflicting_names)
        temporary = []
        if (
            self.job.detects
        ):  # its own findings stay to the end; their journal is removed before any large file is written
            size, journal = self.job.findings_size
            more = max(0, journal - sum(size for _, size in files))
            temporary = [(OWN_FINDINGS, size), (journal_of(Path(OWN_FINDINGS)).name, more)]
        return OutputPlan(self.path, tuple(files), digest, stamps, plan.inputs, self.conflicting_names, tuple(temporary),
                          frozenset({CARD_NAME}), instead, self.job.bits, __version__, beside)  # fmt: skip

    def _original_card(self) -> bytes:
        """Return the input's card that the output's is made from, or that is copied; empty if there is none."""
        if self.card is not None:
            return self.card.original
        return b"".join(path.read_bytes() for name, path in self.copies if name == CARD_NAME)


class Writer(ABC):
    """Writer of one kind of output.

    Attributes
    ----------
    spec
        The output to be written.
    written
        The matrices in the output, if not all.
    """

    spec: OutputSpec
    written: Sequence[Target] | None = None

    @abstractmethod
    def estimates(self, resident: int) -> Iterator[MemoryEstimate]:
        """Estimate the peak memory for each matrix, including `resident` bytes already in use."""

    @abstractmethod
    def tensor_bytes(self, info: TensorInfo, job: Job, metrics: list[MitigatedMatrix]) -> Iterable[Piece]:
        """Yield the bytes of a tensor in pieces, and append the metrics of each matrix that is mitigated for it.

        Parameters
        ----------
        job
            The spec's job, with its findings available.
        """


def adapter_spec(job: Job, path: Path, shard: ShardPlan, config: bytes | None, source: Path | None,
                 to_lora: int | float | None = None) -> OutputSpec:  # fmt: skip
    """Describe an adapter of one tensor file and a config, if it has one, with the other files of the adapter in `source`, if given."""
    copies = [(name, p) for name, p in other_files(source) if name != CONFIG_NAME]
    own = (shard.name, RECORD_NAME)
    skipped = [] if source is None else [name for name in skipped_files(source) if name not in own]
    base_bytes = sum(job.plan.weights[t.tensor].nbytes for t in job.plan.targets if not t.module.low_rank)
    return OutputSpec(
        job, path, "mitigate", {shard.name: shard}, {} if config is None else {CONFIG_NAME: config}, copies, skipped,
        ("adapter_model.bin", SINGLE_NAME, INDEX_NAME), base_bytes, tokenizer=own_tokenizer(copies), warnings=job.warnings,
        to_lora=to_lora,
    ).with_card()  # fmt: skip
