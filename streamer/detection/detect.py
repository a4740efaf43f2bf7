"""Detect in all matrices of adapters on one base, into memory or into files.

A findings file is written through a journal with a record for each matrix, so that a killed run resumes. The largest size of findings is
estimated, and the free space checked, before the first matrix is read.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamer import __version__
from streamer.detection import solvers
from streamer.detection.findings import Findings, load_findings
from streamer.detection.findings_file import (
    ARRAYS,
    FIGURES,
    FILE_NAME,
    FindingsHead,
    MatrixFinding,
    is_findings_file,
    matrix_entries,
    plan_findings_file,
)
from streamer.detection.intruders import Detection
from streamer.detection.matrices import Work, detect_in, detection_estimates, kept_bytes
from streamer.detection.options import DetectionOptions, Run
from streamer.errors import FormatError, OutputError, OutputExistsError, UsageError
from streamer.events import Event
from streamer.json_types import check
from streamer.linalg.torch_state import thread_count
from streamer.plan.plan import AdapterBatch, Assignment, Plan, check_budget, resident_bytes
from streamer.plan.targets import Target
from streamer.storage.atomic_file import Buffer, partials_of, write_sealed
from streamer.storage.header import Header, TensorInfo, layout, parse_header
from streamer.storage.journal import Journal, ResumableFile, journal_of, left
from streamer.storage.transaction import allocated_bytes, check_file_path, check_space, holds, is_taken, not_own
from streamer.units import counted
from streamer.weights.base import as_bytes

OFFSETS_BYTES = 16 * 14
"""Upper bound of the additional bytes for a matrix's tensor offsets in a large file, compared with a record."""


class FindingsWriter:
    """Records of matrices in the journal of a findings file, and the file made of them.

    Attributes
    ----------
    threads
        Number of torch's threads for the matrices: the number with which the run began, even if it is resumed elsewhere, because
        the last bits of findings depend on it.
    """

    def __init__(self, path: Path, journal: Journal, resumed: bool) -> None:
        self.path, self.resumed, self._journal = path, resumed, journal
        self._records = {self._figures(i)["tensor"]: i for i in range(1, len(journal))}
        self.threads = thread_count(json.loads(journal[0]).get("threads"))

    def _figures(self, i: int) -> dict[str, Any]:
        header = _record_header(self._journal[i])
        with contextlib.suppress(KeyError, TypeError, ValueError, RecursionError):
            figures: dict[str, Any] = json.loads(header.metadata["matrix"])
            check(figures, FIGURES)
            if header.by_name.keys() == {f"{figures['tensor']}/{key}" for key in ARRAYS}:
                return figures
        raise self._journal.foreign(i)

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._records

    def add(self, finding: MatrixFinding) -> None:
        """Append one matrix durably to the journal."""
        arrays = finding.arrays()
        _, raw = _layout(finding, arrays)
        self._journal.append(raw + b"".join(as_bytes(t) for t in arrays.values()))
        self._records[finding.tensor] = len(self._journal) - 1

    def write(self, head: FindingsHead, plan: Plan) -> None:
        """Write the file, once all matrices of a plan are recorded; it gets its name only if the inputs have not changed."""
        matrices: list[dict[str, Any]] = []
        entries, home = [], {}
        for i in (self._records[target.tensor] for target in plan.targets):
            matrices.append(self._figures(i))
            for info in _record_header(self._journal[i]).tensors:
                entries.append((info.name, info.dtype, info.shape))
                home[info.name] = i
        shard = plan_findings_file(self.path.name, head, matrices, entries)

        def source(info: TensorInfo) -> Iterator[Buffer]:
            raw = self._journal[home[info.name]]
            header = _record_header(raw)
            own = header.by_name[info.name]
            yield raw[header.data_start + own.start : header.data_start + own.end]

        write_sealed(self.path.parent, shard, source, plan.check_unchanged)


def _layout(finding: MatrixFinding, arrays: Mapping[str, Tensor]) -> tuple[Header, bytes]:
    """Lay out a matrix's record: its header, and the header's bytes."""
    return layout(matrix_entries(finding.tensor, arrays), {"matrix": json.dumps(finding.figures())})


def _record_header(raw: bytes) -> Header:
    """Read the header of a record, which is a safetensors file for one matrix."""
    n = 8 + int.from_bytes(raw[:8], "little")
    return parse_header(raw[:n], len(raw), "journal")


FindingsSize = tuple[int, int]
"""Bytes of a findings file and of the journal beside it."""


def findings_bytes(plan: Plan, options: DetectionOptions) -> FindingsSize:
    """Compute the largest size of findings, with every direction an intruder. Needs about 1 s for 10,000 matrices."""
    head = FindingsHead.of(plan, options)
    known = [head.base, head.adapter, dict(head.sources), options.as_dict()]
    file = journal = 4096 + 2 * len(json.dumps(known))
    for finding in (_widest(plan, target, options) for target in plan.targets):
        record = _layout(finding, finding.arrays())[0].file_bytes
        file += record + OFFSETS_BYTES
        journal += record + 40
    return file, journal


def _widest(plan: Plan, target: Target, options: DetectionOptions) -> MatrixFinding:
    """Make a finding of the largest possible size: every direction an intruder, every figure as long as possible."""
    module, weight = target.module, plan.weights[target.tensor]
    (m, n), k = module.shape, options.directions(module.shape)
    longest, every = -sys.float_info.max, tuple(range(k))
    U, S, Vh = (torch.empty(shape, dtype=weight.compute, device="meta") for shape in ((m, k), (k,), (k, n)))
    found = Detection(singular_values=(longest,) * k, similarity=(longest,) * k, similarity_low=(longest,) * k,
                      similarity_high=(longest,) * k, base_singular_values=(longest,) * k, intruders=every, U=U, S=S,
                      Vh=Vh, certified=False, degenerate=every, solver=max(solvers.SOLVERS, key=len), escalated=False,
                      steps=10**9, products=10**9, cutoff=longest,
                      delta_norm=longest, intruder_energy=longest, dropped_at_zero=longest, precision="float64")  # fmt: skip
    return MatrixFinding(target.tensor, module.name, module.shape, weight.label, module.rank, module.scaling,
                         False, "f" * 64, found)  # fmt: skip


def detect_all(batch: AdapterBatch, options: DetectionOptions, run: Run, resident: int,
               writers: Sequence[FindingsWriter] = ()) -> Iterator[tuple[int, MatrixFinding]]:  # fmt: skip
    """Detect in every target of a batch, in the base's file order, and yield each finding with its plan's number.

    A matrix that several plans change is read once for all of them.

    Parameters
    ----------
    resident
        Bytes in memory between two steps; see `resident_bytes`.
    writers
        Writers of each plan's findings: matrices that they already have are skipped, and they set the number of torch's threads.
    """
    plans, monitor = batch.plans, run.monitor
    threads = [writer.threads for writer in writers] or [torch.get_num_threads()] * len(plans)
    _check_budgets(batch, options, resident)
    groups = batch.matrices(lambda one: not writers or one.target.tensor not in writers[one.plan])
    work = Work(batch, groups, options, threads, resident)
    todo = [one for group in groups for one in group]
    total, of = work.cost(Assignment(i, t) for i, plan in enumerate(plans) for t in plan.targets), batch.matrix_count
    done, items = total - work.cost(todo), of - len(todo)
    names = [plan.adapter.path.absolute().name if len(plans) > 1 else "" for plan in plans]

    def begin(one: Assignment) -> None:
        monitor.checkpoint()
        monitor.emit(Event("detect", one.target.tensor, done, total, items, of, names[one.plan]))

    with contextlib.closing(detect_in(work, run, begin)) as stream:
        for one, finding in stream:
            yield one.plan, finding
            done, items = done + work.cost([one]), items + 1
    monitor.emit(Event("detect", "", total, total, of, of))


def detect_in_memory(batch: AdapterBatch, options: DetectionOptions, run: Run) -> list[Findings]:
    """Detect and keep each plan's findings in memory, which the budget includes."""
    kept = sum(kept_bytes(plan, t, options) for plan in batch.plans for t in plan.targets)
    found: list[dict[str, MatrixFinding]] = [{} for _ in batch.plans]
    for i, finding in detect_all(batch, options, run, resident_bytes(batch) + kept):
        found[i][finding.tensor] = finding
    ordered = [(p, [mine[t.tensor] for t in p.targets]) for p, mine in zip(batch.plans, found, strict=True)]
    made = [Findings.of(FindingsHead.of(plan, options), matrices) for plan, matrices in ordered]
    run.monitor.warn(warning for findings in made for warning in findings.warnings)
    return made


def detect_to_files(batch: AdapterBatch, paths: Sequence[Path], options: DetectionOptions, run: Run, resident: int,
                    sizes: Sequence[FindingsSize] = ()) -> list[Findings]:  # fmt: skip
    """Detect, journal each matrix, and write each plan's findings file; seconds are this run's.

    Finished findings of exactly these plans stay unchanged, but their modification times are updated. Missing directories are created.

    Parameters
    ----------
    resident
        Bytes in memory between two steps; see `resident_bytes`.
    sizes
        `findings_bytes` of each plan, if the caller has computed them.
    """
    monitor, places = run.monitor, _places(batch, paths, options, run.overwrite, resident)
    todo = [place for place in places if place.finished is None]
    _check_space(places, sizes or _sizes(places))
    for one in places:
        if one.finished is not None:
            left(one.path, monitor)
    seconds: dict[tuple[Path, str], float | None] = {}
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(one.writer(run)) for one in todo]
        begun = [(w, t) for w, one in zip(writers, todo, strict=True) if w.resumed for t in one.plan.targets]
        if begun:
            monitor.resuming(sum(target.tensor in writer for writer, target in begun), len(begun), "matrix")
        if todo:
            now = torch.get_num_threads()
            for count in sorted({writer.threads for writer in writers} - {now}):
                text = f"goes on with {counted(count, 'thread')}, as it began; --no-resume starts over with {now}"
                monitor.emit(Event("note", text))
            pending = AdapterBatch(batch.base, tuple(one.plan for one in todo))
            for i, finding in detect_all(pending, options, run, resident, writers):
                writers[i].add(finding)
                seconds[writers[i].path, finding.tensor] = finding.seconds
        monitor.checkpoint()
    for writer in writers:
        monitor.told(writer.path, "resumed" if writer.resumed else "written")

    def timed(path: Path) -> Findings:
        findings = load_findings(path)
        matrices = tuple(replace(m, seconds=seconds.get((path, m.tensor))) for m in findings)
        return replace(findings, matrices=matrices)

    made = [timed(one.path) if one.finished is None else one.finished for one in places]
    monitor.warn(warning for findings in made for warning in findings.warnings)
    return made


def inspect_detections(
    batch: AdapterBatch, paths: Sequence[Path], options: DetectionOptions, run: Run
) -> list[tuple[str, FindingsSize]]:
    """Check without writing what `detect_to_files` would do: for each plan ``new``, ``resume`` or ``done``, and `findings_bytes`.

    Finished findings have the size (0, 0).
    """
    places = _places(batch, paths, options, run.overwrite, resident_bytes(batch))
    sizes = _sizes(places)
    _check_space(places, sizes)
    states = ["done" if one.finished is not None else "resume" if one.file(run).is_begun() else "new" for one in places]
    return [*zip(states, sizes, strict=True)]


@dataclass(frozen=True)
class _Place:
    """A findings file to write, or an existing one if `finished`."""

    plan: Plan
    path: Path
    head: FindingsHead
    finished: Findings | None

    def file(self, run: Run) -> ResumableFile:
        # The last bits depend on the number of threads; without any matrix, a resumed run chooses it.
        plan = self.head.digest(target.tensor for target in self.plan.targets)
        start = {"plan": plan, "version": __version__, "stamps": self.plan.detection_stamps(),
                 "threads": torch.get_num_threads()}  # fmt: skip
        return ResumableFile(self.path, start, run.resume, run.overwrite, records=1)

    @contextlib.contextmanager
    def writer(self, run: Run) -> Iterator[FindingsWriter]:
        """Lock the file, resume or begin its run, and write it if the block does not raise."""
        with self.file(run).begun() as (journal, resumed):
            writer = FindingsWriter(self.path, journal, resumed)
            yield writer
            writer.write(self.head, self.plan)


def _sizes(places: Sequence[_Place]) -> list[FindingsSize]:
    """Compute `findings_bytes` of each plan, (0, 0) for finished findings."""
    return [findings_bytes(one.plan, one.head.options) if one.finished is None else (0, 0) for one in places]


def _check_space(places: Sequence[_Place], sizes: Sequence[FindingsSize]) -> None:
    """Refuse findings that might not fit on the disk together with their journals."""
    todo, needed = [(one.path, size) for one, size in zip(places, sizes, strict=True) if one.finished is None], 0
    for path, size in todo:
        # Files of an interrupted run: usable ones are reused, and the others are removed first.
        names = {path.name, journal_of(path).name}
        there = [journal_of(path), *(partials_of(path.parent, names) if path.parent.is_dir() else ())]
        needed += sum(size) - sum(map(allocated_bytes, there))
    if todo:
        path, _ = todo[0]
        check_space(path.parent if len(todo) > 1 else path, needed, at_most=True)


@contextlib.contextmanager
def naming_inputs(plan: Plan, paths: Sequence[Path], overwrite: bool) -> Iterator[None]:
    """If an output would replace an input, raise an error that names the input, instead of one about an unknown file."""
    try:
        yield
    except OutputExistsError:
        if overwrite:
            plan.refuse_overwriting(paths)
        raise


def _places(
    batch: AdapterBatch, paths: Sequence[Path], options: DetectionOptions, overwrite: bool, resident: int
) -> list[_Place]:
    """Check before detection where findings go and which are finished."""
    _check_budgets(batch, options, resident)
    places = []
    for plan, path in zip(batch.plans, paths, strict=True):
        head = FindingsHead.of(plan, options)
        with naming_inputs(plan, [path], overwrite):
            found = _finished(plan, path, head, overwrite)
        if found is None:
            plan.refuse_overwriting([path])
        places.append(_Place(plan, path, head, found))
    return places


def _check_budgets(batch: AdapterBatch, options: DetectionOptions, resident: int) -> None:
    needs = (need for plan in batch.plans for need in detection_estimates(plan, options, resident))
    check_budget(needs, options.max_memory)


def _finished(plan: Plan, path: Path, head: FindingsHead, overwrite: bool) -> Findings | None:
    """Find the finished findings of exactly this plan, without writing; return None if they do not exist yet or are to be replaced.

    Raises
    ------
    OutputError
        If another file exists at the path, or it cannot be written.
    """
    check_file_path(path, FILE_NAME, journal_of(path).name)
    if path.suffix != ".safetensors":
        raise UsageError(f"{path}: expected a name that ends in .safetensors, such as {path}.safetensors")
    for source in plan.inputs:
        if source.resolve() in (path.resolve(), *path.resolve().parents):
            raise OutputError(f"{path}: lies inside the input {source}; choose an output outside it")
    if not is_taken(path):
        return None
    if not is_findings_file(path):
        raise not_own(path, "findings")
    if overwrite:
        return None
    try:
        findings = load_findings(path)
    except FormatError as e:
        raise holds(path, "findings that cannot be read") from e
    if findings.made_from() != head.digest(target.tensor for target in plan.targets):
        raise holds(path, "findings of other inputs or options")
    return findings
