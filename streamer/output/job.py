"""Describe mitigations that are ready to run: jobs, made of checked inputs, and the writers of their outputs."""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch

from streamer import __version__
from streamer.adapters.adapter_config import mitigated_before
from streamer.adapters.finetuned import AdapterPaths
from streamer.detection.detect import detection_estimates, findings_bytes
from streamer.detection.findings import Findings, lacking, load_findings, matched_findings
from streamer.detection.intruders import Detection
from streamer.detection.options import (
    STAMP,
    DetectionOptions,
    DetectionRecord,
    Run,
    detection_record,
    stamp,
)
from streamer.errors import MismatchError, NumericError, UsageError
from streamer.events import Monitor
from streamer.linalg.operators import Delta, all_finite
from streamer.methods import Method, NullSpace, RegMean
from streamer.methods.files import Coefficients, InputMap
from streamer.output.record import (
    CARD_NAME,
    MOST_FACTS,
    SCHEMA,
    Card,
    MergedDtype,
    MitigatedMatrix,
    Record,
    totals,
)
from streamer.plan.plan import MemoryEstimate, Plan, factor_bytes, make_batch
from streamer.plan.side_files import is_module, read_beside
from streamer.plan.targets import Target
from streamer.storage.atomic_file import Piece, ShardPlan
from streamer.storage.files import difference
from streamer.storage.header import TensorInfo
from streamer.storage.transaction import OutputPlan, journal_of
from streamer.units import counted, listed

THIN = 48
"""Bytes for each row, column and rank of a mitigated delta: its factors in float64, the factors of its inputs, and their thin QRs."""

PROJECTED = 80
"""Bytes if it is also projected onto a rank."""


@dataclass(frozen=True)
class Job:
    """One mitigation, ready to run.

    Attributes
    ----------
    detection
        Options for detection if no findings are given, and the allowed memory of the run.
    findings
        Findings; None if the run makes them first, in its own file. Used only if the method needs them.
    dequantize
        Whether a merged model of a quantized base is written as a plain one.
    dtype, shard_bytes, requantize
        See `plan_merged`.
    for_server
        See `AdapterWriter`.
    card
        Whether the output's ``README.md`` describes how it was made.
    measured
        What a repair adds to the record: ``measured`` and ``repair``.
    detect
        Makes the findings of one matrix if they are made together with its tensors, and no file of them.
    """

    plan: Plan
    method: Method
    detection: DetectionOptions
    device: torch.device
    findings: Findings | None = None
    dequantize: bool = False
    dtype: MergedDtype | None = None
    shard_bytes: int | None = None
    requantize: InputMap | None = None
    for_server: bool = False
    card: bool = True
    measured: Mapping[str, Any] = field(default_factory=dict)
    detect: Callable[[Target], Detection] | None = None

    @property
    def detects(self) -> bool:
        """Test whether the job makes its own findings."""
        return self.method.needs_detection and self.findings is None

    @property
    def warnings(self) -> list[str]:
        """Warn of an adapter whose intruders were already scaled."""
        return [] if self.method.mitigation_lambda == 1 else self.made_before

    @property
    def made_before(self) -> list[str]:
        """Say how streamer made the adapter, if it mitigated it; see `mitigated_before`."""
        return mitigated_before(self.plan.adapter.files[0].header.metadata)

    def intruders(self, target: Target) -> int:
        """Return the largest number of directions that Δ' adds."""
        if self.detects:
            return self.detection.directions(target.module.shape)
        return len(self._detection_of(target).intruders) if self.method.needs_detection else 0

    def mitigation_bytes(self, target: Target, projected: bool = False) -> int:
        """Estimate the memory for Δ, Δ' and the norms of one matrix, in addition to resident memory.

        Parameters
        ----------
        projected
            Whether Δ' is projected onto the adapter's rank.
        """
        module, itemsize = target.module, self.plan.weights[target.tensor].compute.itemsize
        m, n = module.shape
        if module.low_rank:
            size = (
                (PROJECTED if projected else THIN)
                * (m + n)
                * (module.factor_rank + self.intruders(target))
            )
        else:
            # Δ, Δ', and one more if Δ is scaled.
            size = max(module.peak_bytes(itemsize), 3 * itemsize * m * n)
        return size + factor_bytes(self.plan, target, itemsize)

    def mitigated(self, target: Target) -> tuple[Delta, Delta]:
        """Return Δ and Δ' of one matrix: Δ twice if nothing changes."""
        delta = self.plan.finite_delta(target)
        detection = self._detection_of(target) if self.method.needs_detection else None
        if detection is not None and not (all_finite(detection.U) and all_finite(detection.Vh)):
            raise NumericError(
                f"findings: those on {target.tensor!r} hold NaN or Inf; run detect again"
            )
        return delta, self.method.mitigated(delta, detection, target.tensor)

    def metrics(
        self, target: Target, delta: Delta, written: Delta, dropped: float = 0.0
    ) -> MitigatedMatrix:
        """Measure the mitigation of one matrix, of which the share `dropped` of the norm of Δ' was not written."""
        detection, norm = (
            self._detection_of(target) if self.method.needs_detection else None,
            delta.norm(),
        )
        ranks = () if detection is None else detection.intruders
        scaled = ranks if self.method.select == "all" else ranks[:1]
        return {
            "tensor": target.tensor,
            "module": target.module.name,
            "transposed": target.transposed,
            "intruders": list(scaled),
            "certified": None if detection is None else detection.certified,
            "delta_norm": norm,
            "delta_norm_after": norm if written is delta else written.norm(),
            "dropped": dropped,
        }

    def _detection_of(self, target: Target) -> Detection:
        if self.detect is not None:
            return self.detect(target)
        assert self.findings is not None, "the findings are yet to be made"
        return self.findings.by_tensor[target.tensor].detection

    def decisions(self) -> dict[str, Any]:
        """Return everything besides the inputs that determines the output's bytes, except last bits of given findings."""
        detection = (
            self.detection.as_dict() if self.findings is None else self.findings.decisions_digest()
        )
        return {
            "schema": SCHEMA,
            "mitigation": self.method.as_dict(),
            "detection": detection if self.method.needs_detection else None,
            "dequantize": self.dequantize,
            "card": self.card,
            **self.measured,
            **self.form,
        }

    @property
    def form(self) -> dict[str, Any]:
        """Return the options that give the output another form than its input's."""
        form = {
            key: value
            for key in ("dtype", "shard_bytes", "for_server")
            if (value := getattr(self, key))
        }
        return form if self.requantize is None else {**form, "requantize": self.requantize.record()}

    @property
    def bits(self) -> str:
        """Return the digest of the last bits of given findings, which depend on the number of threads, if the output's bytes need them."""
        return (
            self.findings.digest()
            if self.findings is not None and self.method.needs_detection
            else ""
        )

    def detection_record(self, certified: int) -> DetectionRecord | None:
        """Return how intruders are found; None if the method does not need them."""
        if not self.method.needs_detection:
            return None
        options = self.detection if self.findings is None else self.findings.options
        return detection_record(options, certified, len(self.plan.targets))

    def stamp(self, command: str, written: Sequence[Target] | None = None) -> dict[str, str]:
        """Return the stamp for the metadata of the output's files, or the longest possible one before the findings exist.

        `written` are the matrices in the output; by default all.
        """
        targets = self.plan.targets if written is None else written
        needed = self.method.needs_detection
        certified = (
            sum(self.findings is None or self._detection_of(t).certified for t in targets)
            if needed
            else 0
        )
        return {
            STAMP: stamp(
                command, *self.plan.sources, self.detection_record(certified), self.method.as_json()
            )
        }


FindingsOrPath = Findings | Mapping[str, Findings] | str | Path | None
"""Findings as a user gives them: for one adapter, or for several by name, as objects or as the path of their file or directory."""


def open_jobs(
    base_path: str | Path,
    adapters: AdapterPaths,
    findings: Sequence[Findings | None],
    method: Method,
    detection: DetectionOptions,
    run: Run,
) -> list[Job]:
    """Open and check all inputs of mitigations, and make a job of each adapter.

    Parameters
    ----------
    findings
        Findings for each adapter, see `load_given`; None if the job detects.
    """
    if isinstance(method, RegMean) and len(adapters.paths) > 1:
        name, several = (
            method.coefficients.name,
            f"{len(adapters.paths)}: {listed(adapters.by_name)}",
        )
        do = "take them one at a time, each with its own"
        raise UsageError(f"{name}: coefficients belong to one adapter, found {several}; {do}")
    batch, jobs = (
        make_batch(base_path, adapters.paths, run.io, run.stated, run.architecture),
        list[Job](),
    )
    for plan, of_adapter in zip(batch.plans, findings, strict=True):
        checked = None if of_adapter is None else fitting_findings(plan, of_adapter, detection)
        run.monitor.warn(() if of_adapter is None else of_adapter.warnings)
        if isinstance(method, RegMean):
            check_coefficients(plan, method.coefficients)
        if isinstance(method, NullSpace):
            run.monitor.warn(check_map(plan, method.map))
        jobs.append(Job(plan, method, detection, run.device, checked))
    return jobs


def load_given(findings: FindingsOrPath, adapters: AdapterPaths) -> list[Findings | None]:
    """Load the findings for each adapter; None for each if none are given.

    Raises
    ------
    UsageError
        If some are missing or have the wrong form.
    """
    if findings is None:
        return [None for _ in adapters.paths]
    if adapters.single:
        if isinstance(findings, Mapping):
            what = f"a dict of {len(findings)}"
            raise UsageError(
                f"findings: expected findings on one adapter, found {what}; give one of them"
            )
        return [findings if isinstance(findings, Findings) else load_findings(findings)]
    if isinstance(findings, Mapping):
        without = [name for name in adapters.by_name if name not in findings]
        if without:
            raise UsageError(f"findings: has none for adapter {without[0]!r}; run detect on it")
        return [findings[name] for name in adapters.by_name]
    if isinstance(findings, Findings) or not Path(findings).is_dir():
        where = "findings" if isinstance(findings, Findings) else findings
        raise UsageError(
            f"{where}: expected findings on several adapters: the directory that detect wrote for them"
        )
    return [load_findings(Path(findings) / f"{name}.safetensors") for name in adapters.by_name]


def check_coefficients(plan: Plan, coefficients: Coefficients) -> None:
    """Refuse coefficients that were fitted to another base or adapter, or not to all of its matrices.

    Raises
    ------
    MismatchError
        Names the one that differs, and how.
    UsageError
        If they are not valid coefficients; see `Coefficients.check`.
    """
    coefficients.check()
    name, facts = coefficients.name, coefficients.facts
    for what, here in (("base", {**plan.base_identity}), ("adapter", {**plan.adapter_identity})):
        if not isinstance(facts.get(what), dict):
            why = f"do not say which {what} they were fitted to; make them with `streamer repair`"
            raise MismatchError(f"{name}: coefficients {why}")
        if facts[what] != here:
            other, do = (
                difference(facts[what], here),
                f"give the {what} that `streamer repair` fitted them to",
            )
            raise MismatchError(f"{name}: coefficients of another {what} ({other}); {do}")
    check_counts(plan, coefficients)


def check_counts(plan: Plan, coefficients: Coefficients) -> None:
    """Refuse coefficients for other matrices than an adapter's, or of other shapes.

    Raises
    ------
    MismatchError
        States how many matrices they do not fit, and the first.
    """
    ranks = {
        t.tensor: (t.module.shape[1], t.module.factor_rank) if t.module.low_rank else None
        for t in plan.targets
    }
    shapes = {tensor: tuple(factor.shape) for tensor, factor in coefficients.matrices.items()}
    wrong = [
        tensor
        for tensor in {**ranks, **shapes}
        if tensor not in ranks or ranks[tensor] != shapes.get(tensor, ())
    ]
    if wrong:
        which = f"{len(wrong)} of the adapter's matrices, {wrong[0]!r} first"
        do = "fit them to this adapter with `streamer repair`"
        raise MismatchError(f"{coefficients.name}: coefficients do not fit {which}; {do}")


def check_map(plan: Plan, inputs: InputMap) -> list[str]:
    """Refuse a map of another base, and warn of matrices that it lacks, whose deltas stay.

    Raises
    ------
    MismatchError
        If it maps another base, or has none of the adapter's matrices.
    """
    refuse_other_base(inputs, inputs.facts["base"], {**plan.base_identity})
    return lacking_inputs(plan, inputs)


def refuse_other_base(inputs: InputMap, mapped: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse a map of another base, by both identities."""
    if mapped != here:
        what = f"is a map of another base ({difference(mapped, here)})"
        raise MismatchError(f"{inputs.name}: {what}; make one of this base with `streamer map`")


def lacking_inputs(plan: Plan, inputs: InputMap) -> list[str]:
    """Warn of matrices whose inputs a map lacks; refuse the map if it lacks all."""
    lacks = [t.tensor for t in plan.targets if inputs.find(t.tensor, t.module.shape[1]) is None]
    if not lacks:
        return []
    names = listed(map(repr, lacks))
    if len(lacks) == len(plan.targets):
        raise MismatchError(
            f"{inputs.name}: has the inputs of none of the adapter's matrices, {names}"
        )
    return [
        f"the map has no inputs of {counted(len(lacks), 'matrix')}, {names}: what the adapter adds there stays"
    ]


def fitting_findings(plan: Plan, findings: Findings, options: DetectionOptions) -> Findings:
    """Check that findings cover the matrices of a plan; findings for a model in memory get the names of the base's files."""
    name = findings.name
    if findings.base.get("in_memory"):
        findings = matched_findings(plan, findings, name)
    findings.check_matches(plan.base_identity, plan.adapter_identity, options)
    shapes = {m.tensor: m.shape for m in findings}
    missing = [t.tensor for t in plan.targets if shapes.get(t.tensor) != t.module.shape]
    if missing:
        raise lacking(name, len(missing), len(plan.targets), repr(missing[0]))
    return findings


OWN_FINDINGS = ".streamer.findings.safetensors"
"""Findings that a job makes for itself, in its output directory."""


@dataclass(eq=False)
class Writer(ABC):
    """Writer of an output of one kind.

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
    model_tensors
        Number of tensors of a merged model, which need memory in its plan.
    pipeline
        See `Card`.
    written
        The matrices in the output, if not all.
    card
        Card that is written with the last facts; None if there is none, or if an input's card is copied.
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
    model_tensors: int = 0
    pipeline: str = ""
    written: Sequence[Target] | None = None
    card: Card | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        plan, cards = self.job.plan, (path for name, path in self.copies if name == CARD_NAME)
        self._original_card = b"".join(path.read_bytes() for path in cards)
        if self.job.card:
            self.card = Card(
                self._original_card,
                self.pipeline,
                plan.adapter.describes_model,
                plan.config.pipeline,
            )
            self.copies = [c for c in self.copies if c[0] != CARD_NAME]

    def record(self, matrices: list[MitigatedMatrix], nbytes: int = 0) -> Record:
        """Return the output's record, without its files, which have `nbytes` bytes."""
        job = self.job
        base, adapter = job.plan.sources
        options, certified = job.method.as_json(), sum(m["certified"] is True for m in matrices)
        record: Record = {
            "schema": SCHEMA,
            "command": self.command,
            "version": __version__,
            "base": base,
            "adapter": adapter,
            "detection": job.detection_record(certified),
            "method": options["method"],
            "scale": options["scale"],
            "lambda": options["lambda"],
            "coefficients": options.get("coefficients"),
            "to_lora": self.to_lora,
            "dequantize": job.dequantize,
            "totals": totals(matrices, nbytes),
            "warnings": [*job.plan.notes, *self.warnings],
            "notes": self.notes,
            "advice": self.advice,
            "left_out": self.skipped_files,
            "carried": job.plan.edits.listed(job.plan.base, job.plan.adapter.describes_model),
            "tokenizer": self.tokenizer,
            "matrices": matrices,
        }
        if_any = {"map": options.get("map"), "file": self._file}
        some = {key: value for key, value in if_any.items() if value}
        return cast(Record, {**record, **some, **job.measured, **job.form})

    @property
    def _file(self) -> str:
        """Return the name of the file of the coefficients or the map, which does not determine the output; empty if there is none."""
        file = self.job.method.file
        return "" if file is None else Path(file.name).name

    @cached_property
    def items(self) -> dict[str, int]:
        """Count for each file what progress counts: a shard's tensors, or the file."""
        tensors = {name: len(shard.header.tensors) for name, shard in self.shards.items()}
        return {name: tensors.get(name, 1) for name, _ in self.output.files}

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
        modules = {
            name: hashlib.sha256(path.read_bytes()).hexdigest()
            for name, path in self.copies
            if is_module(name)
        }
        converted = {} if self.to_lora is None else {"to_lora": self.to_lora}
        digest = plan.digest(
            command=self.command,
            files=[*copies, *texts, *finals],
            data=data,
            named=hashlib.sha256(named.encode()).hexdigest(),
            modules=modules,
            original_card=hashlib.sha256(self._original_card).hexdigest(),
            **self.job.decisions(),
            **converted,
        )
        # A run resumed under other names of its inputs, through links, would otherwise write both names.
        stamps = {
            **plan.stamps(),
            " and ".join([*(source["name"] for source in plan.sources), self._file]): (),
        }
        conflicting = (
            *self.conflicting_names,
            *read_beside(self.path, {name for name, _ in files}),
        )
        temporary = []
        if self.job.detects:
            # Its own findings stay to the end; their journal is removed before any large file is written.
            size = findings_bytes(plan, self.job.detection)
            journal_bytes = max(0, size - sum(size for _, size in files))
            temporary = [(OWN_FINDINGS, size), (journal_of(Path(OWN_FINDINGS)).name, journal_bytes)]
        return OutputPlan(
            self.path,
            tuple(files),
            digest,
            stamps,
            plan.inputs,
            conflicting,
            tuple(temporary),
            frozenset({CARD_NAME}),
            self.job.bits,
            __version__,
        )

    @abstractmethod
    def estimates(self, resident: int) -> Iterator[MemoryEstimate]:
        """Estimate the peak memory for each matrix, including `resident` bytes already in use."""

    def needs(self, resident: int) -> Iterator[MemoryEstimate]:
        """Estimate the same for all steps of the job, which may detect first."""
        job = self.job
        detecting = detection_estimates([job.plan], job.detection, resident) if job.detects else ()
        return itertools.chain(detecting, self.estimates(resident))

    def shard(self, name: str, job: Job) -> ShardPlan:
        """Plan a file of the output with complete metadata, which needs the findings."""
        ((key, value),) = job.stamp(self.command, self.written).items()
        return self.shards[name].with_metadata(key, value)

    def pieces(
        self, info: TensorInfo, job: Job, metrics: list[MitigatedMatrix], monitor: Monitor
    ) -> Iterator[Piece]:
        """Yield the bytes of a tensor in pieces, unless a stop is requested; see `tensor_bytes`."""
        for piece in self.tensor_bytes(info, job, metrics):
            monitor.checkpoint()
            yield piece

    @abstractmethod
    def tensor_bytes(
        self, info: TensorInfo, job: Job, metrics: list[MitigatedMatrix]
    ) -> Iterable[Piece]:
        """Yield the bytes of a tensor in pieces, and append the metrics of each matrix that is mitigated for it.

        Parameters
        ----------
        job
            The writer's job, with its findings available.
        """
