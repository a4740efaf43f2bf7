"""Apply findings: a mitigated adapter, or merged model shards, written as it goes. No SVD of a weight matrix is done here."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from streamer import __version__
from streamer.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME
from streamer.detection.findings import Findings
from streamer.detection.findings_file import journal_of
from streamer.detection.intruders import Detection
from streamer.detection.matrix_finding import MatrixFinding
from streamer.detection.memory import detection_estimates
from streamer.detection.options import DetectionOptions
from streamer.detection.run import detect_matrix, findings_bytes
from streamer.detection.stamps import STAMP, DetectionRecord, detection_record, stamp
from streamer.errors import NumericError
from streamer.events import Event, Monitor
from streamer.linalg import deltas
from streamer.linalg.deltas import Delta
from streamer.linalg.operators import all_finite
from streamer.linalg.torch_state import threads
from streamer.output.memory import mitigation_bytes, rows_bytes
from streamer.output.merged_model import MergedModel, plan_merged
from streamer.output.metrics import matrix_figures
from streamer.output.mitigation import MitigationOptions, mitigate
from streamer.output.model_card import CARD_NAME, Card, longest_matrices, longest_totals, take_original
from streamer.output.recipes import AddBias, Cast, ReplaceRows, repeats
from streamer.output.records import SCHEMA, MitigatedMatrix, Record, Totals
from streamer.plan.memory import MemoryEstimate, check_budget, resident_bytes
from streamer.plan.plan import Plan
from streamer.plan.provenance import mitigated_before
from streamer.plan.side_files import other_files, skipped_files
from streamer.plan.targets import Target
from streamer.plan.tokenizer import with_tokenizer
from streamer.storage.atomic import Buffer
from streamer.storage.checkpoint import INDEX_NAME, SINGLE_NAME
from streamer.storage.header import TensorInfo
from streamer.storage.output_plan import RECORD_NAME, OutputPlan
from streamer.storage.shard_writer import ShardPlan, Source
from streamer.weights.dequantize import STALE
from streamer.weights.dtypes import TORCH_DTYPES, as_tensor

OWN_FINDINGS = ".streamer.findings.safetensors"
"""Findings that a job makes for itself, in its output directory."""


@dataclass
class Job:
    """One mitigation, ready to run: the plan, the options, and where findings come from.

    Attributes
    ----------
    findings
        Given ones; without them the job detects, where it needs to, into a file of its own in the output directory.
    dequantize
        Whether a merged model is written plain where the base is quantized.
    card
        Whether the output's ``README.md`` says how it was made.
    threads
        Torch's threads for a detection amid the merging of rows, which has one: its last bits depend on them.
    monitor
        Told of what happens in such a detection.
    """

    plan: Plan
    options: MitigationOptions
    detection: DetectionOptions
    device: torch.device
    findings: Findings | None = None
    dequantize: bool = False
    card: bool = True
    threads: int = field(default_factory=torch.get_num_threads)
    monitor: Monitor | None = None
    _last: tuple[str, Detection] | None = None

    def detection_of(self, target: Target) -> Detection | None:
        """The findings on one matrix; None where the options need none."""
        if not self.options.needs_detection:
            return None
        if self.findings is None:
            if self._last is None or self._last[0] != target.tensor:  # codes and scales are made one after the other
                with threads(self.threads):
                    found = detect_matrix(self.plan, target, self.detection, self.device, monitor=self.monitor)
                self._last = target.tensor, found.detection
            return self._last[1]
        return self._by_tensor[target.tensor].detection

    @property
    def detects(self) -> bool:
        """Whether the job makes findings of its own."""
        return self.findings is None and self.options.needs_detection

    @property
    def warnings(self) -> list[str]:
        """What mitigating is warned of: an adapter whose intruders were scaled before."""
        if self.options.mitigation_lambda == 1:
            return []
        return mitigated_before(self.plan.adapter.files[0].header.metadata)

    def intruders(self, target: Target) -> int:
        """How many of them Δ' takes up, at most."""
        if not self.options.needs_detection:
            return 0
        if self.findings is None:
            return self.detection.directions(target.module.shape)
        return len(self._by_tensor[target.tensor].detection.intruders)

    @cached_property
    def _by_tensor(self) -> dict[str, MatrixFinding]:
        assert self.findings is not None
        return self.findings.by_tensor

    def mitigated(self, target: Target) -> tuple[Delta, Delta, Detection | None]:
        """Δ, Δ' and the findings of one matrix; Δ' is Δ itself where nothing changes."""
        delta = self.plan.delta(target)
        for what, pieces in deltas.named_parts(delta):
            if not all(map(all_finite, pieces)):
                raise NumericError(
                    f"{self.plan.adapter.file.path}: {what} of module {target.module.name!r} holds NaN or Inf; check the adapter"
                )
        found = self.detection_of(target)
        if found is not None and not (all_finite(found.U) and all_finite(found.Vh)):
            raise NumericError(f"findings: those on {target.tensor!r} hold NaN or Inf; run detect again")
        return delta, mitigate(delta, found, self.options), found

    def decisions(self) -> dict[str, Any]:
        """Everything besides the inputs that decides the output's bytes, but for the last bits of given findings."""
        detection: Any = None
        if self.options.needs_detection:
            detection = self.detection.as_dict() if self.findings is None else self.findings.decisions_digest()
        return {
            "schema": SCHEMA,
            "mitigation": self.options.as_dict(),
            "detection": detection,
            "dequantize": self.dequantize,
            "card": self.card,
        }

    @property
    def bits(self) -> str:
        """Which last bits the output's are made of: those of given findings, which depend on the threads that these were made on."""
        return self.findings.digest() if self.findings is not None and self.options.needs_detection else ""

    def detection_record(self, certified: int) -> DetectionRecord | None:
        """How intruders are found; None where that does not matter."""
        if not self.options.needs_detection:
            return None
        options = self.detection if self.findings is None else self.findings.options
        return detection_record(options, certified, len(self.plan.targets))

    def stamp(self, command: str) -> dict[str, str]:
        """What the metadata of the output's files says; before the findings are there, at its longest."""
        certified = len(self.plan.targets)
        if self.options.needs_detection and self.findings is not None:
            certified = sum(self._by_tensor[t.tensor].detection.certified for t in self.plan.targets)
        return {STAMP: stamp(command, *self.plan.sources, self.detection_record(certified), self.options.as_json())}


def merge_estimates(job: Job, model: MergedModel) -> Iterator[MemoryEstimate]:
    """Memory for each tensor of a merged model that is computed; for one that is copied the process has enough."""
    resident = resident_bytes(job.plan)
    for target in job.plan.targets:
        delta = mitigation_bytes(job.plan, target, job.intruders(target))
        rows = rows_bytes(job.plan.weights[target.tensor])
        yield MemoryEstimate(target.tensor, target.module.shape, resident + delta + rows)
    for output in (o for outputs in model.files.values() for o in outputs):
        if isinstance(output.recipe, Cast | AddBias | ReplaceRows):
            yield MemoryEstimate(output.name, output.shape, resident + rows_bytes(output.recipe.weight))


class ModelSink:
    """Writes merged shards: the base's shard names, tensor order, dtypes and metadata, index and other files."""

    command = "merge"

    def __init__(self, job: Job, path: Path) -> None:
        base = job.plan.base
        self.job = job
        self.model = plan_merged(job.plan, job.dequantize)
        self.shards: Mapping[str, ShardPlan] = self.model.shards(job.stamp(self.command))
        self.edited: Mapping[str, bytes] = self.model.texts
        self.finals: Mapping[str, bytes] = self.model.finals(self.shards)
        aside = {CONFIG_NAME, WEIGHTS_NAME, *self.edited}
        # An adapter that lies in the base's directory is no part of the merged model; a fine-tuned model in its place describes it.
        beside: Path | None = base.directory
        adapter: Path | None = job.plan.adapter.path
        if job.plan.adapter.describes_model:
            beside, adapter = adapter, None
        copies = [] if beside is None else [c for c in other_files(beside, adapter) if c[0] not in aside]
        stale = [name for name, _ in copies if job.dequantize and name in STALE]
        self.copies = [c for c in copies if c[0] not in stale]
        self.copies, self.tokenizer, lost, says = with_tokenizer(job.plan, self.copies)
        self.warnings = [*job.warnings, *lost]
        self.to_lora: int | None = None
        self.notes = [*job.plan.edits.notes, *self.model.head.notes, *says]
        self.advice = list(self.model.head.advice)
        written = {*base.files, INDEX_NAME, RECORD_NAME, *aside}
        self.skipped_files = stale + (
            [] if beside is None else [n for n in skipped_files(beside, adapter) if n not in written]
        )
        self.card, self.copies = plan_card(self, self.model.head.pipeline)
        # A loader would apply an adapter that lies beside the model once more.
        conflicting_names = [SINGLE_NAME, INDEX_NAME, CONFIG_NAME, WEIGHTS_NAME, "adapter_model.bin"]
        self.output = output_plan(
            self, path, tuple(r for r in conflicting_names if r not in self.finals and r not in self.shards)
        )

    def needs(self) -> Iterator[MemoryEstimate]:
        """Memory for each matrix."""
        return merge_estimates(self.job, self.model)

    def source(self, name: str, figures: list[MitigatedMatrix]) -> Source:
        """Bytes of each tensor of one shard; appends the figures of merged matrices."""
        outputs = {o.name: o for o in self.model.files[name]}

        def mitigated(target: Target) -> tuple[Delta, Delta]:
            delta, after, found = self.job.mitigated(target)
            figures.append(matrix_figures(target, delta, after, found, self.job.options.scale, 0.0))
            return delta, after

        def pour(info: TensorInfo) -> Iterable[Buffer]:
            recipe = outputs[info.name].recipe
            return recipe.pieces((lambda target: self.job.mitigated(target)[:2]) if repeats(recipe) else mitigated)

        return pour


class Sink(Protocol):
    """What is written: the files, in order, where the bytes of their tensors come from, and what is to be said of them."""

    command: str
    job: Job
    shards: Mapping[str, ShardPlan]
    edited: Mapping[str, bytes]
    finals: Mapping[str, bytes]
    copies: list[tuple[str, Path]]
    skipped_files: list[str]
    warnings: list[str]
    notes: list[str]
    advice: list[str]
    tokenizer: Literal["adapter", "base"] | None
    to_lora: int | None
    card: Card | None
    output: OutputPlan

    def needs(self) -> Iterator[MemoryEstimate]:
        """Memory for each matrix."""

    def source(self, name: str, figures: list[MitigatedMatrix]) -> Source:
        """Bytes of each tensor of one file; appends the figures of its matrices."""


def make_record(sink: Sink, certified: int, sums: Totals, matrices: Sequence[MitigatedMatrix] = ()) -> Record:
    """The record of an output, but for its files."""
    job = sink.job
    base, adapter = job.plan.sources
    options = job.options.as_json()
    return {"schema": SCHEMA, "command": sink.command, "version": __version__, "base": base, "adapter": adapter,
            "detection": job.detection_record(certified), "method": options["method"], "scale": options["scale"],
            "lambda": options["lambda"], "to_lora": sink.to_lora, "dequantize": job.dequantize, "totals": sums,
            "warnings": [*job.plan.notes, *sink.warnings], "notes": sink.notes, "advice": sink.advice, "left_out": sink.skipped_files,
            "carried": job.plan.edits.listed(job.plan.base), "tokenizer": sink.tokenizer, "matrices": list(matrices)}  # fmt: skip


def plan_card(sink: Sink, pipeline: str = "") -> tuple[Card | None, list[tuple[str, Path]]]:
    """An output's card, if it gets one, and the files that are copied beside it."""
    job = sink.job
    if not job.card:
        return None, sink.copies
    original, copies = take_original(sink.copies)
    if original is None:
        return None, copies
    shapes = [t.module.shape for t in job.plan.targets]
    sums = longest_totals(len(shapes), sum(map(job.detection.directions, shapes)))
    longest = make_record(sink, len(shapes), sums, longest_matrices(len(shapes)))
    return Card(original, *job.plan.sources, sink.command, pipeline, longest, job.plan.adapter.describes_model), copies


def output_plan(sink: Sink, path: Path, conflicting_names: tuple[str, ...], **decisions: Any) -> OutputPlan:
    """What the sink will write, in the order of writing, the commit point last; `decisions` besides the job's tell it from others."""
    copies = [(name, p.stat().st_size) for name, p in sink.copies]
    edited = [(name, len(data)) for name, data in sink.edited.items()]
    shards = [(name, shard.nbytes) for name, shard in sink.shards.items()]
    finals = [(name, len(data)) for name, data in sink.finals.items()]
    *files, commit = *copies, *edited, *shards, *finals
    card = [] if sink.card is None else [(CARD_NAME, sink.card.most_bytes)]
    files = [*files, *card, commit]
    plan = sink.job.plan
    # Without what the tool's version and the names of the inputs decide: the output of another version is the same output.
    data = [(name, shard.header.data_bytes) for name, shard in sink.shards.items()]
    original = _original_card(sink)
    digest = plan.digest(
        command=sink.command, files=[*copies, *edited, *finals], data=data, original_card=hashlib.sha256(original).hexdigest(),
        **sink.job.decisions(), **decisions,
    )  # fmt: skip
    # A run that is taken up under other names of its inputs, by way of links, would write both names.
    stamps = {**plan.stamps(), " and ".join(source["name"] for source in plan.sources): ()}
    instead = {CARD_NAME: "pass --no-card"} if sink.card is not None and not sink.card.original else {}
    return OutputPlan(path, tuple(files), digest, stamps, plan.inputs, conflicting_names, _temporary(sink.job, files),
                      frozenset(name for name, _ in card), frozenset({CARD_NAME}), instead, sink.job.bits, __version__)  # fmt: skip


def _original_card(sink: Sink) -> bytes:
    """The card of an input that an output's is made from, or that is copied; empty where there is none."""
    if sink.card is not None:
        return sink.card.original
    return b"".join(path.read_bytes() for name, path in sink.copies if name == CARD_NAME)


def _temporary(job: Job, files: Iterable[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """The job's own findings, which stay to the end; their journal goes before any large file comes."""
    if not job.detects:
        return ()
    findings, journal = findings_bytes(job.plan, job.detection)
    more = max(0, journal - sum(size for _, size in files))
    return (OWN_FINDINGS, findings), (journal_of(Path(OWN_FINDINGS)).name, more)


def merged_tensors(job: Job, monitor: Monitor) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the merged model, in file order; one at a time in memory. What is refused is refused by the call itself."""
    model = plan_merged(job.plan, job.dequantize)
    most = max(info.nbytes for shard in model.shards().values() for info in shard.header.tensors)
    detecting = detection_estimates(job.plan, job.detection) if job.detects else ()
    needs = (replace(n, nbytes=n.nbytes + most) for n in itertools.chain(detecting, merge_estimates(job, model)))
    check_budget(needs, job.detection.max_memory)
    return _tensors(replace(job, monitor=monitor), model, monitor)


def _tensors(job: Job, model: MergedModel, monitor: Monitor) -> Iterator[tuple[str, Tensor]]:
    shards = model.shards()
    done, total = 0, sum(shard.header.data_bytes for shard in shards.values())
    items, of = 0, sum(len(shard.header.tensors) for shard in shards.values())
    for shard in shards.values():
        for info, output in zip(shard.header.tensors, model.files[shard.name], strict=True):
            monitor.checkpoint()
            monitor.emit(Event("write", info.name, done, total, items, of))
            job.plan.check_unchanged()
            data, at = bytearray(info.nbytes), 0
            with threads():
                for piece in output.recipe.pieces(lambda target: job.mitigated(target)[:2]):
                    data[at : at + len(piece)] = piece
                    at += len(piece)
            dtype = TORCH_DTYPES.get(info.dtype)
            # Of a dtype that torch does not have, the bytes.
            shape = info.shape if dtype else (info.nbytes,)
            yield info.name, as_tensor(memoryview(data), dtype or torch.uint8, shape)
            done, items = done + info.nbytes, items + 1
    monitor.emit(Event("write", "", total, total, of, of))
